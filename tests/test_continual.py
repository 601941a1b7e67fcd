"""The whole sequence: against the same steps written out, and what must not happen on the way."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Batch,
    Task,
    add_quadratic_penalty,
    continual,
    evaluate,
    evaluation,
    fisher_diagonal,
    init_consolidation,
    learn_jointly,
    learn_tasks,
    methods,
    permuted_tasks,
    present,
    training,
)
from lifelong_jax.models import MLP
from lifelong_jax.resuming import KeptTasks

NUM_TASKS, NUM_EPOCHS = 3, 2
SGD = optax.sgd(0.1, momentum=0.9)


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), SGD)


def make_tasks(num_train=20, num_test=9):
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (num_train + num_test, 6))
    labels = jnp.argmax(inputs @ jax.random.normal(keys[1], (6, 3)), axis=-1)
    batches = (
        Batch(inputs[part], labels[part], jnp.ones(labels[part].shape))
        for part in (slice(num_train), slice(num_train, None))
    )
    return permuted_tasks(*batches, NUM_TASKS, keys[2])


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def make_params():
    keys = jax.random.split(jax.random.key(1))
    return {"w1": jax.random.normal(keys[0], (6, 8)), "w2": jax.random.normal(keys[1], (8, 3))}


learn = functools.partial(
    learn_tasks, apply_fn=apply_fn, optimizer_fn=optimizer_fn, num_epochs=NUM_EPOCHS, batch_size=20
)


@pytest.mark.parametrize("rule", ["separate", "latest"])
def test_equals_stored_penalties_and_full_batches_written_out(rule):
    # A batch of everything leaves no shuffling: each task is two steps of momentum on loss + penalty.
    strength, decay = 3.0, 0.9 if rule == "latest" else 1.0
    tasks, params = make_tasks(), make_params()
    stored = []  # of (importance, anchor)
    for task in tasks:

        def loss(params, task=task):
            shown = jax.vmap(present, (0, None))(task.train.inputs, task.permutation)
            logits = jax.vmap(apply_fn, (None, 0))(params, shown)
            cost = optax.losses.softmax_cross_entropy_with_integer_labels(logits, task.train.labels).mean()
            for importance, anchor in stored:
                terms = jax.tree.map(lambda o, p, a: jnp.sum(o * (p - a) ** 2), importance, params, anchor)
                cost += strength / 2 * sum(jax.tree.leaves(terms))
            return cost

        state = SGD.init(params)
        for _ in range(NUM_EPOCHS):
            updates, state = SGD.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, updates)
        shown = jax.vmap(present, (0, None))(task.train.inputs, task.permutation)
        fisher = fisher_diagonal(apply_fn, params, shown)
        if rule == "latest" and stored:
            fisher = jax.tree.map(lambda old, new: decay * old + new, stored.pop()[0], fisher)
        stored.append((fisher, params))

    method = methods.ewc(rule=rule, decay=decay)
    learned = learn(method, params=make_params(), tasks=tasks, key=jax.random.key(2), strength=strength)
    chex.assert_trees_all_close(learned.params, params, rtol=1e-4, atol=1e-6)


def test_a_strong_penalty_holds_and_none_lets_go():
    tasks, params = make_tasks(), make_params()
    after_one = learn(
        methods.ewc(), params=params, tasks=tasks[:1], key=jax.random.key(2), strength=0.0, num_epochs=10
    ).params

    def distance(strength):
        learned = learn(
            methods.l2(), params=params, tasks=tasks, key=jax.random.key(2), strength=strength, num_epochs=10
        )
        return optax.tree.norm(optax.tree.sub(learned.params, after_one))

    assert distance(5.0) < 0.5 * distance(0.0)


def test_accuracy_matrix():
    tasks = make_tasks()
    rows = {}

    def report(progress):
        rows[progress.task] = progress.accuracies

    again = functools.partial(
        learn, methods.finetune(), params=make_params(), tasks=tasks, key=jax.random.key(2), strength=0.0
    )
    learned = again(report=report)
    assert learned.accuracy_matrix.shape == (NUM_TASKS, NUM_TASKS)
    np.testing.assert_allclose(learned.accuracy_matrix[-1], evaluate(apply_fn, learned.params, tasks))
    for index, accuracies in rows.items():
        np.testing.assert_allclose(learned.accuracy_matrix[index, : index + 1], accuracies)
    assert np.isfinite(learned.accuracy_matrix).all()

    so_far = again(forward_transfer=False)
    seen = np.tri(NUM_TASKS, dtype=bool)
    np.testing.assert_array_equal(so_far.accuracy_matrix, np.where(seen, learned.accuracy_matrix, np.nan))
    assert np.isnan(so_far.initial_accuracies).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, int])
def test_accuracies_are_exact_whatever_the_dtype_of_the_weights(dtype):
    num_examples, num_wrong = 70_000, 7
    labels = (jnp.arange(num_examples) < num_wrong).astype(int)
    test = Batch(jnp.ones((num_examples, 1)), labels, jnp.ones(num_examples, dtype))
    (accuracy,) = evaluate(lambda params, x: x * jnp.array([1.0, 0.0]), jnp.zeros(()), [Task(test, test)])
    np.testing.assert_allclose(accuracy, 1 - num_wrong / num_examples, rtol=1e-6)


@pytest.mark.parametrize("outputs", [lambda x: x[None], lambda x: x.sum(), lambda x: (x, x)])
def test_evaluate_refuses_what_are_not_one_examples_logits(outputs):
    test = Batch(jnp.ones((4, 3)), jnp.zeros(4, int), jnp.ones(4))
    with pytest.raises(ValueError, match=r"apply_fn must return \[num_classes\] for one example"):
        evaluate(lambda params, x: outputs(params * x), jnp.array(1.0), [Task(test, test)])


def test_evaluate_refuses_a_test_set_without_weight():
    test = Batch(jnp.ones((4, 3)), jnp.zeros(4, int), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"tasks\[1\]\.test\.weights must be finite, not negative and not all 0"):
        evaluate(
            lambda params, x: x,
            jnp.array(1.0),
            [Task(test._replace(weights=jnp.ones(4)), test._replace(weights=jnp.ones(4))), Task(test, test)],
        )


def test_evaluate_counts_by_weight():
    inputs = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    test = Batch(inputs, jnp.array([0, 0, 0]), jnp.array([1.0, 1.0, 0.0]))
    assert evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(test, test)]) == [0.5]
    # By the permutation the features change places.
    assert evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(test, test, jnp.array([1, 0]))]) == [0.5]
    only_first = test._replace(weights=jnp.array([1.0, 0.0, 0.0]))
    swapped = Task(test, only_first, jnp.array([1, 0]))
    assert evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(test, only_first), swapped]) == [1.0, 0.0]


@pytest.mark.parametrize("at_once", [1, 2, 4, 5, 9])  # of 9 examples: parts of 1, 2, 3, 5, 9
def test_large_test_sets_are_evaluated_in_parts(monkeypatch, at_once):
    rng = np.random.default_rng(0)
    inputs, weights = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32), jnp.array([1.0, 0, 2, 3, 1, 1, 4, 2, 0])
    labels = jnp.argmax(inputs[:, :3], axis=1).at[1:4].set(0)
    task = Task(*[Batch(inputs, labels, weights)] * 2, jnp.array([3, 0, 1, 2]))
    whole = evaluate(lambda params, x: params * x[1:], jnp.array(1.0), [task])  # of another function than `in_parts`
    monkeypatch.setattr(evaluation, "_MAX_EVALUATED", at_once)
    in_parts = evaluate(lambda params, x: params * x[1:], jnp.array(1.0), [task])
    correct = np.argmax(inputs[:, :3], axis=1) == np.asarray(labels)
    assert in_parts == whole == [pytest.approx(np.average(correct, weights=weights))]
    assert 0 < whole[0] < 1


def test_all_right_is_1_in_bfloat16_too():
    inputs = jnp.ones((1035, 2))  # two parts, of 518
    test = Batch(inputs, jnp.zeros(1035, int), jnp.ones(1035, jnp.bfloat16))
    assert evaluate(lambda params, x: params * x, jnp.array([1.0, 0.0]), [Task(test, test)]) == [1.0]


def test_an_empty_test_set_is_refused():
    empty = Batch(jnp.ones((0, 2)), jnp.zeros(0, int), jnp.ones(0))
    with pytest.raises(ValueError, match="test is empty"):
        evaluate(lambda params, x: params * x, jnp.array(1.0), [Task(empty, empty)])


def test_progress_is_reported_after_every_epoch():
    reports = []
    learn(
        methods.ewc(),
        params=make_params(),
        tasks=make_tasks(),
        key=jax.random.key(2),
        strength=1.0,
        report=reports.append,
    )
    assert [report.task for report in reports] == [0, 0, 1, 1, 2, 2]
    assert [report.epochs for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [len(report.accuracies) for report in reports] == [1, 1, 2, 2, 3, 3]


def test_the_loss_of_many_bfloat16_steps():
    batch = Batch(jnp.ones((300, 2), jnp.bfloat16), jnp.arange(300) % 2, jnp.ones(300))
    losses = []
    learn_tasks(
        methods.finetune(),
        lambda params, x: x @ params,
        lambda strength: optax.sgd(0.0),
        jnp.zeros((2, 2), jnp.bfloat16),
        [Task(batch, batch)],
        jax.random.key(0),
        strength=0.0,
        num_epochs=1,
        batch_size=1,
        report=lambda progress: losses.append(progress.loss),
    )
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-2)


def test_one_trace_serves_all_tasks_strengths_and_methods():
    traces = {"training": 0}

    def counted_optimizer_fn(strength):
        if isinstance(strength, jax.core.Tracer):
            traces["training"] += 1
        return optimizer_fn(strength)

    for method in (methods.finetune(), methods.l2(), methods.ewc(), methods.mas()):
        for strength in (0.0, 1.0):
            learn(
                method,
                optimizer_fn=counted_optimizer_fn,
                params=make_params(),
                tasks=make_tasks(),
                key=jax.random.key(2),
                strength=strength,
            )
    assert traces["training"] == 1


def test_one_trace_of_the_importance_serves_all_tasks():
    traces = 0
    exact = methods.ewc().importance_fn

    def counted(logits_fn, params, batch, key):
        nonlocal traces
        traces += 1
        return exact(logits_fn, params, batch, key)

    method = methods.ewc()._replace(importance_fn=counted)
    learn(method, params=make_params(), tasks=make_tasks(), key=jax.random.key(2), strength=1.0)
    assert traces == 1


def test_the_trainer_sees_the_current_task_alone(monkeypatch):
    # The arrays that reach the training loop, by their first label, which tells the tasks apart.
    tasks = [
        task._replace(train=task.train._replace(weights=jnp.full(20, 1.0 + index)))
        for index, task in enumerate(make_tasks())
    ]
    seen = []

    def spy(loss_fn, optimizer, state, consolidation, examples, *, weights, **settings):
        jax.debug.callback(lambda weights: seen.append(float(weights[0])), examples.weights, ordered=True)
        return training.learn_task(loss_fn, optimizer, state, consolidation, examples, weights=weights, **settings)

    monkeypatch.setattr(continual, "learn_task", spy)
    fresh = functools.partial(optimizer_fn)  # another object, so that nothing compiled before is used
    learn(methods.ewc(), optimizer_fn=fresh, params=make_params(), tasks=tasks, key=jax.random.key(2), strength=1.0)
    jax.effects_barrier()
    assert seen == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def test_joint_learning_of_one_task_is_learning_that_task():
    tasks = make_tasks()[:1]
    joint = learn_jointly(apply_fn, optimizer_fn, make_params(), tasks, jax.random.key(2), num_epochs=20, batch_size=20)
    alone = learn(
        methods.finetune(), params=make_params(), tasks=tasks, key=jax.random.key(2), strength=0.0, num_epochs=20
    )
    chex.assert_trees_all_close(joint.params, alone.params, rtol=1e-3, atol=1e-5)


def test_joint_learning_leaves_its_arguments_alone():
    arguments = make_params(), make_tasks(), jax.random.key(2)
    first, again = (learn_jointly(apply_fn, optimizer_fn, *arguments, num_epochs=2, batch_size=20) for _ in range(2))
    chex.assert_trees_all_equal(first.params, again.params)


def test_joint_learning_measures_the_last_row_alone():
    reports = []
    joint = learn_jointly(
        apply_fn,
        optimizer_fn,
        make_params(),
        make_tasks(),
        jax.random.key(2),
        num_epochs=2,
        batch_size=20,
        report=reports.append,
    )
    assert np.isnan(joint.accuracy_matrix[:-1]).all()
    np.testing.assert_allclose(joint.accuracy_matrix[-1], reports[-1].accuracies)
    assert [(report.task, report.epochs) for report in reports] == [(None, 3), (None, 6)]


def test_same_key_same_numbers():
    first, second = (
        learn(
            methods.mas(), params=make_params(), tasks=make_tasks(), key=jax.random.key(3), strength=1.0, batch_size=3
        )
        for _ in range(2)
    )
    chex.assert_trees_all_equal(first.params, second.params)


@pytest.mark.usefixtures("standard_promotion")
def test_with_a_flax_model():
    model = MLP((8,), 3)
    tasks = make_tasks()
    params = model.init(jax.random.key(0), tasks[0].train.inputs[0])
    learned = learn(
        methods.ewc(), apply_fn=model.apply, params=params, tasks=tasks, key=jax.random.key(1), strength=1.0
    )
    chex.assert_trees_all_equal_structs(learned.consolidation.importance, params)


def test_bad_input():
    arguments = {"params": make_params(), "tasks": make_tasks(), "key": jax.random.key(2), "strength": 1.0}
    with pytest.raises(ValueError, match="tasks is empty"):
        learn(methods.ewc(), **{**arguments, "tasks": []})
    with pytest.raises(ValueError, match="strength must be finite and not negative, not -1"):
        learn(methods.ewc(), **{**arguments, "strength": -1.0})
    with pytest.raises(ValueError, match=r"method.rule must be one of separate, latest"):
        learn(methods.ewc(rule="newest"), **arguments)
    with pytest.raises(ValueError, match=r"method.decay must be finite and not negative"):
        learn(methods.ewc(decay=-1.0), **arguments)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        learn(methods.ewc(), **arguments, batch_size=0)
    tasks = make_tasks()
    with pytest.raises(ValueError, match=r"tasks\[1\].test.inputs has shape \(8, 6\)"):
        learn(methods.ewc(), **{**arguments, "tasks": [tasks[0], *make_tasks(num_test=8)[1:]]})
    mislabelled = [task._replace(train=task.train._replace(labels=task.train.labels + 5)) for task in tasks]
    with pytest.raises(ValueError, match=r"tasks\[0\].train.labels has labels from 5 to 7, but there are 3 classes"):
        learn(methods.ewc(), **{**arguments, "tasks": mislabelled})
    with pytest.raises(ValueError, match=r"tasks\[0\].permutation has shape \(5,\), but an input has 6 features"):
        learn(methods.ewc(), **{**arguments, "tasks": [tasks[0]._replace(permutation=jnp.arange(5))]})
    for wrong in ([0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [-1, 0, 1, 2, 3, 4]):
        no_permutation = [tasks[0], tasks[1]._replace(permutation=jnp.array(wrong))]
        with pytest.raises(ValueError, match=r"tasks\[1\].permutation must hold each of 0 to 5 once"):
            learn(methods.ewc(), **{**arguments, "tasks": no_permutation})
    with pytest.raises(TypeError, match=r"tasks\[0\].permutation has dtype float32"):
        learn(methods.ewc(), **{**arguments, "tasks": [tasks[0]._replace(permutation=jnp.arange(6.0))]})
    for wrong in (jnp.ones(2), jnp.ones(1), [1.0], "1", None):
        with pytest.raises(ValueError, match="strength must be a number, not "):
            learn(methods.ewc(), **{**arguments, "strength": wrong})
    for wrong, shape in (
        (lambda params, x: apply_fn(params, x).sum(), r"\(\)"),
        (lambda params, x: apply_fn(params, x)[None], r"\(1, 3\)"),
        (lambda params, x: (apply_fn(params, x), x), r"\(\(3,\), \(6,\)\)"),
    ):
        with pytest.raises(ValueError, match=rf"apply_fn must return \[num_classes\] .*, not .* shape {shape}"):
            learn(methods.ewc(), **arguments, apply_fn=wrong)
    with pytest.raises(ValueError, match="num_epochs must be an integer of at least 1"):
        learn(methods.ewc(), **arguments, num_epochs=0)
    with pytest.raises(FloatingPointError, match=r"training diverged in epoch \d at strength 1e\+20"):
        learn(methods.l2(), **{**arguments, "strength": 1e20}, num_epochs=4)
    diverging = {"params": jax.tree.map(lambda leaf: leaf * jnp.inf, make_params()), "tasks": make_tasks()}
    with pytest.raises(FloatingPointError, match="training diverged in epoch 1: lower the learning rate"):
        learn_jointly(apply_fn, optimizer_fn, **diverging, key=jax.random.key(2), num_epochs=2, batch_size=20)


def test_kept_tasks_of_another_number_of_epochs():
    params = make_params()
    kept = KeptTasks([init_consolidation(params)], methods.ewc(), NUM_EPOCHS + 1)
    with pytest.raises(ValueError, match="num_epochs is 3 for KeptTasks, but 2 for the sequence"):
        learn(
            methods.ewc(),
            params=params,
            tasks=make_tasks(),
            key=jax.random.key(2),
            strength=1.0,
            checkpoints=kept,
        )
