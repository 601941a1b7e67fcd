"""Class masks in the three scenarios, against networks with a head for each task, written out."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
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
from lifelong_jax.losses import cross_entropy
from tests.problems import RECIPE, SGD, apply_fn, coupled_sgd, make_batch, make_params, make_split_tasks

GROUPS = [[3, 0], [2], [1, 4]]  # in no order, of two sizes
NUM_CLASSES, STRENGTH = 5, 2.0
TASKS = make_split_tasks(GROUPS)
KEY = jax.random.key(3)
FULL_BATCH = RECIPE._replace(num_epochs=3, batch_size=100)


def learn(method, recipe, tasks=TASKS, *, params=None, strength=STRENGTH):
    params = make_params(NUM_CLASSES) if params is None else params
    return learn_tasks(method, recipe, params, tasks, KEY, strength=strength)


def head_fn(classes, params, x):
    """A network of its own for each set of classes: the others' weights are not there at all."""
    return jnp.tanh(x @ params["w1"]) @ params["w2"][:, classes]


def classes_of(scenario, index):
    return GROUPS[index] if scenario == "task" else [label for group in GROUPS[: index + 1] for label in group]


def real(batch):
    """A batch without its padding."""
    return jax.tree.map(lambda leaf: leaf[np.asarray(batch.weights) > 0], jax.device_get(batch))


def positions(labels, classes):
    """Where the labels are among the classes, in the order of these."""
    return (labels[:, None] == np.array(classes)).argmax(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def written_out(classes, params, inputs, labels, stored):
    """Momentum on the loss plus the penalties `stored`, (importance, anchor); the parameters and both importances."""
    outputs_fn = functools.partial(head_fn, list(classes))

    def loss(params):
        logits = jax.vmap(outputs_fn, (None, 0))(params, inputs)
        cost = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        for importance, anchor in stored:
            terms = jax.tree.map(lambda o, p, a: jnp.sum(o * (p - a) ** 2), importance, params, anchor)
            cost += STRENGTH / 2 * sum(jax.tree.leaves(terms))
        return cost

    def step(carry, _):
        params, state = carry
        updates, state = SGD.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, SGD.init(params)), length=FULL_BATCH.num_epochs)

    def with_an_impossible_class(params, x):  # because a Fisher information of one class is refused
        return jnp.append(outputs_fn(params, x), jnp.finfo(jnp.float32).min)

    importances = {
        "ewc": fisher_diagonal(with_an_impossible_class, params, inputs, method="reference"),
        "mas": mas_importance(outputs_fn, params, inputs, method="reference"),
    }
    return params, importances


@pytest.mark.filterwarnings("ignore:the importance of")  # of a task of one class, it is 0
@pytest.mark.parametrize("scenario", ["task", "class"])
@pytest.mark.parametrize("method", [methods.ewc(), methods.mas("separate")], ids=["ewc", "mas"])
def test_masks_equal_a_network_that_has_the_active_outputs_alone(scenario, method):
    params, stored = make_params(NUM_CLASSES), []
    nothing = jax.tree.map(jnp.zeros_like, params)
    matrix = np.full((3, 3), np.nan)
    for index, task in enumerate(TASKS):
        classes = classes_of(scenario, index)
        train = real(task.train)
        penalties = stored + [(nothing, nothing)] * (2 - len(stored))
        labels = positions(train.labels, classes)
        params, importances = written_out(tuple(classes), params, train.inputs, labels, penalties)
        stored.append((importances[method.name], params))
        for column, other in enumerate(TASKS):
            if scenario == "task" or column <= index:
                classes = classes_of(scenario, column if scenario == "task" else index)
                test = real(other.test)
                logits = np.tanh(test.inputs @ np.asarray(params["w1"])) @ np.asarray(params["w2"])[:, classes]
                matrix[index, column] = np.mean(np.array(classes)[logits.argmax(-1)] == test.labels)

    learned = learn(method, FULL_BATCH._replace(scenario=scenario))
    chex.assert_trees_all_close(learned.params, params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learned.accuracy_matrix, matrix)
    assert np.isnan(learned.initial_accuracies).all() == (scenario == "class")


def test_domain_incremental_tasks_share_their_outputs():
    groups = [[3, 0], [1, 4]]
    batches = jax.device_get([make_batch(size, NUM_CLASSES, seed=size) for size in (31, 17)])
    tasks = split_tasks(*batches, groups, NUM_CLASSES, shared_outputs=True)
    learned = learn(methods.finetune(), FULL_BATCH._replace(num_epochs=40), tasks, params=make_params(2), strength=0.0)
    assert evaluate(apply_fn, learned.params, tasks)[1] > 0.6
    assert np.isfinite(learned.accuracy_matrix).all()


def test_joint_learning_shows_each_example_the_classes_of_its_task():
    params = make_params(NUM_CLASSES)
    examples = [(real(task.train), GROUPS[index]) for index, task in enumerate(TASKS)]

    @jax.jit
    def gradient(params):
        def loss(params):
            total = 0.0
            for batch, classes in examples:
                logits = jax.vmap(functools.partial(head_fn, classes), (None, 0))(params, batch.inputs)
                labels = positions(batch.labels, classes)
                total += optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
            return total / sum(len(batch.labels) for batch, _ in examples)

        return jax.grad(loss)(params)

    state = SGD.init(params)
    for _ in range(FULL_BATCH.num_epochs):
        updates, state = SGD.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    learned = learn_jointly(FULL_BATCH._replace(scenario="task"), make_params(NUM_CLASSES), TASKS, KEY)
    chex.assert_trees_all_close(learned.params, params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(learned.accuracy_matrix[-1], evaluate(apply_fn, params, TASKS, "task"))


def test_padding_takes_no_steps_and_every_example_is_seen_once():
    padded = np.full((16, 2), 1e6, np.float32)
    padded[:7] = np.random.default_rng(0).normal(size=(7, 2))
    weights = (np.arange(16) < 7).astype(np.float32)
    sgd = optax.sgd(1.0)
    state = init_training(sgd, jnp.zeros(2), jax.random.key(1))
    none = init_consolidation(state.params)

    # The gradient is −x whatever the parameters are: one step for each example adds them up.
    learn = functools.partial(learn_task, lambda params, x: -params @ x, sgd, state, none, num_epochs=1, batch_size=1)
    summed, info = jax.jit(lambda weights: learn(padded, weights=weights))(weights)
    np.testing.assert_allclose(summed.params, padded[:7].sum(axis=0), rtol=1e-5)
    assert info.num_steps.tolist() == [7]
    assert (info.loss[0, 7:] == 0).all()


def test_a_padded_task_is_learned_as_the_task_without_padding():
    padded = TASKS[1].train
    assert 0 < padded.weights.sum() < len(padded.labels)
    optimizer, params = coupled_sgd(0.0), make_params(NUM_CLASSES)

    @jax.jit
    def learn(examples):
        return learn_task(
            cross_entropy(apply_fn),
            optimizer,
            init_training(optimizer, params, jax.random.key(1)),
            init_consolidation(params),
            examples,
            num_epochs=2,
            batch_size=len(real(padded).labels),
            weights=examples.weights,
        )[0].params

    chex.assert_trees_all_close(learn(padded), learn(real(padded)), rtol=1e-5)


def test_bad_input():
    def refused(tasks, scenario):
        return learn(methods.ewc(), RECIPE._replace(scenario=scenario), tasks)

    with pytest.raises(ValueError, match=r"recipe\.scenario must be one of task, domain, class"):
        refused(TASKS, "online")
    with pytest.raises(ValueError, match=r"tasks\[0\] has a class_mask, but scenario 'domain' takes none"):
        refused(TASKS, "domain")
    without = [task._replace(class_mask=None) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\] has no class_mask, but scenario 'class' needs one"):
        refused(without, "class")
    narrow = [task._replace(class_mask=task.class_mask[:3]) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\].class_mask has shape \(3,\), but apply_fn returns 5 outputs"):
        refused(narrow, "task")
    foreign = [task._replace(class_mask=TASKS[1].class_mask) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\] has labels that are not among the classes of its class_mask"):
        refused(foreign, "task")
