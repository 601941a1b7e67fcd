"""Losses, Fishers and scores of the objectives, in closed form; padded tokens; labels that do not fit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Batch,
    Recipe,
    SweepRun,
    Task,
    add_quadratic_penalty,
    empirical_fisher_diagonal,
    empirical_kronecker_fisher,
    evaluate,
    forms,
    init_consolidation,
    init_training,
    kronecker_fisher,
    learn_jointly,
    learn_sweep,
    learn_task,
    learn_tasks,
    methods,
)
from lifelong_jax.losses import ExampleLoss, cross_entropy
from lifelong_jax.objectives import CLASSIFICATION, binary, classification, label_counts, loss_per_label, regression
from lifelong_jax.streaming import learn_stream

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LENGTHS = (2, 4, 1)
NUM_TOKENS = 5


def normal(*shape):
    return jax.device_put(RNG.normal(size=shape).astype(np.float32))


def tokens(lengths=LENGTHS, padded_to=4):
    """Sequences of tokens and their next tokens, padded with labels that are no classes."""
    rng = np.random.default_rng(1)
    inputs, labels = np.zeros((len(lengths), padded_to), np.int32), np.full((len(lengths), padded_to), -100, np.int32)
    weights = np.zeros((len(lengths), padded_to), np.float32)
    for row, length in enumerate(lengths):
        inputs[row, :length], labels[row, :length] = rng.integers(0, NUM_TOKENS, (2, length))
        weights[row, :length] = 1
    return Batch(*map(jnp.asarray, (inputs, labels)), label_weights=jnp.asarray(weights))


TOKENS = tokens()
TOKEN_PARAMS = {"table": normal(NUM_TOKENS, 3), "head": normal(3, NUM_TOKENS)}


def token_logits(params, x):
    """Each position sees the positions before it."""
    return jnp.cumsum(params["table"][x], axis=0) @ params["head"]


def without_padding(batch, row):
    length = int(batch.label_weights[row].sum())
    return Batch(batch.inputs[row : row + 1, :length], batch.labels[row : row + 1, :length])


def state_of(params):
    return init_training(optax.identity(), params, KEY)


# --- losses and scores in closed form ---------------------------------------------------------------------------------


def test_the_loss_of_tokens_is_the_mean_over_those_that_count():
    example = jax.tree.map(lambda leaf: leaf[0], TOKENS)
    logits = token_logits(TOKEN_PARAMS, example.inputs)
    expected = -jax.nn.log_softmax(logits)[jnp.arange(2), example.labels[:2]].mean()
    np.testing.assert_allclose(cross_entropy(token_logits)(TOKEN_PARAMS, example), expected, rtol=1e-6)
    nan = logits.at[2:].set(jnp.nan)
    np.testing.assert_allclose(loss_per_label(CLASSIFICATION, nan, example), expected, rtol=1e-6)
    assert jnp.isfinite(jax.grad(cross_entropy(token_logits))(TOKEN_PARAMS, example)["head"]).all()
    np.testing.assert_array_equal(label_counts(CLASSIFICATION, TOKENS), LENGTHS)
    np.testing.assert_array_equal(
        label_counts(CLASSIFICATION, TOKENS._replace(weights=jnp.array([1.0, 0, 2]))), [2, 0, 2]
    )


def test_scores_are_means_over_labels():
    tasks = [Task(TOKENS, TOKENS)]
    logits = [token_logits(TOKEN_PARAMS, without_padding(TOKENS, row).inputs[0]) for row in range(3)]
    labels = [without_padding(TOKENS, row).labels[0] for row in range(3)]
    correct = np.concatenate([np.argmax(a, axis=-1) == b for a, b in zip(logits, labels, strict=True)])
    losses = [optax.losses.softmax_cross_entropy_with_integer_labels(a, b) for a, b in zip(logits, labels, strict=True)]
    score = functools.partial(evaluate, token_logits, TOKEN_PARAMS, tasks)
    np.testing.assert_allclose(score(), [correct.mean()], rtol=1e-6)
    loss = classification("loss")
    assert (loss.score, loss.higher_is_better) == ("loss", False)
    np.testing.assert_allclose(score(objective=loss), [np.concatenate(losses).mean()], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_regression_in_closed_form(shape):
    outputs, labels = normal(*shape), normal(*shape)
    objective, example = regression(0.25), Batch(jnp.zeros(1), labels)
    np.testing.assert_allclose(objective.loss_fn(outputs, example), jnp.sum((labels - outputs) ** 2) * 2, rtol=1e-5)
    np.testing.assert_allclose(objective.score_fn(outputs, example), jnp.mean((labels - outputs) ** 2), rtol=1e-5)
    assert not objective.higher_is_better


@pytest.mark.parametrize("shape", [(), (4,)])
def test_binary_labels_in_closed_form(shape):
    outputs, labels = normal(*shape), jnp.asarray(RNG.integers(0, 2, shape))
    example = Batch(jnp.zeros(1), labels)
    p = jax.nn.sigmoid(outputs)
    expected = -jnp.sum(jnp.log(jnp.where(labels == 1, p, 1 - p)))
    np.testing.assert_allclose(binary().loss_fn(outputs, example), expected, rtol=1e-5)
    np.testing.assert_allclose(binary().score_fn(outputs, example), jnp.mean((p > 0.5) == (labels == 1)), rtol=1e-6)
    assert binary().score_fn(jnp.full(shape, jnp.nan), example._replace(labels=jnp.zeros(shape, int))) == 0


def test_label_weights_leave_out_targets():
    labels = jnp.array([1.0, jnp.nan, 3.0])
    example = Batch(jnp.zeros(1), labels, label_weights=jnp.array([1.0, 0, 0.5]))
    outputs = jnp.array([0.0, 7.0, 1.0])
    np.testing.assert_allclose(regression().loss_fn(outputs, example), 0.5 + 0.5 * 2, rtol=1e-6)
    np.testing.assert_allclose(regression().score_fn(outputs, example), (1 + 0.5 * 4) / 1.5, rtol=1e-6)
    assert jnp.isfinite(jax.grad(regression().loss_fn)(outputs, example)).all()


# --- importances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [CLASSIFICATION, regression(0.25), binary()], ids=["classes", "numbers", "binary"]
)
def test_losses_of_labels_are_the_terms_of_the_loss(objective):
    outputs = jnp.asarray(np.random.default_rng(3).normal(size=(4, NUM_TOKENS)), jnp.float32)
    example = jax.tree.map(lambda leaf: leaf[0], TOKENS)
    if objective is not CLASSIFICATION:
        labels = jnp.where(example.label_weights[:, None] > 0, jnp.ones((4, NUM_TOKENS)), jnp.nan)
        example = example._replace(labels=labels)
    losses = objective.losses_fn(outputs, example)
    assert losses.shape == example.labels.shape
    assert not losses[2:].any()  # padding
    one = example._replace(label_weights=jnp.zeros(4).at[1].set(1))
    np.testing.assert_allclose(losses[1].sum(), objective.loss_fn(outputs, one), rtol=1e-6)
    np.testing.assert_allclose(losses.sum(), objective.loss_fn(outputs, example), rtol=1e-6)


def test_the_empirical_importance_squares_the_gradient_of_each_label_by_itself():
    importance_fn = methods.ewc("empirical").importance_fn

    def importance(key):
        return importance_fn(token_logits, CLASSIFICATION, state_of(TOKEN_PARAMS), TOKENS, key)

    def losses_fn(params, example):
        return CLASSIFICATION.losses_fn(token_logits(params, example.inputs), example)

    @jax.jit
    def run(keys):
        mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.lax.map(importance, keys, batch_size=500))
        return mean, empirical_fisher_diagonal(losses_fn, TOKEN_PARAMS, TOKENS)

    mean, expected = run(jax.random.split(KEY, 2000))
    expected = jax.tree.map(lambda leaf: leaf * len(LENGTHS) / sum(LENGTHS), expected)  # a mean over labels
    chex.assert_trees_all_close(mean, expected, rtol=0.1, atol=0.02 * float(jnp.max(expected["head"])))


@pytest.mark.parametrize("method", [methods.ewc(), methods.mas()], ids=["exact", "mas"])
def test_padding_is_in_no_importance(method):
    def importance(batch):
        return method.importance_fn(token_logits, CLASSIFICATION, state_of(TOKEN_PARAMS), batch, KEY)

    with_padding = importance(TOKENS)
    # Each sequence alone, as long as it is; a mean over labels weighs it by its length.
    alone = [importance(without_padding(TOKENS, row)) for row in range(3)]
    expected = jax.tree.map(
        lambda *leaves: sum(n * x for n, x in zip(LENGTHS, leaves, strict=True)) / sum(LENGTHS), *alone
    )
    chex.assert_trees_all_close(with_padding, expected, rtol=1e-4, atol=1e-6)


def test_kronecker_factors_of_padded_tokens_are_refused():
    for method in (methods.kfac(), methods.kfac("empirical")):
        with pytest.raises(ValueError, match="kfac takes no label_weights"):
            method.importance_fn(token_logits, CLASSIFICATION, state_of(TOKEN_PARAMS), TOKENS, KEY)
    whole = without_padding(TOKENS, 1)
    exact = methods.kfac().importance_fn(token_logits, CLASSIFICATION, state_of(TOKEN_PARAMS), whole, KEY)
    factors = kronecker_fisher(token_logits, TOKEN_PARAMS, whole.inputs)
    diagonals = [forms.tree_map(forms.diagonal, tree) for tree in (exact, factors)]
    chex.assert_trees_all_close(diagonals[0], jax.tree.map(lambda x: x / 4, diagonals[1]), rtol=1e-5)  # of four labels


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_padding_is_in_no_sampled_importance(fisher):
    sampled = methods.ewc(fisher).importance_fn
    found = [
        sampled(token_logits, CLASSIFICATION, state_of(TOKEN_PARAMS), TOKENS._replace(inputs=inputs), KEY)
        for inputs in (TOKENS.inputs, jnp.where(TOKENS.label_weights > 0, TOKENS.inputs, 3))
    ]
    chex.assert_trees_all_close(*found, rtol=1e-6)


def test_a_label_s_weight_multiplies_its_gradient():
    params, x = normal(3, NUM_TOKENS), normal(1, 3)
    batch = Batch(x, jnp.zeros((1, 1), int), label_weights=jnp.full((1, 1), 0.5))
    measure = functools.partial(
        methods.ewc().importance_fn, lambda p, x: (x @ p)[None], CLASSIFICATION, state_of(params)
    )
    whole = measure(batch._replace(label_weights=None), KEY)
    np.testing.assert_allclose(measure(batch, KEY), whole * 0.25 / 0.5, rtol=1e-5)  # g² · w² for each of w labels


def linear(params, x):
    return x @ params


def test_each_objective_has_its_own_fisher():
    x, params = normal(6, 3), normal(3)
    exact = methods.ewc().importance_fn
    labels = jnp.asarray(RNG.integers(0, 2, 6))
    fisher = exact(linear, regression(0.5), state_of(params), Batch(x, normal(6)), KEY)
    np.testing.assert_allclose(fisher, jnp.mean(x**2, axis=0) / 0.5, rtol=1e-5)
    p = jax.nn.sigmoid(x @ params)
    fisher = exact(linear, binary(), state_of(params), Batch(x, labels), KEY)
    np.testing.assert_allclose(fisher, jnp.mean((p * (1 - p))[:, None] * x**2, axis=0), rtol=1e-5)
    empirical = methods.ewc("empirical").importance_fn(linear, binary(), state_of(params), Batch(x, labels), KEY)
    np.testing.assert_allclose(
        empirical, jnp.mean(((p - labels.astype(float)) ** 2)[:, None] * x**2, axis=0), rtol=1e-5
    )


# --- loops ------------------------------------------------------------------------------------------------------------


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1))


def make_tasks(objective):
    if objective.likelihood == "categorical":
        return [Task(TOKENS, TOKENS), Task(tokens((3, 3, 2)), TOKENS)]
    tasks = []
    for _ in range(2):
        x = normal(6, 3)
        labels = x @ jnp.ones((3, 2))
        labels = (labels > 0).astype(jnp.int32) if objective.likelihood == "bernoulli" else labels
        tasks.append(Task(Batch(x, labels), Batch(x[:4], labels[:4])))
    return tasks


@pytest.mark.parametrize("objective", [classification("loss"), regression(), binary()], ids=lambda o: o.likelihood)
def test_every_loop_takes_the_objective(objective):
    apply_fn, params = linear, jnp.zeros((3, 2))
    if objective.likelihood == "categorical":
        apply_fn, params = token_logits, TOKEN_PARAMS
    tasks = make_tasks(objective)
    recipe = Recipe(apply_fn, optimizer_fn, num_epochs=3, batch_size=2, objective=objective)
    learned = learn_tasks(methods.ewc(), recipe, params, tasks, KEY, strength=0.5)
    assert np.isfinite(learned.accuracy_matrix).all()
    better = learned.accuracy_matrix[0, 0] - learned.initial_accuracies[0]
    assert (better > 0) == objective.higher_is_better
    expected = evaluate(apply_fn, learned.params, tasks, objective=objective)
    np.testing.assert_allclose(learned.accuracy_matrix[-1], expected, rtol=1e-6)
    swept = learn_sweep(methods.ewc(), recipe, [SweepRun(params, tasks, KEY, 0.5)])
    np.testing.assert_allclose(swept.accuracy_matrix[0], learned.accuracy_matrix, rtol=1e-5)
    joint = learn_jointly(recipe, params, tasks, KEY)
    assert np.isfinite(joint.accuracy_matrix[-1]).all()


def test_a_task_of_tokens_is_learned_by_the_mean_over_tokens():
    task = Task(TOKENS, TOKENS)
    recipe = Recipe(token_logits, optimizer_fn, num_epochs=1, batch_size=3)
    learned = learn_tasks(methods.finetune(), recipe, TOKEN_PARAMS, [task], KEY, strength=0.0)

    def loss(params):
        losses = [
            optax.losses.softmax_cross_entropy_with_integer_labels(token_logits(params, x), y).sum()
            for x, y in (
                (without_padding(TOKENS, row).inputs[0], without_padding(TOKENS, row).labels[0]) for row in range(3)
            )
        ]
        return sum(losses) / sum(LENGTHS)

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, TOKEN_PARAMS, jax.grad(loss)(TOKEN_PARAMS))
    chex.assert_trees_all_close(learned.params, expected, rtol=1e-5, atol=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


class ArraySource:
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch.labels)

    def __getitem__(self, index):
        return jax.tree.map(lambda leaf: np.asarray(leaf[index]), self.batch)


def doors(batch, objective, params):
    """Every function that takes labels, with a network of three outputs."""
    recipe = Recipe(linear, optimizer_fn, num_epochs=1, batch_size=2, objective=objective)
    loss_fn, optimizer, none = ExampleLoss(objective, linear), optax.sgd(0.1), init_consolidation(params)
    options = {"num_epochs": 1, "batch_size": 2}
    start = functools.partial(init_training, optimizer, params, KEY)
    tasks = [Task(batch, batch)]
    return {
        "learn_tasks": lambda: learn_tasks(methods.ewc(), recipe, params, tasks, KEY, strength=1.0),
        "learn_jointly": lambda: learn_jointly(recipe, params, tasks, KEY),
        "learn_sweep": lambda: learn_sweep(methods.ewc(), recipe, [SweepRun(params, tasks, KEY, 1.0)]),
        "evaluate": lambda: evaluate(linear, params, tasks, objective=objective),
        "learn_task": lambda: learn_task(loss_fn, optimizer, start(), none, batch, **options),
        "empirical_fisher_diagonal": lambda: empirical_fisher_diagonal(loss_fn, params, batch),
        "empirical_kronecker_fisher": lambda: empirical_kronecker_fisher(loss_fn, params, batch),
        "learn_stream": lambda: learn_stream(loss_fn, optimizer, start(), none, ArraySource(batch), **options),
    }


@pytest.mark.parametrize("labels", [[0, 1, 3, 2], [0, -1, 1, 1], [0, 1, 2, -100]])
def test_labels_out_of_range_are_named_at_every_door(labels):
    for name, run in doors(Batch(normal(4, 2), jnp.array(labels)), CLASSIFICATION, normal(2, 3)).items():
        with pytest.raises(ValueError, match=r"\.labels has labels from .*, but there are 3 classes"):
            pytest.fail(f"{name} took them: {run()}")


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        (regression(), jnp.zeros((4, 1)), r"labels has shape \(1,\) for one example, but apply_fn returns \(3,\)"),
        (regression(), jnp.zeros((4, 3), int), "labels has dtype int32, but regression needs floating-point labels"),
        (regression(), jnp.full((4, 3), jnp.nan), "labels has entries that are NaN or infinite"),
        (binary(), jnp.full((4, 3), 2), "labels must be 0 or 1"),
        (
            CLASSIFICATION,
            jnp.zeros((4, 3), int),
            r"labels has shape \(3,\) for one example, but apply_fn returns \(3,\)",
        ),
    ],
)
def test_labels_that_do_not_fit_the_objective(objective, labels, message):
    for name, run in doors(Batch(normal(4, 2), labels), objective, normal(2, 3)).items():
        with pytest.raises((ValueError, TypeError), match=message):
            pytest.fail(f"{name} took them: {run()}")


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_a_task_of_one_class_is_said_to_be_unprotected(scenario):
    batch = Batch(normal(4, 2), jnp.zeros(4, int))
    task = Task(batch, batch, class_mask=jnp.array([True, False, False]))
    recipe = Recipe(linear, optimizer_fn, num_epochs=1, batch_size=2, scenario=scenario)
    with pytest.warns(UserWarning, match="the importance of ewc is 0 everywhere after 1 epochs, .* has it one class"):
        learn_tasks(methods.ewc(), recipe, normal(2, 3), [task], KEY, strength=1.0)


def test_weights_of_labels_that_do_not_fit():
    for weights, message in (
        (jnp.ones((3, 3)), r"label_weights has shape \(3, 3\), but the labels have \(3, 4\)"),
        (jnp.zeros((3, 4)), "label_weights must be finite, not negative and not all 0"),
    ):
        tasks = [Task(TOKENS._replace(label_weights=weights), TOKENS)]
        recipe = Recipe(token_logits, optimizer_fn, num_epochs=1, batch_size=2)
        with pytest.raises(ValueError, match=message):
            learn_jointly(recipe, TOKEN_PARAMS, tasks, KEY)
    with pytest.raises(ValueError, match="score must be one of accuracy, loss"):
        classification("F1")
    with pytest.raises(ValueError, match="variance must be finite, above 0"):
        regression(0.0)


def test_a_label_out_of_range_makes_the_loss_nan_where_it_cannot_be_checked():
    losses = jax.jit(jax.vmap(cross_entropy(linear), (None, 0)))
    found = losses(normal(2, 3), Batch(normal(3, 2), jnp.array([0, -1, 3])))
    assert jnp.isnan(found).tolist() == [False, True, True]
