"""The whole sequence: against the same steps written out, from any state on, and what must not happen on the way."""

import copy
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
    _epochs,
    consolidate,
    evaluate,
    fisher_diagonal,
    init_consolidation,
    init_sequence,
    learn_jointly,
    learn_tasks,
    methods,
    training,
)
from lifelong_jax.continual import go_on_after
from lifelong_jax.models import MLP
from lifelong_jax.tasks import permute_features
from tests.problems import RECIPE, SGD, apply_fn, coupled_sgd, make_params, make_tasks, without_times

KEY = jax.random.key(2)
TASKS = make_tasks()
NUM_TASKS, NUM_EPOCHS = len(TASKS), RECIPE.num_epochs
MINIBATCHES = RECIPE._replace(batch_size=7)


def learn(method, recipe=RECIPE, *, params=None, tasks=TASKS, strength=1.0, **options):
    params = make_params() if params is None else params
    return learn_tasks(method, recipe, params, tasks, KEY, strength=strength, **options)


def joint(recipe=MINIBATCHES, *, params=None, tasks=TASKS, **options):
    params = make_params() if params is None else params
    return learn_jointly(recipe, params, tasks, KEY, **options)


@jax.jit
def written_out_step(params, opt_state, task, stored, strength):
    """A step of momentum on the loss of a whole task plus a penalty for each of `stored`, (importance, anchor)."""

    def loss(params):
        inputs = jax.vmap(permute_features, (0, None))(task.train.inputs, task.permutation)
        logits = jax.vmap(apply_fn, (None, 0))(params, inputs)
        cost = optax.losses.softmax_cross_entropy_with_integer_labels(logits, task.train.labels).mean()
        for importance, anchor in stored:
            terms = jax.tree.map(lambda o, p, a: jnp.sum(o * (p - a) ** 2), importance, params, anchor)
            cost += strength / 2 * sum(jax.tree.leaves(terms))
        return cost

    updates, opt_state = SGD.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


@jax.jit
def written_out_fisher(params, task):
    return fisher_diagonal(apply_fn, params, jax.vmap(permute_features, (0, None))(task.train.inputs, task.permutation))


@pytest.mark.parametrize("rule", ["separate", "latest"])
def test_equals_stored_penalties_and_full_batches_written_out(rule):
    # A batch of everything leaves no shuffling: each task is two steps of momentum on loss + penalty.
    strength, decay = 3.0, 0.9 if rule == "latest" else 1.0
    params = make_params()
    nothing = jax.tree.map(jnp.zeros_like, params)
    stored = []  # of (importance, anchor)
    for task in TASKS:
        state = SGD.init(params)
        for _ in range(NUM_EPOCHS):
            penalties = stored + [(nothing, nothing)] * (NUM_TASKS - len(stored))  # always as many: one compilation
            params, state = written_out_step(params, state, task, penalties, strength)
        fisher = written_out_fisher(params, task)
        if rule == "latest" and stored:
            fisher = jax.tree.map(lambda old, new: decay * old + new, stored.pop()[0], fisher)
        stored.append((fisher, params))

    learned = learn(methods.ewc(rule=rule, decay=decay), strength=strength)
    chex.assert_trees_all_close(learned.params, params, rtol=1e-4, atol=1e-6)


def test_what_a_method_carries_over_goes_from_task_to_task():
    params = make_params()
    state = SGD.init(params)
    nothing = jax.tree.map(jnp.zeros_like, params)
    for task in TASKS:
        for _ in range(NUM_EPOCHS):
            params, state = written_out_step(params, state, task, [(nothing, nothing)] * NUM_TASKS, 0.0)
    method = methods.finetune()
    carrying = method._replace(carry=lambda fresh, previous: previous)  # here, the momentum
    chex.assert_trees_all_close(learn(carrying).params, params, rtol=1e-4, atol=1e-6)
    assert optax.tree.norm(optax.tree.sub(learn(method).params, params)) > 1e-2


def test_a_strong_penalty_holds_and_none_lets_go():
    recipe = RECIPE._replace(num_epochs=10)
    after_one = learn(methods.ewc(), recipe, tasks=TASKS[:1], strength=0.0).params

    def distance(strength):
        learned = learn(methods.l2(), recipe, strength=strength)
        return optax.tree.norm(optax.tree.sub(learned.params, after_one))

    assert distance(5.0) < 0.5 * distance(0.0)


def test_accuracy_matrix():
    rows = {}

    def callback(state, progress):
        rows[progress.task] = progress.accuracies

    learned = learn(methods.finetune(), callback=callback)
    assert learned.accuracy_matrix.shape == (NUM_TASKS, NUM_TASKS)
    np.testing.assert_allclose(learned.accuracy_matrix[-1], evaluate(apply_fn, learned.params, TASKS))
    for index, accuracies in rows.items():
        np.testing.assert_allclose(learned.accuracy_matrix[index, : index + 1], accuracies)
    assert np.isfinite(learned.accuracy_matrix).all()

    so_far = learn(methods.finetune(), forward_transfer=False)
    seen = np.tri(NUM_TASKS, dtype=bool)
    np.testing.assert_array_equal(so_far.accuracy_matrix, np.where(seen, learned.accuracy_matrix, np.nan))
    assert np.isnan(so_far.initial_accuracies).all()


def test_the_loss_of_many_bfloat16_steps():
    batch = Batch(jnp.ones((300, 2), jnp.bfloat16), jnp.arange(300) % 2, jnp.ones(300))
    losses = []
    recipe = RECIPE._replace(
        apply_fn=lambda params, x: x @ params, optimizer_fn=lambda strength: optax.sgd(0.0), num_epochs=1, batch_size=1
    )
    learn(
        methods.finetune(),
        recipe,
        params=jnp.zeros((2, 2), jnp.bfloat16),
        tasks=[Task(batch, batch)],
        strength=0.0,
        callback=lambda state, progress: losses.append(progress.loss),
    )
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-2)


def test_one_trace_serves_all_tasks_strengths_and_methods():
    traces = 0

    def counted_optimizer_fn(strength):
        nonlocal traces
        traces += isinstance(strength, jax.core.Tracer)
        return coupled_sgd(strength)

    for method in (methods.finetune(), methods.l2(), methods.ewc(), methods.mas()):
        for strength in (0.0, 1.0):
            learn(method, RECIPE._replace(optimizer_fn=counted_optimizer_fn), strength=strength)
    assert traces == 2  # of the trial of the penalty, and of training


def test_one_trace_of_the_importance_serves_all_tasks():
    traces = 0
    exact = methods.ewc().importance_fn

    def counted(*arguments):
        nonlocal traces
        traces += 1
        return exact(*arguments)

    learn(methods.ewc()._replace(importance_fn=counted))
    assert traces == 1


def test_the_trainer_sees_the_current_task_alone(monkeypatch):
    # The arrays that reach the training loop, by their first weight, which tells the tasks apart.
    tasks = [
        task._replace(train=task.train._replace(weights=jnp.full(20, 1.0 + index))) for index, task in enumerate(TASKS)
    ]
    seen = []

    def spy(loss_fn, optimizer, state, consolidation, examples, weights, **settings):
        jax.debug.callback(lambda weights: seen.append(float(weights[0])), examples.weights, ordered=True)
        return training._learn_split_batches(loss_fn, optimizer, state, consolidation, examples, weights, **settings)

    monkeypatch.setattr(_epochs, "_learn_split_batches", spy)
    fresh = functools.partial(coupled_sgd)  # another object, so that nothing compiled before is used
    learn(methods.ewc(), RECIPE._replace(optimizer_fn=fresh), tasks=tasks)
    jax.effects_barrier()
    assert seen == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def test_joint_learning_of_one_task_is_learning_that_task():
    recipe = RECIPE._replace(num_epochs=20)
    together = joint(recipe, tasks=TASKS[:1])
    alone = learn(methods.finetune(), recipe, tasks=TASKS[:1], strength=0.0)
    chex.assert_trees_all_close(together.params, alone.params, rtol=1e-3, atol=1e-5)


def test_joint_learning_leaves_its_arguments_alone():
    params = make_params()
    first, again = (learn_jointly(MINIBATCHES, params, TASKS, KEY) for _ in range(2))
    chex.assert_trees_all_equal(first.params, again.params)


def test_joint_learning_measures_the_last_row_alone():
    reports = []
    learned = joint(callback=lambda state, progress: reports.append(progress))
    assert np.isnan(learned.accuracy_matrix[:-1]).all()
    np.testing.assert_allclose(learned.accuracy_matrix[-1], reports[-1].accuracies)
    assert [(report.task, report.epochs) for report in reports] == [(None, 3), (None, 6)]
    assert all(report.learned is None for report in reports)


def test_same_key_same_numbers():
    first, second = (learn(methods.mas(), MINIBATCHES) for _ in range(2))
    chex.assert_trees_all_equal(first.params, second.params)


@pytest.mark.usefixtures("standard_promotion")
def test_with_a_flax_model():
    model = MLP((8,), 3)
    params = jax.jit(model.init)(jax.random.key(0), TASKS[0].train.inputs[0])
    learned = learn(methods.ewc(), RECIPE._replace(apply_fn=model.apply), params=params)
    chex.assert_trees_all_equal_structs(learned.consolidation.importance, params)


# ------------------------------------------------------------------------------------ the callback and the start


LEARNERS = {
    "ewc": functools.partial(learn, methods.ewc("sampled"), MINIBATCHES),  # sampled, so that the importance has a key
    "rwalk": functools.partial(learn, methods.rwalk(interval=2), MINIBATCHES),  # carries its state from task to task
    "joint": joint,
}


@functools.cache
def learn_whole(learner):
    """A sequence that was never stopped: its last state, and after each epoch a copy of the state, and the progress."""
    epochs = []
    state = LEARNERS[learner](callback=lambda state, progress: epochs.append((copy.deepcopy(state), progress)))
    return state, epochs


def test_the_callback_is_called_after_every_epoch():
    _, epochs = learn_whole("ewc")
    assert [progress.task for _, progress in epochs] == [0, 0, 1, 1, 2, 2]
    assert [progress.epochs for _, progress in epochs] == [state.epochs for state, _ in epochs] == [1, 2, 3, 4, 5, 6]
    assert [len(progress.accuracies) for _, progress in epochs] == [1, 1, 2, 2, 3, 3]
    assert [progress.learned is None for _, progress in epochs] == [True, False] * NUM_TASKS


def test_the_callback_gets_the_state_after_the_epoch():
    learned, epochs = learn_whole("ewc")
    chex.assert_trees_all_equal(epochs[-1][0], learned)
    for state, progress in epochs:
        assert progress.accuracies == evaluate(apply_fn, state.params, TASKS[: progress.task + 1])
        measured = np.isfinite(state.accuracy_matrix).all(axis=1)
        np.testing.assert_array_equal(measured, np.arange(NUM_TASKS) < state.epochs // NUM_EPOCHS)
    seconds = [(state.training_seconds, state.importance_seconds) for state, _ in epochs]
    assert seconds == sorted(seconds) and seconds[0][0] > 0 and seconds[0][1] == 0 < seconds[1][1]


def test_the_callback_gets_each_task_s_own_parameters_and_importance():
    learned, epochs = learn_whole("ewc")
    tasks = [progress.learned for _, progress in epochs if progress.learned is not None]
    chex.assert_trees_all_equal(tasks[-1].anchor, learned.params)
    consolidation = init_consolidation(make_params())
    for task, (state, _) in zip(tasks, epochs[1::2], strict=True):
        consolidation = consolidate(consolidation, *task)
        chex.assert_trees_all_equal(state.consolidation, consolidation)
    chex.assert_trees_all_equal(consolidation, learned.consolidation)


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_sequence_goes_on_to_the_same_numbers_from_any_state(learner):
    learned, epochs = learn_whole(learner)
    for number, (state, _) in enumerate(epochs):  # in the middle of a task, between tasks and at the end
        rest = []
        start = copy.deepcopy(state)  # its arrays are freed
        again = LEARNERS[learner](start=start, callback=lambda state, progress, rest=rest: rest.append(progress))
        np.testing.assert_array_equal(start.accuracy_matrix, state.accuracy_matrix)
        chex.assert_trees_all_equal(without_times(again), without_times(learned))
        expected = [progress for _, progress in epochs[number + 1 :]]
        assert [progress._replace(learned=None) for progress in rest] == [
            progress._replace(learned=None) for progress in expected
        ]
        chex.assert_trees_all_equal([p.learned for p in rest], [p.learned for p in expected])


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_first_state_is_where_a_sequence_starts(learner):
    method, strength = {
        "ewc": (methods.ewc("sampled"), 1.0),
        "rwalk": (methods.rwalk(interval=2), 1.0),
        "joint": (None, 0.0),
    }[learner]
    learned, _ = learn_whole(learner)
    start = init_sequence(method, MINIBATCHES, make_params(), TASKS, KEY, strength=strength)
    assert np.isnan(start.initial_accuracies).all() == (learner == "joint")
    chex.assert_trees_all_equal(without_times(LEARNERS[learner](start=start)), without_times(learned))


def start_of(method, tasks=TASKS, **options):
    return init_sequence(method, MINIBATCHES, make_params(), tasks, KEY, strength=1.0, **options)


def test_a_sequence_goes_on_after_tasks_that_were_learned_before():
    learned, epochs = learn_whole("ewc")
    before = [progress.learned for _, progress in epochs if progress.learned is not None][:-1]
    ewc = methods.ewc("sampled")
    states = []
    again = LEARNERS["ewc"](
        start=go_on_after(before, ewc, MINIBATCHES, start_of(ewc)),
        callback=lambda state, progress: states.append(copy.deepcopy(state)),
    )
    assert [state.epochs for state in states] == [5, 6]
    chex.assert_trees_all_equal(again.params, learned.params)
    chex.assert_trees_all_equal(again.consolidation, learned.consolidation)
    np.testing.assert_array_equal(again.accuracy_matrix[-1], learned.accuracy_matrix[-1])
    np.testing.assert_array_equal(again.initial_accuracies, learned.initial_accuracies)
    assert np.isnan(again.accuracy_matrix[:-1]).all()

    # And so does what was stopped after it went on.
    chex.assert_trees_all_equal(without_times(LEARNERS["ewc"](start=states[0])), without_times(again))

    online = methods.ewc(rule="latest", decay=0.5)  # consolidates what was learned by another rule
    other = LEARNERS["ewc"](start=go_on_after(before, online, MINIBATCHES, start_of(ewc)))
    assert optax.tree.norm(optax.tree.sub(other.params, learned.params)) > 1e-4


def test_what_a_sequence_cannot_go_on_after():
    before = [init_consolidation(make_params())]
    with pytest.raises(ValueError, match="learned is empty: to begin with the first task, call learn_tasks without"):
        go_on_after([], methods.ewc(), RECIPE, start_of(methods.ewc()))
    with pytest.raises(ValueError, match="rwalk carries over an optimiser state from task to task, which is not in"):
        go_on_after(before, methods.rwalk(), RECIPE, start_of(methods.rwalk()))


@pytest.mark.parametrize("learner", [functools.partial(learn, methods.ewc()), joint])
def test_a_state_of_another_sequence(learner):
    start = start_of(methods.ewc())
    for other, message in (
        (start_of(methods.ewc(), TASKS[:2]), "a state after 0 epochs of 2 tasks, but there are 3 tasks of 2 epochs"),
        (start._replace(epochs=9), "a state after 9 epochs of 3 tasks, but there are 3 tasks of 2 epochs"),
        (
            start._replace(training=start.training._replace(params=make_params(4))),
            r"start\.params\['w2'\] has shape \(8, 4\), but params\['w2'\] has \(8, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            learner(MINIBATCHES, start=other)


# ------------------------------------------------------------------------------------ bad input


def test_bad_input():
    with pytest.raises(ValueError, match="tasks is empty"):
        learn(methods.ewc(), tasks=[])
    with pytest.raises(ValueError, match="strength must be finite and not negative, not -1"):
        learn(methods.ewc(), strength=-1.0)
    with pytest.raises(ValueError, match="strength must be finite and not negative, not -1000"):
        learn(methods.ewc(), strength=-(10**30))  # beyond 64 bits
    for wrong in (jnp.ones(2), jnp.ones(1), [1.0], "1", None):
        with pytest.raises(ValueError, match="strength must be a number, not "):
            learn(methods.ewc(), strength=wrong)
    with pytest.raises(ValueError, match=r"method.rule must be one of separate, latest"):
        learn(methods.ewc(rule="newest"))
    with pytest.raises(ValueError, match=r"method.decay must be finite and not negative"):
        learn(methods.ewc(decay=-1.0))
    for learner in (functools.partial(learn, methods.ewc()), joint):
        for recipe in (tuple(RECIPE), apply_fn):
            with pytest.raises(TypeError, match=r"recipe is a (tuple|function): pass a Recipe\(apply_fn, optimizer_fn"):
                learner(recipe)
        for setting in ("batch_size", "num_epochs"):
            with pytest.raises(ValueError, match=rf"recipe\.{setting} must be an integer of at least 1"):
                learner(RECIPE._replace(**{setting: 0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ewc"}, r"method is a str: pass one from methods, such as methods\.ewc\(\)"),
        ({"method": methods.ewc}, "method is a function: pass one from methods"),
        ({"method": RECIPE, "recipe": methods.ewc()}, "method is a Recipe: pass one from methods"),
        ({"tasks": make_params()}, r"tasks is a dict: pass a list of Task\(train, test\)"),
        ({"tasks": KEY, "key": TASKS}, "tasks is a PRNGKeyArray: pass a list"),
        (
            {"recipe": RECIPE._replace(optimizer_fn=optax.sgd(0.1))},
            r"optimizer_fn is not a function: pass lambda stren",
        ),
        (
            {"recipe": RECIPE._replace(optimizer_fn=lambda strength: None)},
            "recipe.optimizer_fn must return an optax optimiser, not a NoneType",
        ),
        ({"key": 0}, r"key must be one random key, such as jax\.random\.key\(0\), not 0"),
        ({"key": None}, "key must be one random key, .*, not None"),
        ({"key": jax.random.split(KEY, 3)}, "key must be one random key"),
        ({"key": make_params(), "params": KEY}, "params has dtype key"),
    ],
)
@pytest.mark.parametrize("function", [learn_tasks, init_sequence])
def test_arguments_of_another_type_or_in_another_order_are_named(function, arguments, message):
    usual = {"method": methods.ewc(), "recipe": RECIPE, "params": make_params(), "tasks": TASKS, "key": KEY}
    with pytest.raises(TypeError, match=message):
        function(**usual | arguments, strength=1.0)


def test_a_start_of_another_type_is_named():
    with pytest.raises(TypeError, match="start is a int: pass a state that a callback got, or init_sequence made"):
        learn(methods.ewc(), start=3)


def test_keys_of_the_older_kind_are_taken():
    assert init_sequence(None, RECIPE, make_params(), TASKS, jax.random.PRNGKey(0)).epochs == 0


def test_tasks_that_do_not_fit():
    first, second, _ = TASKS
    mislabelled = [task._replace(train=task.train._replace(labels=task.train.labels + 5)) for task in TASKS]
    with pytest.raises(ValueError, match=r"tasks\[0\].train.labels has labels from 5 to 7, but there are 3 classes"):
        learn(methods.ewc(), tasks=mislabelled)
    with pytest.raises(ValueError, match=r"tasks\[0\].permutation has shape \(5,\), but an input has 6 features"):
        learn(methods.ewc(), tasks=[first._replace(permutation=jnp.arange(5))])
    for wrong in ([0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [-1, 0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"tasks\[1\].permutation must hold each of 0 to 5 once"):
            learn(methods.ewc(), tasks=[first, second._replace(permutation=jnp.array(wrong))])
    with pytest.raises(TypeError, match=r"tasks\[0\].permutation has dtype float32"):
        learn(methods.ewc(), tasks=[first._replace(permutation=jnp.arange(6.0))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda params, x: apply_fn(params, x).sum(), r"apply_fn must return \[num_classes\] .*, not .* shape \(\)"),
        (lambda params, x: apply_fn(params, x)[None], r"apply_fn returns \(1, 3\): .* it must return \[num_classes\]"),
        (lambda params, x: (apply_fn(params, x), x), r"apply_fn must return .*, not .* shape \(\(3,\), \(6,\)\)"),
    ],
)
def test_a_network_returns_one_example_s_logits(wrong, message):
    with pytest.raises(ValueError, match=message):
        learn(methods.ewc(), RECIPE._replace(apply_fn=wrong))


def test_training_that_diverges():
    with pytest.raises(
        FloatingPointError, match=r"training diverged in epoch \d at strength 1e\+20: .*unless the penalty is"
    ):
        learn(methods.l2(), RECIPE._replace(num_epochs=4), strength=1e20)
    infinite = jax.tree.map(lambda leaf: leaf * jnp.inf, make_params())
    for learner in (joint, functools.partial(learn, methods.ewc())):  # in its first task, the penalty is 0
        with pytest.raises(FloatingPointError, match=r"training diverged in epoch 1: lower the learning rate$"):
            learner(RECIPE, params=infinite)
