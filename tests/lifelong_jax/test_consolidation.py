"""What is kept of several tasks: against stored single penalties, in any order, and what is refused."""

import functools
import itertools

import chex
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import (
    Consolidation,
    consolidate,
    forms,
    init_consolidation,
    merge,
    quadratic_penalty,
)
from lifelong_jax._layouts import Layout
from lifelong_jax.consolidation import compress_consolidation, decompress_consolidation


def draw(seed):
    random = np.random.default_rng(seed)
    return {"w": random.normal(size=(3, 2)), "b": random.normal(size=4)}


def make_tree(seed, dtype=jnp.float32):
    return {name: jnp.asarray(leaf, dtype) for name, leaf in draw(seed).items()}


def make_task(seed):
    """The parameters that a task left behind, and an importance, some of it 0."""
    importance = {name: jnp.asarray(np.maximum(leaf, 0)) for name, leaf in draw(1000 + seed).items()}
    return make_tree(seed), importance


@jax.jit
def gradient(params, consolidation, strength=1.0):
    return jax.grad(quadratic_penalty)(params, consolidation, strength)


def learn(tasks, **options):
    return functools.reduce(
        lambda kept, task: consolidate(kept, *task, **options), tasks, init_consolidation(tasks[0][0])
    )


def test_the_consolidation_of_no_tasks_is_a_penalty_on_nothing():
    params = make_tree(0, jnp.bfloat16)
    consolidation = init_consolidation(params)
    chex.assert_trees_all_equal(consolidation.importance, jax.tree.map(lambda p: jnp.zeros(p.shape), params))
    chex.assert_trees_all_equal(consolidation.anchor, jax.tree.map(lambda p: p.astype(jnp.float32), params))
    assert quadratic_penalty(make_tree(1), consolidation, 1e12) == 0


@pytest.mark.parametrize("num_tasks", [1, 3, 10])
def test_the_separate_form_has_the_gradient_of_all_stored_penalties(num_tasks):
    tasks = [make_task(seed) for seed in range(num_tasks)]
    here = make_tree(99)
    stored = [gradient(here, Consolidation(*task)) for task in tasks]
    kept = learn(tasks)
    expected = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *jax.device_get(stored))
    chex.assert_trees_all_close(gradient(here, kept), expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_shapes(kept.anchor, here)  # nothing grows with the number of tasks


def test_the_separate_form_differs_from_the_stored_penalties_by_a_constant():
    tasks = [make_task(seed) for seed in range(3)]
    kept = learn(tasks)
    differences = [
        sum(quadratic_penalty(make_tree(seed), Consolidation(*task), 2.0) for task in tasks)
        - quadratic_penalty(make_tree(seed), kept, 2.0)
        for seed in range(50, 54)
    ]
    np.testing.assert_allclose(differences, differences[0], rtol=1e-4)
    assert differences[0] > 0


def test_three_tasks_by_hand_with_decay_and_weight_the_anchor_changing_each_time():
    tasks = [({"w": jnp.array(float(a))}, {"w": jnp.array(float(o))}) for a, o in ((1, 2), (3, 4), (-2, 1))]
    latest = learn(tasks, rule="latest", decay=0.5, weight=10.0)
    chex.assert_trees_all_close(latest, Consolidation({"w": jnp.array(-2.0)}, {"w": jnp.array(5.0 + 20.0 + 10.0)}))
    separate = learn(tasks, rule="separate", decay=0.5, weight=10.0)
    anchor = (5.0 * 1 + 20.0 * 3 + 10.0 * -2) / 35.0
    chex.assert_trees_all_close(separate, Consolidation({"w": jnp.array(anchor)}, {"w": jnp.array(35.0)}))

    anchors = {rule: [] for rule in ("latest", "separate")}
    for rule, count in itertools.product(anchors, (1, 2, 3)):
        anchors[rule].append(float(learn(tasks[:count], rule=rule).anchor["w"]))
    np.testing.assert_allclose(anchors["latest"], [1, 3, -2])
    np.testing.assert_allclose(anchors["separate"], [1, 14 / 6, 12 / 7], rtol=1e-6)


def test_the_first_task_sets_the_anchor_exactly_under_both_rules():
    task = make_task(0)
    for rule in ("latest", "separate"):
        kept = consolidate(init_consolidation(make_tree(7)), *task, rule=rule)
        chex.assert_trees_all_close(kept, Consolidation(*task), rtol=1e-6)


def test_where_nothing_matters_the_anchor_follows_and_stays_finite():
    zeros = jax.tree.map(jnp.zeros_like, make_tree(0))
    kept = learn([(make_tree(0), zeros), (make_tree(1), zeros)])
    chex.assert_trees_all_close(kept.anchor, make_tree(1), rtol=1e-6)
    kept = consolidate(learn([make_task(0)]), make_tree(1), zeros, decay=0.0)
    chex.assert_tree_all_finite(kept)


def test_decay_0_forgets_all_but_the_last_task():
    tasks = [make_task(seed) for seed in range(3)]
    here = make_tree(99)
    for rule in ("latest", "separate"):
        chex.assert_trees_all_close(
            gradient(here, learn(tasks, rule=rule, decay=0.0)), gradient(here, Consolidation(*tasks[-1])), atol=1e-6
        )


def test_one_trace_serves_all_tasks_weights_and_decays():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(kept, params, importance, decay, weight):
        return consolidate(kept, params, importance, decay=decay, weight=weight)

    kept = expected = init_consolidation(make_tree(0))
    for seed in range(3):
        decay, weight = jnp.asarray(0.5 + 0.1 * seed), jnp.asarray(1.0 + seed)
        kept = step(kept, *make_task(seed), decay, weight)
        expected = consolidate(expected, *make_task(seed), decay=decay, weight=weight)
    chex.assert_trees_all_close(kept, expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_importances_are_summed_in_float32():
    params = {"w": jnp.zeros(2, jnp.bfloat16)}
    kept = init_consolidation(params)
    for _ in range(1000):
        kept = consolidate(kept, params, {"w": jnp.ones(2, jnp.bfloat16)}, rule="latest")
    np.testing.assert_array_equal(kept.importance["w"], 1000.0)  # bfloat16 would stop at 256
    chex.assert_trees_all_equal_dtypes(kept, init_consolidation({"w": jnp.zeros(2)}))


def test_none_stands_for_what_is_not_protected():
    params, importance = make_task(0)
    params, importance = params | {"b": None}, importance | {"b": None}
    kept = consolidate(init_consolidation(params), params, importance)
    chex.assert_trees_all_close(kept, Consolidation(params, importance), rtol=1e-6)
    assert kept.anchor["b"] is None
    assert merge([kept, kept], [1.0, 2.0]).importance["b"] is None


# ------------------------------------------------------------------------------------ properties

several = hypothesis.settings(max_examples=50, deadline=None)


def numbers(low, high):
    return st.floats(np.float32(low), np.float32(high), width=32, allow_subnormal=False).filter(
        lambda value: value == 0 or abs(value) > 1e-6
    )


vectors = functools.partial(hypothesis.extra.numpy.arrays, np.float32, 4)
task = st.tuples(vectors(elements=numbers(-100, 100)), vectors(elements=numbers(0, 100)))


@several
@hypothesis.given(st.lists(task, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_separate_form_does_not_depend_on_the_order_of_tasks(tasks, random):
    tasks = [(jnp.asarray(params), jnp.asarray(importance)) for params, importance in tasks]
    shuffled = random.sample(tasks, len(tasks))
    one, other = jax.device_get((learn(tasks), learn(shuffled)))
    np.testing.assert_allclose(one.importance, other.importance, rtol=1e-5)
    matters = one.importance > 0
    np.testing.assert_allclose(one.anchor[matters], other.anchor[matters], rtol=1e-4, atol=1e-3)


@several
@hypothesis.given(st.lists(task, min_size=1, max_size=4))
def test_the_anchor_lies_between_the_tasks(tasks):
    kept = learn([(jnp.asarray(params), jnp.asarray(importance)) for params, importance in tasks])
    params = np.stack([params for params, _ in tasks])
    assert np.all(kept.anchor >= params.min(axis=0) - 1e-4)
    assert np.all(kept.anchor <= params.max(axis=0) + 1e-4)


@several
@hypothesis.given(task, task)
def test_zero_importance_changes_nothing(first, second):
    kept = learn([tuple(map(jnp.asarray, first))])
    kept, after = jax.device_get((kept, consolidate(kept, jnp.asarray(second[0]), jnp.zeros(4))))
    matters = kept.importance > 0
    np.testing.assert_array_equal(after.importance, kept.importance)
    np.testing.assert_array_equal(after.anchor[matters], kept.anchor[matters])


# ------------------------------------------------------------------------------------ merge


def test_merge_has_the_gradient_of_its_parts_each_at_its_strength():
    parts = [
        learn([make_task(seed), make_task(seed + 1)], rule=rule) for seed, rule in ((0, "latest"), (5, "separate"))
    ]
    strengths = [0.3, 1e3]
    here = make_tree(99)
    expected = jax.tree.map(jnp.add, *(gradient(here, part, lam) for part, lam in zip(parts, strengths, strict=True)))
    chex.assert_trees_all_close(gradient(here, merge(parts, strengths)), expected, rtol=1e-4, atol=1e-4)


def test_merge_of_one_and_with_strength_0():
    one, other = learn([make_task(0)]), learn([make_task(1)])
    here = make_tree(99)
    chex.assert_trees_all_close(gradient(here, merge([one], [2.0])), gradient(here, one, 2.0), rtol=1e-5, atol=1e-6)
    merged = merge([one, other], [1.0, 0.0])
    chex.assert_trees_all_close(gradient(here, merged), gradient(here, one), rtol=1e-5, atol=1e-6)


def test_merge_takes_traced_strengths_and_large_ones():
    parts = [learn([make_task(0)]), learn([make_task(1)])]
    merged = jax.jit(merge)(parts, [jnp.asarray(1e12), jnp.asarray(1e-12)])
    chex.assert_tree_all_finite(merged)
    merged, part = jax.device_get((merged, parts[0]))
    matters = part.importance["w"] > 0
    np.testing.assert_allclose(merged.anchor["w"][matters], part.anchor["w"][matters], rtol=1e-6)


def test_merge_is_refused_without_a_strength_for_each():
    one = init_consolidation(make_tree(0))
    for consolidations, strengths in (([], []), ([one], [1.0, 2.0]), ([one, one], [1.0])):
        with pytest.raises(ValueError, match="a strength for each"):
            merge(consolidations, strengths)
    with pytest.raises(ValueError, match=r"strengths\[1\] must be finite and not negative"):
        merge([one, one], [1.0, -1.0])
    with pytest.raises(ValueError, match=r"consolidations\[1\]\.anchor has no leaf \['b'\]"):
        merge([one, init_consolidation({"w": jnp.zeros((3, 2))})], [1.0, 1.0])
    bad = one._replace(importance=one.importance | {"w": jnp.full((3, 2), jnp.nan)})
    with pytest.raises(ValueError, match=r"consolidations\[1\]\.importance\['w'\] has entries that are NaN"):
        merge([one, bad], [1.0, 1.0])


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1e-6])
def test_bad_importances_are_refused_naming_the_leaf(bad):
    params, importance = make_task(0)
    importance = importance | {"b": importance["b"].at[2].set(bad)}
    with pytest.raises(ValueError, match=r"importance\['b'\] has entries that are NaN, infinite or negative"):
        consolidate(init_consolidation(params), params, importance)
    kept = init_consolidation(params)._replace(importance=importance)
    with pytest.raises(ValueError, match=r"consolidation\.importance\['b'\] has entries that are NaN, infinite or neg"):
        consolidate(kept, params, make_task(0)[1])


@pytest.mark.parametrize("rule", ["separate", "latest"])
def test_a_sum_of_importances_that_overflows_is_refused_naming_the_leaf(rule):
    task = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, 3e38])}
    first = consolidate(init_consolidation(task[0]), *task, rule=rule)
    assert np.isfinite(first.anchor["w"]).all()
    message = r"importance\['w'\] has entries that are NaN or infinite\. It overflows"
    for kept, weight in ((first, 1.0), (init_consolidation(task[0]), 1e4)):
        with pytest.raises(ValueError, match=message):
            consolidate(kept, *task, rule=rule, weight=weight)
    with pytest.raises(ValueError, match=message):
        merge([first, first], [1.0, 1.0])


@pytest.mark.parametrize(
    ("params", "importance", "message"),
    [
        ({"w": jnp.zeros((3, 2))}, None, r"params has no leaf \['b'\]"),
        ({"w": jnp.zeros((3, 2)), "b": None}, None, r"params has no leaf \['b'\]"),
        (None, {"b": jnp.zeros(4)}, r"importance has no leaf \['w'\]"),
        (None, {"w": jnp.zeros((3, 2)), "b": jnp.zeros(5)}, r"importance\['b'\] has shape \(5,\), but .*\(4,\)"),
        (None, [jnp.zeros(4), jnp.zeros((3, 2))], r"importance has no leaf \['b'\]"),
    ],
)
def test_trees_that_differ_are_named_by_the_first_path(params, importance, message):
    good = make_task(0)
    with pytest.raises(ValueError, match=message):
        consolidate(init_consolidation(good[0]), params or good[0], importance or good[1])


@pytest.mark.parametrize("option", ["decay", "weight"])
@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_decay_and_weight_are_checked(option, bad):
    with pytest.raises(ValueError, match=f"{option} must be finite and not negative"):
        consolidate(init_consolidation(make_tree(0)), *make_task(0), **{option: bad})


@pytest.mark.parametrize("bad", [None, "1", jnp.ones(2)])
def test_decay_weight_and_strengths_are_numbers(bad):
    start = init_consolidation(make_tree(0))
    for option in ("decay", "weight"):
        with pytest.raises(ValueError, match=f"{option} must be a number, not "):
            consolidate(start, *make_task(0), **{option: bad})
    with pytest.raises(ValueError, match=r"strengths\[1\] must be a number, not "):
        merge([start, start], [1.0, bad])


def test_a_step_may_donate_the_parameters_that_no_task_is_anchored_at():
    params = jnp.arange(3.0)
    none = init_consolidation(params)
    learned = jax.jit(lambda params, none: params + none.anchor, donate_argnums=0)(params, none)
    np.testing.assert_array_equal(learned, 2 * np.arange(3.0))
    np.testing.assert_array_equal(none.anchor, np.arange(3.0))


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule must be one of separate, latest, not 'sum'"):
        consolidate(init_consolidation(make_tree(0)), *make_task(0), rule="sum")


def test_integer_leaves_are_refused_saying_what_to_put_in_their_place():
    with pytest.raises(TypeError, match=r"params\['steps'\] has dtype int32.*None in its place"):
        init_consolidation({"w": jnp.zeros(2), "steps": jnp.array(3)})


def test_parameters_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"params\['w'\] has entries that are NaN or infinite"):
        consolidate(init_consolidation({"w": jnp.ones(2)}), {"w": jnp.array([1.0, jnp.nan])}, {"w": jnp.ones(2)})


def test_numbers_are_leaves_too():
    first = consolidate(init_consolidation({"w": 0.0}), {"w": 1.0}, {"w": 3.0})
    second = consolidate(first, {"w": np.float64(5.0)}, {"w": 1.0})
    assert (float(second.anchor["w"]), float(second.importance["w"])) == (2.0, 4.0)


STORAGES = [("uint8", 0.1), ("bfloat16", 0.01)]


@pytest.mark.parametrize("rule", ["separate", "latest"])
@pytest.mark.parametrize(("storage", "error"), STORAGES)
def test_a_compressed_consolidation_stays_compressed_and_does_not_drift_in_20_tasks(rule, storage, error):
    random = np.random.default_rng(0)
    start = {"w": jnp.zeros((50, 7)), "b": jnp.zeros(3)}
    sizes = {name: 10 ** random.uniform(-6, 0, leaf.shape) for name, leaf in start.items()}
    exact, coded = init_consolidation(start), compress_consolidation(init_consolidation(start), importance=storage)
    structure = jax.tree.structure(coded)
    for _ in range(20):
        params = {name: jnp.array(random.normal(size=leaf.shape), jnp.float32) for name, leaf in start.items()}
        importance = {
            name: jnp.array(size * random.exponential(size=size.shape), jnp.float32) for name, size in sizes.items()
        }
        exact, coded = (consolidate(kept, params, importance, rule=rule, decay=0.97) for kept in (exact, coded))
    assert jax.tree.structure(coded) == structure
    assert {leaf.dtype for leaf in jax.tree.leaves(coded.anchor)} == {jnp.dtype(jnp.bfloat16)}
    anchor, found = decompress_consolidation(coded)
    for name, leaf in exact.importance.items():
        ratios = np.log(np.asarray(found[name] / leaf))
        assert np.sqrt(np.mean(ratios**2)) < error and abs(np.mean(ratios)) < error / 2
        np.testing.assert_allclose(anchor[name], exact.anchor[name], atol=3 * error)


def test_an_anchor_of_compressed_leaves_keeps_its_dtype_and_others_are_widened():
    params = {"w": jnp.arange(4, dtype=jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    importance = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    kept = compress_consolidation(Consolidation(params, importance), anchor=None)
    assert kept.anchor is params
    mixed = Consolidation(params, kept.importance | {"b": importance["b"]})
    for rule in ("separate", "latest"):
        total = consolidate(mixed, params, kept.importance, rule=rule)
        assert [total.anchor[name].dtype for name in ("w", "b")] == [jnp.bfloat16, jnp.float32]
        assert [forms.is_form(total.importance[name]) for name in ("w", "b")] == [True, False]
        chex.assert_trees_all_equal(total.anchor["w"], params["w"])
        chex.assert_trees_all_equal(
            decompress_consolidation(total).importance, jax.tree.map(lambda x: 2 * x, importance)
        )


def test_a_compressed_consolidation_of_no_tasks_is_made_by_its_shapes():
    params = make_tree(0, jnp.bfloat16)
    shapes = jax.eval_shape(lambda params: compress_consolidation(init_consolidation(params)), params)
    begun = init_consolidation(params, like=shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(begun, shapes)
    chex.assert_trees_all_equal(begun, compress_consolidation(init_consolidation(params)))
    assert begun.anchor["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()
    assert init_consolidation(params, like=shapes.importance).anchor["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"like.anchor and params must be trees of one structure"):
        init_consolidation(params, like=Consolidation({"w": params["w"]}, shapes.importance))


def test_compressed_consolidations_are_merged_as_what_they_stand_for():
    tasks = [compress_consolidation(Consolidation(*make_task(seed)), importance="bfloat16") for seed in range(2)]
    exact = merge(list(map(decompress_consolidation, tasks)), strengths=[1.0, 2.0])
    chex.assert_trees_all_equal(merge(tasks, strengths=[1.0, 2.0]), exact)
    mixed = merge([tasks[0], decompress_consolidation(tasks[1])], strengths=[1.0, 2.0])
    chex.assert_trees_all_equal(mixed, exact)


def test_kronecker_factors_are_not_compressed():
    layout = Layout((3, 4), (3, 4), (0, 1), (1, 3, 4))
    importance = {"w": forms.from_factors(jnp.eye(3)[None], jnp.eye(4)[None], layout), "b": jnp.ones(2)}
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}
    kept = compress_consolidation(Consolidation(params, importance))
    chex.assert_trees_all_equal(kept.importance["w"], importance["w"])
    total = consolidate(kept, params, importance, rule="latest")
    np.testing.assert_allclose(forms.diagonal(total.importance["w"]), 2.0, rtol=1e-6)
    assert total.anchor["w"].dtype == jnp.float32 and total.anchor["b"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="rule='separate' is for diagonal importances"):
        consolidate(kept, params, importance)
    bad = kept.importance | {"w": jnp.ones((3, 4))}
    with pytest.raises(
        ValueError, match=r"importance\['w'\] has a diagonal, but consolidation.importance has Kronecker"
    ):
        consolidate(kept, params, bad, rule="latest")


def test_what_cannot_be_compressed_is_refused():
    kept, bad = Consolidation({"w": jnp.ones(2)}, {"w": jnp.ones(2)}), {"w": jnp.array([1.0, -1.0])}
    with pytest.raises(ValueError, match="importance must be one of uint8, bfloat16, not 'int8'"):
        compress_consolidation(kept, importance="int8")
    with pytest.raises(ValueError, match="anchor must be one of bfloat16, not 'float8'"):
        compress_consolidation(kept, anchor="float8")
    with pytest.raises(
        ValueError, match=r"consolidation.importance\['w'\] has entries that are NaN, infinite or negative"
    ):
        compress_consolidation(kept._replace(importance=bad))
    with pytest.raises(ValueError, match=r"importance\['w'\] has shape \(3,\)"):
        compress_consolidation(kept._replace(importance={"w": jnp.ones(3)}))
    coded = compress_consolidation(kept)
    huge = {"w": forms.scale(coded.importance["w"], 3e38)}
    with pytest.raises(ValueError, match="It overflows: scale the importances down"):
        consolidate(coded._replace(importance=huge), kept.anchor, {"w": jnp.full(2, 3e38)})


def test_compressing_makes_no_second_consolidation(optimized):
    leaves = {f"w{index}": jax.ShapeDtypeStruct((64, 256), jnp.float32) for index in range(16)}
    compiled = jax.jit(compress_consolidation).lower(Consolidation(leaves, leaves)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * forms.num_bytes(leaves)
