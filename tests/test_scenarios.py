"""Class masks in the three scenarios, against networks with a head for each task, written out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Batch,
    add_quadratic_penalty,
    evaluate,
    fisher_diagonal,
    init_consolidation,
    init_training,
    learn_jointly,
    learn_task,
    learn_tasks,
    mas_importance,
    methods,
    split_tasks,
)

GROUPS = [[3, 0], [2], [1, 4]]  # in no order, of two sizes
NUM_CLASSES, NUM_EPOCHS, STRENGTH = 5, 3, 2.0
SGD = optax.sgd(0.1, momentum=0.9)


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), SGD)


def make_batch(num_examples, key):
    keys = jax.random.split(key, 2)
    inputs = jax.random.normal(keys[0], (num_examples, 6))
    labels = jnp.concatenate([jnp.arange(NUM_CLASSES), jax.random.randint(keys[1], (num_examples - 5,), 0, 5)])
    return Batch(inputs, labels, jnp.ones(num_examples))


BATCHES = make_batch(31, jax.random.key(0)), make_batch(17, jax.random.key(1))
TASKS = split_tasks(*BATCHES, GROUPS, NUM_CLASSES)


def apply_fn(params, x):
    return jnp.tanh(x @ params["trunk"]) @ params["heads"]


def make_params():
    keys = jax.random.split(jax.random.key(2))
    return {"trunk": jax.random.normal(keys[0], (6, 8)), "heads": jax.random.normal(keys[1], (8, NUM_CLASSES))}


def multi_head_fn(classes, params, x):
    # A network of its own for each set of classes: the others' weights are not there at all.
    return jnp.tanh(x @ params["trunk"]) @ params["heads"][:, jnp.array(classes)]


learn = functools.partial(
    learn_tasks, apply_fn=apply_fn, optimizer_fn=optimizer_fn, num_epochs=NUM_EPOCHS, batch_size=40
)


def classes_of(scenario, index):
    return GROUPS[index] if scenario == "task" else [label for group in GROUPS[: index + 1] for label in group]


def real(batch):
    return jax.tree.map(lambda leaf: leaf[np.asarray(batch.weights) > 0], batch)


@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("method", [methods.ewc(), methods.mas("separate")], ids=["ewc", "mas"])
def test_masks_equal_a_network_that_has_the_active_outputs_alone(scenario, method):
    params, stored = make_params(), []
    matrix = np.full((3, 3), np.nan)
    for index, task in enumerate(TASKS):
        classes = classes_of(scenario, index)
        inputs, labels, _, _ = real(task.train)  # without padding
        labels = jnp.array([classes.index(label) for label in labels.tolist()])
        outputs_fn = functools.partial(multi_head_fn, classes)

        def loss(params, outputs_fn=outputs_fn, inputs=inputs, labels=labels):
            logits = jax.vmap(outputs_fn, (None, 0))(params, inputs)
            cost = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            for importance, anchor in stored:
                terms = jax.tree.map(lambda o, p, a: jnp.sum(o * (p - a) ** 2), importance, params, anchor)
                cost += STRENGTH / 2 * sum(jax.tree.leaves(terms))
            return cost

        state = SGD.init(params)
        for _ in range(NUM_EPOCHS):
            updates, state = SGD.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, updates)
        estimator = fisher_diagonal if method.name == "ewc" else mas_importance
        stored.append((estimator(outputs_fn, params, inputs, method="reference"), params))
        for column, other in enumerate(TASKS):
            if scenario == "task" or column <= index:
                classes = classes_of(scenario, column if scenario == "task" else index)
                test = real(other.test)
                logits = jax.vmap(functools.partial(multi_head_fn, classes), (None, 0))(params, test.inputs)
                matrix[index, column] = np.mean(np.array(classes)[logits.argmax(-1)] == np.asarray(test.labels))

    learned = learn(
        method, params=make_params(), tasks=TASKS, key=jax.random.key(3), scenario=scenario, strength=STRENGTH
    )
    chex.assert_trees_all_close(learned.params, params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learned.accuracy_matrix, matrix)
    assert np.isnan(learned.initial_accuracies).all() == (scenario == "class")


def test_domain_incremental_tasks_share_their_outputs():
    groups = [[3, 0], [1, 4]]
    tasks = split_tasks(*BATCHES, groups, NUM_CLASSES, shared_outputs=True)
    params = {**make_params(), "heads": make_params()["heads"][:, :2]}
    learned = learn(methods.finetune(), params=params, tasks=tasks, key=jax.random.key(3), strength=0.0, num_epochs=40)
    assert evaluate(apply_fn, learned.params, tasks)[1] > 0.6
    assert np.isfinite(learned.accuracy_matrix).all()


def test_joint_learning_shows_each_example_the_classes_of_its_task():
    params = make_params()
    examples = [(real(task.train), GROUPS[index]) for index, task in enumerate(TASKS)]

    def loss(params):
        total = 0.0
        for batch, classes in examples:
            logits = jax.vmap(functools.partial(multi_head_fn, classes), (None, 0))(params, batch.inputs)
            labels = jnp.array([classes.index(label) for label in batch.labels.tolist()])
            total += optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
        return total / sum(len(batch.labels) for batch, _ in examples)

    state = SGD.init(params)
    for _ in range(NUM_EPOCHS):
        updates, state = SGD.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
    learned = learn_jointly(
        apply_fn,
        optimizer_fn,
        make_params(),
        TASKS,
        jax.random.key(3),
        scenario="task",
        num_epochs=NUM_EPOCHS,
        batch_size=100,
    )
    chex.assert_trees_all_close(learned.params, params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learned.accuracy_matrix[-1], evaluate(apply_fn, params, TASKS, "task"))


def test_padding_takes_no_steps_and_every_example_is_seen_once():
    inputs = jnp.concatenate([jax.random.normal(jax.random.key(0), (7, 2)), jnp.full((9, 2), 1e6)])
    weights = (jnp.arange(16) < 7).astype(jnp.float32)
    sgd = optax.sgd(1.0)
    state = init_training(sgd, jnp.zeros(2), jax.random.key(1))
    none = init_consolidation(state.params)
    learn = functools.partial(learn_task, num_epochs=1, batch_size=1)

    # The gradient is −x whatever the parameters are: one step for each example adds them up.
    sum_inputs = functools.partial(learn, lambda params, x: -params @ x, sgd, state, none, inputs)
    summed, info = jax.jit(lambda weights: sum_inputs(weights=weights))(weights)
    np.testing.assert_allclose(summed.params, inputs[:7].sum(axis=0), rtol=1e-5)
    assert info.num_steps.tolist() == [7]
    assert (info.loss[0, 7:] == 0).all()


def test_a_padded_task_is_learned_as_the_task_without_padding():
    padded = TASKS[1].train
    assert 0 < padded.weights.sum() < len(padded.labels)
    states = [
        learn_task(
            methods.cross_entropy(apply_fn),
            optimizer_fn(0.0),
            init_training(optimizer_fn(0.0), make_params(), jax.random.key(1)),
            init_consolidation(make_params()),
            examples,
            num_epochs=2,
            batch_size=len(real(padded).labels),
            weights=examples.weights,
        )[0]
        for examples in (padded, real(padded))
    ]
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5)


def test_bad_input():
    arguments = {"params": make_params(), "key": jax.random.key(3), "strength": 1.0}
    with pytest.raises(ValueError, match="scenario must be one of task, domain, class"):
        learn(methods.ewc(), tasks=TASKS, scenario="online", **arguments)
    with pytest.raises(ValueError, match=r"tasks\[0\] has a class_mask, but scenario 'domain' takes none"):
        learn(methods.ewc(), tasks=TASKS, **arguments)
    without = [task._replace(class_mask=None) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\] has no class_mask, but scenario 'class' needs one"):
        learn(methods.ewc(), tasks=without, scenario="class", **arguments)
    narrow = [task._replace(class_mask=task.class_mask[:3]) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\].class_mask has shape \(3,\), but apply_fn returns 5 outputs"):
        learn(methods.ewc(), tasks=narrow, scenario="task", **arguments)
    foreign = [task._replace(class_mask=TASKS[1].class_mask) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\] has labels that are not among its classes"):
        learn(methods.ewc(), tasks=foreign, scenario="task", **arguments)
