"""Whatever the public functions are handed: a right answer, or an error that names the argument."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifelong_jax import (
    Batch,
    Consolidation,
    Recipe,
    Task,
    add_quadratic_penalty,
    consolidate,
    dataset_tasks,
    empirical_fisher_diagonal,
    evaluate,
    fisher_diagonal,
    init_consolidation,
    init_training,
    learn_task,
    learn_tasks,
    mas_importance,
    merge,
    methods,
    metrics,
    normalize_importance,
    permuted_tasks,
    proximal_quadratic_penalty,
    quadratic_penalty,
    split_tasks,
)
from lifelong_jax.checkpoint import load_consolidation, save_consolidation

pytestmark = pytest.mark.usefixtures("standard_promotion")
amounts = pytest.mark.parametrize("num_examples", [20, pytest.param(1000, marks=pytest.mark.slow)])

FLOATS = ("float32", "bfloat16", "float16")
SHAPES = st.sampled_from([(), (0,), (3,), (2, 3)])
DTYPES = st.sampled_from([*FLOATS * 3, "int32", "bool"])
VALUES = st.sampled_from([0.0, 1.0, -2.0, 0.25] * 3 + [1e-30, 3e4, 1e30, 3e38, math.nan, math.inf, -math.inf])
NUMBERS = st.sampled_from([0.0, 0.5, 1.0, 3.0] * 2 + [1e-30, 1e30, -1.0, math.nan, math.inf])
KEYS = st.sampled_from(["w", "b", "a b", "a/b", "'", "", "λ", 0, 1])


def fuzz(num_examples, check, *strategies):
    quiet = settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=num_examples < 100,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(*strategies)(check))()


def attempt(call, *names):
    """What a call returns, or None if it raises an error that names one of the arguments."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names)
        assert re.search(pattern, str(error)), f"no word of {names} in: {error}"
        return None


@st.composite
def arrays(draw, shape=SHAPES, dtype=DTYPES, value=VALUES):
    shape, dtype = draw(shape), jnp.dtype(draw(dtype))
    size = math.prod(shape)
    drawn = draw(st.lists(value, min_size=min(size, 2), max_size=min(size, 2)))
    values = np.resize(np.array(drawn, np.float64), shape) if size else np.zeros(shape)
    with np.errstate(all="ignore"):
        if not jnp.issubdtype(dtype, jnp.floating):
            values = np.nan_to_num(values, posinf=1, neginf=-1).clip(-5, 5)
        return jnp.asarray(values.astype(dtype))


def trees(leaf):
    return st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.dictionaries(KEYS, inner, max_size=2).filter(lambda tree: len(set(map(type, tree))) < 2)
            | st.lists(inner, max_size=2)
            | st.tuples(inner, inner)
        ),
        max_leaves=3,
    )


@st.composite
def several_trees(draw, count):
    """Trees of one structure, most of the time."""
    first = draw(trees(arrays()))
    alike = [
        jax.tree.map(lambda leaf: draw(arrays(st.just(leaf.shape), st.just(leaf.dtype.name))), first)
        for _ in range(count - 1)
    ]
    if draw(st.integers(0, 5)) == 0:
        alike[draw(st.integers(0, count - 2))] = draw(trees(arrays()))
    return [first, *alike]


def doubles(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def floating(*all_trees):
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(all_trees))


def finite(*all_trees):
    return all(np.isfinite(leaf).all() for leaf in doubles(all_trees))


def not_negative(*all_trees):
    return finite(all_trees) and all((leaf >= 0).all() for leaf in doubles(all_trees))


def usable(weights):
    least = np.finfo(np.float32).tiny
    return bool(((weights == 0) | (weights >= least)).all()) and 0 < weights.sum() <= 1 / least


def fit(*all_trees):
    structures = {jax.tree.structure(tree) for tree in all_trees}
    return len(structures) == 1 and len({tuple(map(np.shape, jax.tree.leaves(tree))) for tree in all_trees}) == 1


def fits_float32(leaves):
    return all((leaf <= float(jnp.finfo(jnp.float32).max)).all() for leaf in leaves)


def assert_close(tree, expected, rtol=1e-2):
    """Equal, within the precision of the narrowest dtype, as far as float32 can hold what is expected."""
    leaves = doubles(tree)
    assert len(leaves) == len(expected)
    for leaf, value in zip(leaves, expected, strict=True):
        largest = float(jnp.finfo(jnp.float32).max)
        held = np.abs(value) < largest / 10
        np.testing.assert_allclose(leaf[held], value[held], rtol=rtol, atol=1e-30)
        assert not np.isnan(leaf).any()


@amounts
def test_init_consolidation(num_examples):
    def check(params):
        kept = attempt(lambda: init_consolidation(params), "params")
        assert (kept is not None) == floating(params)
        if kept is not None:
            assert fit(kept.anchor, kept.importance, params)
            np.testing.assert_equal(doubles(kept.anchor), doubles(params))

    fuzz(num_examples, check, trees(arrays()))


@amounts
def test_consolidate(num_examples):
    def check(drawn, rule, decay, weight):
        anchor, importance, params, incoming = drawn
        earlier = Consolidation(anchor, importance)
        kept = attempt(
            lambda: consolidate(earlier, params, incoming, rule=rule, decay=decay, weight=weight),
            *("params", "importance", "anchor", "rule", "decay", "weight"),
        )
        numbers = not_negative(decay, weight)
        valid = fit(*drawn) and floating(drawn) and finite(params) and not_negative(importance, incoming) and numbers
        pairs = zip(doubles(importance), doubles(incoming), strict=True) if valid else []
        expected = [decay * old + weight * new for old, new in pairs]
        if kept is None:
            assert not (valid and fits_float32(expected) and rule != "newest")
            return
        assert fits_float32(expected)
        assert fit(anchor, importance, params, incoming)
        assert numbers
        if not (valid and finite(anchor)):
            return
        assert_close(kept.importance, expected)
        if rule == "latest":
            assert_close(kept.anchor, doubles(params))
        else:
            for leaf, old, new in zip(doubles(kept.anchor), doubles(anchor), doubles(params), strict=True):
                slack = 1e-2 * (np.abs(old) + np.abs(new))
                assert (np.minimum(old, new) - slack <= leaf).all()
                assert (leaf <= np.maximum(old, new) + slack).all()

    rules = st.sampled_from(["separate", "latest", "latest", "separate", "newest"])
    fuzz(num_examples, check, several_trees(4), rules, NUMBERS, NUMBERS)


@amounts
def test_merge(num_examples):
    def check(drawn, strengths):
        kept = [Consolidation(drawn[0], drawn[1]), Consolidation(drawn[2], drawn[3])]
        merged = attempt(
            lambda: merge(kept, strengths), "consolidations", "strengths", r"strengths[0]", r"strengths[1]"
        )
        valid = fit(*drawn) and floating(drawn) and not_negative(drawn[1], drawn[3])
        valid = valid and len(strengths) == 2 and not_negative(strengths)
        pairs = zip(doubles(drawn[1]), doubles(drawn[3]), strict=True) if valid else []
        expected = [strengths[0] * ours + strengths[1] * theirs for ours, theirs in pairs]
        if merged is None:
            assert not (valid and fits_float32(expected))
            return
        assert fits_float32(expected)
        if valid and finite(drawn):
            assert_close(merged.importance, expected)

    fuzz(num_examples, check, several_trees(4), st.lists(NUMBERS, min_size=1, max_size=3))


@amounts
def test_normalize_importance(num_examples):
    def check(importance, to):
        if importance is None:
            return  # so is the result
        result = attempt(lambda: normalize_importance(importance, to), "importance", "to")
        valid = floating(importance) and not_negative(importance) and to != "median"
        assert result is not None or not valid
        if result is not None and valid:
            values = np.concatenate([np.zeros(0), *map(np.ravel, doubles(importance))])
            reference = {"mean": np.mean, "max": np.max}[to](values) if values.size and values.any() else 1.0
            assert_close(result, [leaf / reference for leaf in doubles(importance)])

    fuzz(num_examples, check, trees(arrays()), st.sampled_from(["mean", "max", "median"]))


@amounts
def test_penalties(num_examples):
    def check(drawn, strength):
        params, anchor, importance, updates = drawn
        if any(tree is None for tree in drawn):
            return  # as good as not given
        kept = Consolidation(anchor, importance)
        names = ("params", "anchor", "importance", "updates", "strength", "step_size")
        value = attempt(lambda: quadratic_penalty(params, kept, strength), *names)
        explicit, proximal = (
            attempt(lambda make=make: make().update(updates, make().init(params), params, **kept._asdict()), *names)
            for make in (
                lambda: add_quadratic_penalty(strength),
                lambda: proximal_quadratic_penalty(0.5, strength),
            )
        )
        valid = fit(*drawn) and floating(drawn) and finite(drawn) and not_negative(importance, strength)
        if not valid:
            return
        assert value is not None
        assert explicit is not None
        assert proximal is not None
        leaves = list(zip(*map(doubles, drawn), strict=True))
        with np.errstate(over="ignore"):
            pulls = [omega * (theta - star) for theta, star, omega, _ in leaves]
            unscaled = [np.sum(pull * (theta - star)) for pull, (theta, star, *_) in zip(pulls, leaves, strict=True)]
            terms = [strength / 2 * term for term in unscaled]
        strongest = max((np.abs(pull).max(initial=0) for pull in pulls), default=0)
        if max(sum(terms), sum(unscaled), strongest) < 1e38:  # what float32 holds on the way
            np.testing.assert_allclose(float(value), sum(terms), rtol=1e-2, atol=1e-30)
        wanted = [update + strength * pull for pull, (*_, update) in zip(pulls, leaves, strict=True)]
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(updates)]
        for ours, theirs, pull, dtype in zip(doubles(explicit[0]), wanted, pulls, dtypes, strict=True):
            on_the_way = (pull == 0) | ((np.abs(pull) > 1e-37) & (np.abs(pull) < 1e38))  # 1e-30 · 1e-30 · 1e30 is 0
            held = on_the_way & (np.abs(theirs) < float(jnp.finfo(dtype).max) / 10)
            np.testing.assert_allclose(ours[held], theirs[held], rtol=1e-2, atol=float(jnp.finfo(dtype).tiny))
        for ours, (theta, star, _, update) in zip(doubles(proximal[0]), leaves, strict=True):
            lowest, highest = np.minimum(update, star - theta), np.maximum(update, star - theta)
            slack = 1e-2 * (np.abs(update) + np.abs(star - theta)) + 1e-4
            held = np.maximum(np.abs(lowest), np.abs(highest)) < 1e4
            assert ((lowest - slack <= ours) & (ours <= highest + slack))[held].all()

    fuzz(num_examples, check, several_trees(4), NUMBERS)


def squared_error(params, example):
    return 0.5 * jnp.sum(params["w"] * example["x"] - example["y"]) ** 2


def gaussian_mean(params, x):
    return params["w"] * x


@amounts
def test_importances_of_a_linear_model_in_closed_form(num_examples):
    def check(x, y, w, weights, microbatch_size):
        names = ("examples", "inputs", "params", "weights", "microbatch_size", "x", "y")
        params = {"w": w}
        options = {"weights": weights, "microbatch_size": microbatch_size}
        # With weights, a mean over examples of what one example's gradient is by hand.
        wide, slope = np.asarray(x, np.float64), np.asarray(w, np.float64)
        share = np.ones(len(wide)) if weights is None else np.asarray(weights, np.float64)
        valid = (
            len(wide) > 0
            and floating(w)
            and x.shape[:1] == y.shape[:1] == share.shape
            and usable(share)
            and microbatch_size in (None, 1, 2, 5)
            and microbatch_size is not True
        )
        with np.errstate(all="ignore"):
            residual = slope * wide - np.asarray(y, np.float64) if y.shape == x.shape else wide
            by_hand = {
                "empirical": (residual * wide) ** 2,
                "gaussian": wide**2,
                "mas": np.abs(2 * slope * wide**2),
            }
            # What the gradient is the product of, and itself: beyond the dtype's largest, infinite, or 0 · inf.
            factors = {"empirical": np.abs(residual), "gaussian": np.ones_like(wide), "mas": np.abs(2 * slope * wide)}
            gradients = {name: np.maximum(factor, factor * np.abs(wide)) for name, factor in factors.items()}
        largest = float(jnp.finfo(w.dtype).max) if floating(w) else np.inf
        results = {
            "empirical": attempt(
                lambda: empirical_fisher_diagonal(squared_error, params, {"x": x, "y": y}, **options), *names
            ),
            "gaussian": attempt(
                lambda: fisher_diagonal(gaussian_mean, params, x, likelihood="gaussian", **options), *names
            ),
            "mas": attempt(lambda: mas_importance(gaussian_mean, params, x, **options), *names),
        }
        for name, result in results.items():
            if result is None:
                assert not valid, name
            elif valid and (gradients[name] <= largest).all() and (by_hand[name] <= np.finfo(np.float32).max).all():
                expected = np.sum(share * by_hand[name]) / share.sum()
                if 1e-30 < expected < 1e30 or expected == 0:
                    np.testing.assert_allclose(float(result["w"]), expected, rtol=2e-2, atol=1e-30)
            elif valid and not np.isfinite(by_hand[name]).all():
                assert not np.isfinite(float(result["w"])), f"{name}: {result} of {by_hand[name]}"

    inputs = arrays(st.sampled_from([(3,), (3,), (3,), (0,), (1,)]), st.sampled_from(["float32", "float32", "int32"]))
    shapes, dtypes = st.sampled_from([(3,), (1,), ()]), st.sampled_from(["float32", "int32", "bool"])
    weights = st.none() | arrays(shapes, dtypes, VALUES | st.sampled_from([8e37, 2e-38, 1e-40]))
    sizes = st.sampled_from([None, 1, 2, 5, 0, -1, 2.5, True])
    fuzz(num_examples, check, inputs, inputs, arrays(st.just(()), DTYPES), weights, sizes)


def linear(params, x):
    return params @ x


def optimizer_fn(strength):
    return optax.chain(add_quadratic_penalty(strength), optax.sgd(0.1))


def plain_batch(inputs, labels, weights):
    return Batch(jnp.asarray(inputs), jnp.asarray(labels), jnp.asarray(weights))


@amounts
def test_learning_and_testing(num_examples):
    def check(values, labels, weights, train_side):
        good = plain_batch(np.eye(4, dtype=np.float32), np.arange(4) % 3, np.ones(4, np.float32))
        drawn = plain_batch(np.resize(np.float32(values), (4, 4)), labels, weights)
        task = Task(drawn, good) if train_side else Task(good, drawn)
        start = jnp.zeros((3, 4)).at[0, 0].set(1.0)

        def learn():
            recipe = Recipe(linear, optimizer_fn, num_epochs=1, batch_size=2)
            return learn_tasks(methods.finetune(), recipe, start, [task], jax.random.key(0), strength=0.0)

        learned = attempt(learn, "tasks[0]", "tasks[0].train", "tasks[0].test")
        valid = (
            finite(drawn.inputs)
            and jnp.issubdtype(drawn.labels.dtype, jnp.integer)
            and ((drawn.labels >= 0) & (drawn.labels < 3)).all()
            and not_negative(drawn.weights)
            and drawn.weights.sum() > 0
        )
        if not valid:
            assert learned is None
            return
        outputs = doubles(task.test.inputs)[0] @ doubles(learned.params)[0].T
        ranked = np.sort(outputs, axis=1)
        if (ranked[:, -1] - ranked[:, -2] > 1e-3).all():  # no ties, which rounding decides
            correct = outputs.argmax(axis=1) == np.asarray(task.test.labels)
            expected = np.average(correct, weights=np.asarray(task.test.weights, np.float64))
            np.testing.assert_allclose(learned.accuracy_matrix, [[expected]], rtol=1e-5)

    values = st.lists(st.sampled_from([0.0, 1.0, -1.0] * 3 + [math.nan, math.inf]), min_size=1, max_size=3)
    labels = st.lists(st.sampled_from([0, 1, 2] * 4 + [3, -1]), min_size=4, max_size=4).map(np.array)
    labels |= st.just(np.array([0.0, 1.0, 2.0, 0.0], np.float32))
    numbers = st.sampled_from([0.0, 1.0, 2.0] * 3 + [-1.0, math.nan, math.inf])
    weights = st.lists(numbers, min_size=4, max_size=4).map(np.float32)
    fuzz(num_examples, check, values, labels, weights, st.booleans())


def test_a_network_that_answers_nan_is_not_right():
    batch = plain_batch(np.ones((2, 4), np.float32), [0, 0], np.ones(2, np.float32))
    assert evaluate(linear, jnp.full((3, 4), jnp.nan), [Task(batch, batch)]) == [0.0]


@amounts
def test_learn_task(num_examples):
    def check(num, weights, num_epochs, batch_size):
        examples = jnp.arange(float(num))
        state = init_training(optax.sgd(0.5), jnp.array(0.0), jax.random.key(0))
        names = ("examples", "weights", "num_epochs", "batch_size")

        def learn():
            return learn_task(
                lambda params, x: (params - x) ** 2, optax.sgd(0.5), state, init_consolidation(state.params), examples,
                num_epochs=num_epochs, batch_size=batch_size, weights=weights,
            )  # fmt: skip

        result = attempt(learn, *names)
        counts = all(isinstance(value, int) and value > 0 for value in (num_epochs, batch_size))
        share = np.ones(num) if weights is None else np.asarray(weights, np.float64)
        valid = num and counts and share.shape == (num,) and usable(share)
        assert (result is not None) == bool(valid)
        if valid and batch_size >= num:  # one step goes to the mean
            mean = np.average(np.arange(num), weights=share)
            np.testing.assert_allclose(float(result[0].params), mean, rtol=1e-4, atol=1e-6)

    values = VALUES | st.sampled_from([8e37, 2e-38, 1e-40])
    weights = st.none() | arrays(st.sampled_from([(3,), (3,), (1,), ()]), st.just("float32"), values)
    integers = st.sampled_from([1, 1, 2, 5, 0, -1, 1.5])
    fuzz(num_examples, check, st.sampled_from([3, 3, 3, 1, 0]), weights, integers, integers)


@amounts
def test_split_tasks(num_examples):
    def check(labels, groups, num_classes, shared_outputs):
        labels = np.array(labels, np.int32)
        batch = plain_batch(np.arange(len(labels), dtype=np.float32)[:, None], labels, np.ones(len(labels), np.float32))
        tasks = attempt(
            lambda: split_tasks(batch, batch, groups, num_classes, shared_outputs=shared_outputs),
            *("class_groups", "train", "test", "num_classes"),
        )
        flat = [label for group in groups for label in group]
        valid = bool(flat) and all(groups) and len(set(flat)) == len(flat) and set(flat) <= set(labels.tolist())
        valid = valid and num_classes > 0 and all(0 <= label < num_classes for label in flat)
        assert (tasks is not None) == valid
        for task, group in zip(tasks or [], groups, strict=bool(tasks)):
            present = np.asarray(task.train.weights) > 0
            shown = np.asarray(task.train.inputs)[present, 0].astype(int).tolist()
            assert shown == [index for index, label in enumerate(labels.tolist()) if label in group]
            ours = np.asarray(task.train.labels)
            if shared_outputs:
                assert [group[label] for label in ours[present]] == labels[shown].tolist()
            else:
                assert ours[present].tolist() == labels[shown].tolist()
                assert np.flatnonzero(task.class_mask).tolist() == sorted(group)
                assert np.asarray(task.class_mask)[ours].all()

    labels = st.lists(st.integers(0, 3), max_size=6)
    groups = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 3, 9, -1]), max_size=2), max_size=2)
    fuzz(num_examples, check, labels, groups, st.sampled_from([4, 4, 4, 2, 0]), st.booleans())


@amounts
def test_dataset_tasks(num_examples):
    def check(datasets):
        batches = [
            (plain_batch(np.zeros((len(labels), 2), np.float32), np.array(labels, np.int32), np.ones(len(labels))),) * 2
            for labels, _ in datasets
        ]
        tasks = attempt(
            lambda: dataset_tasks([(*pair, count) for pair, (_, count) in zip(batches, datasets, strict=True)]),
            *("datasets", "datasets[0]", "datasets[1]", "inputs"),
        )
        valid = bool(datasets) and all(
            labels and count > 0 and all(0 <= label < count for label in labels) for labels, count in datasets
        )
        assert (tasks is not None) == valid
        first = 0
        for task, (labels, count) in zip(tasks or [], datasets, strict=bool(tasks)):
            present = np.asarray(task.train.weights) > 0
            assert np.asarray(task.train.labels)[present].tolist() == [first + label for label in labels]
            assert np.flatnonzero(task.class_mask).tolist() == list(range(first, first + count))
            first += count

    dataset = st.tuples(st.lists(st.sampled_from([0, 0, 1, 1, 2, -1]), max_size=3), st.sampled_from([3, 2, 1, 0]))
    fuzz(num_examples, check, st.lists(dataset, max_size=2))


@amounts
def test_permuted_tasks(num_examples):
    def check(shape, num_tasks, seed):
        batch = plain_batch(np.zeros((2, *shape), np.float32), np.zeros(2, np.int32), np.ones(2, np.float32))
        tasks = attempt(lambda: permuted_tasks(batch, batch, num_tasks, jax.random.key(seed)), "num_tasks")
        assert (tasks is not None) == (isinstance(num_tasks, int) and num_tasks > 0)
        again = permuted_tasks(batch, batch, 3, jax.random.key(seed))  # same key, same numbers
        for task, other in zip(tasks or [], again, strict=False):
            assert sorted(task.permutation.tolist()) == list(range(math.prod(shape)))
            assert (task.permutation == other.permutation).all()

    fuzz(num_examples, check, SHAPES, st.sampled_from([1, 2, 3, 0, -1, 1.5, None]), st.integers(0, 3))


@amounts
def test_metrics(num_examples):
    def check(matrix):
        value = attempt(lambda: metrics.forgetting(matrix), "accuracy_matrix")
        accuracy = np.asarray(matrix, np.float64)
        valid = accuracy.ndim == 2 and accuracy.shape[0] == accuracy.shape[1] > 0
        assert (value is not None) == valid
        if not valid:
            return
        size = len(accuracy)
        by_hand = [max(accuracy[task : size - 1, task]) - accuracy[-1, task] for task in range(size - 1)]
        needed = np.tril(accuracy)
        expected = np.mean(by_hand) if by_hand and not np.isnan(needed).any() else math.nan
        if not np.isnan(needed).any():
            np.testing.assert_allclose(value, expected)
        assert metrics.average_accuracy(matrix) == pytest.approx(np.mean(accuracy[-1]), nan_ok=True)

    entry = st.sampled_from([0.0, 0.5, 1.0, 1.0, math.nan])
    square = st.integers(0, 3).flatmap(
        lambda size: st.lists(st.lists(entry, min_size=size, max_size=size), min_size=size, max_size=size)
    )
    ragged = st.lists(entry, max_size=3) | st.lists(st.lists(entry, min_size=2, max_size=2), max_size=3)
    fuzz(num_examples, check, square | ragged)


@amounts
def test_what_is_saved_is_loaded(num_examples, tmp_path):
    file = tmp_path / "kept.safetensors"

    def check(drawn, estimator, num):
        kept = Consolidation(*drawn)
        names = ("anchor", "importance", "estimator", "num_examples")

        def save():
            save_consolidation(file, kept, estimator=estimator, num_examples=num, sync=False)
            return True

        valid = fit(*drawn) and floating(drawn) and finite(drawn) and not_negative(drawn[1]) and num > 0
        assert (attempt(save, *names) is not None) == valid
        if valid:
            loaded = load_consolidation(file, like=kept)
            assert jax.tree.structure(loaded) == jax.tree.structure(kept)
            for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(kept), strict=True):
                assert ours.dtype == theirs.dtype
                assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()

    fuzz(num_examples, check, several_trees(2), st.text(max_size=5), st.sampled_from([1, 60, 0, -1]))
