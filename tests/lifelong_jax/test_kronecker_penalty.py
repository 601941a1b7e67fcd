"""Importances with Kronecker factors at every door: penalties, consolidation, files, sequences, sweeps, streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lifelong_jax import (
    Batch,
    Consolidation,
    Recipe,
    SweepRun,
    _epochs,
    add_quadratic_penalty,
    consolidate,
    forms,
    init_consolidation,
    kronecker_fisher,
    learn_sweep,
    learn_tasks,
    merge,
    methods,
    normalize_importance,
    permuted_tasks,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)
from lifelong_jax.checkpoint import load_consolidation, save_consolidation
from lifelong_jax.geometry import penalty_on_plane, plane_through

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax needs it

map_forms = functools.partial(jax.tree.map, is_leaf=forms.is_form)
tree_map = jax.tree.map


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def draw(seed, scale=0.5):
    random = np.random.default_rng(seed)
    shapes = {"w": (4, 5), "b": (5,), "v": (5, 3)}
    drawn = {name: scale * random.normal(size=shape) for name, shape in shapes.items()}
    return jax.device_put(tree_map(np.float32, drawn))


INPUTS = jax.device_put(np.random.default_rng(9).normal(size=(7, 4)).astype(np.float32))
PARAMS, ANCHOR = draw(0), draw(1)


@functools.cache
def consolidated(strength=1.0):
    importance = kronecker_fisher(apply_fn, ANCHOR, INPUTS)
    return Consolidation(ANCHOR, map_forms(lambda form: forms.scale(form, strength), importance))


def dense(form):
    unit = np.eye(int(np.prod(form.shape)), dtype=np.float32).reshape(-1, *form.shape)
    return np.stack([np.ravel(forms.times(form, row)) for row in unit])


def zeros():
    return tree_map(jnp.zeros_like, PARAMS)


def update(optimizer, params, consolidation, state=None):
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(zeros(), state, params, **consolidation._asdict())
    return optax.apply_updates(params, updates), state


def assert_close(ours, theirs, tolerance=1e-5):
    tree_map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


def test_the_penalty_is_that_of_the_dense_matrix():
    penalty = quadratic_penalty(PARAMS, consolidated(), 3.0)
    changes = tree_map(lambda theta, anchor: np.ravel(theta - anchor), PARAMS, ANCHOR)
    expected = [c @ dense(f) @ c for c, f in zip(changes.values(), consolidated().importance.values(), strict=True)]
    np.testing.assert_allclose(penalty, 1.5 * sum(expected), rtol=1e-5)


def test_the_added_gradient_is_that_of_the_penalty():
    params, _ = update(add_quadratic_penalty(3.0), PARAMS, consolidated())
    gradient = jax.grad(quadratic_penalty)(PARAMS, consolidated(), 3.0)
    assert_close(tree_map(jnp.subtract, params, PARAMS), gradient)


def test_the_proximal_step_solves_the_linear_system():
    params, _ = update(proximal_quadratic_penalty(0.5, 8.0), PARAMS, consolidated())
    for name, form in consolidated().importance.items():
        change = np.ravel(PARAMS[name] - ANCHOR[name])
        solved = np.linalg.solve(np.eye(change.size) + 4.0 * dense(form), change)
        np.testing.assert_allclose(np.ravel(params[name] - ANCHOR[name]), solved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [1e12, 1e30])
def test_a_huge_strength_leaves_the_anchor_in_free_directions_only(strength):
    optimizer = proximal_quadratic_penalty(1.0, strength)
    params, _ = update(optimizer, PARAMS, consolidated())
    again, _ = update(optimizer, params, consolidated())
    if strength == 1e30:  # at which a direction whose eigenvalue is rounding is not free
        assert_close(again, params, 1e-4)
    assert quadratic_penalty(params, consolidated(), 1.0) < 1e-8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_every_makes_one_step_for_many():
    pulled, _ = update(proximal_quadratic_penalty(0.6, 2.0), PARAMS, consolidated())
    optimizer = proximal_quadratic_penalty(0.2, 2.0, every=3)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(2):
        params, state = update(optimizer, params, consolidated(), state)
        assert_close(params, PARAMS, 0)
    params, state = update(optimizer, params, consolidated(), state)
    assert_close(params, pulled)


def test_every_adds_up_a_schedule():
    def schedule(count):
        return 0.1 * (1 + count)  # 0.1 + 0.2 + 0.3 in the first three steps

    pulled, _ = update(proximal_quadratic_penalty(0.6, 2.0), PARAMS, consolidated())
    optimizer = proximal_quadratic_penalty(schedule, 2.0, every=3)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        params, state = update(optimizer, params, consolidated(), state)
    assert_close(params, pulled)


def test_every_of_a_diagonal_importance():
    diagonal = consolidated()._replace(importance=map_forms(forms.diagonal, consolidated().importance))
    pulled, _ = update(proximal_quadratic_penalty(0.4, 2.0), PARAMS, diagonal)
    optimizer = proximal_quadratic_penalty(0.2, 2.0, every=2)
    params, state = update(optimizer, PARAMS, diagonal)
    params, _ = update(optimizer, params, diagonal, state)
    assert_close(params, pulled)


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        proximal_quadratic_penalty(0.1, 1.0, every=every)


def test_a_step_size_for_each_entry_is_refused():
    optimizer = proximal_quadratic_penalty(tree_map(jnp.ones_like, PARAMS), 1.0)
    with pytest.raises(ValueError, match=r"step_size has shape .* Kronecker factors"):
        update(optimizer, PARAMS, consolidated())


def test_proximal_adam_is_refused():
    with pytest.raises(ValueError, match="proximal_adam needs a diagonal importance"):
        update(proximal_adam(0.1, 1.0), PARAMS, consolidated())


def test_masked_leaves_are_left_alone():
    mask = {"w": True, "b": False, "v": True}
    optimizer = optax.masked(add_quadratic_penalty(3.0), mask, mask_compatible_extra_args=True)
    params, _ = update(optimizer, PARAMS, consolidated())
    whole, _ = update(add_quadratic_penalty(3.0), PARAMS, consolidated())
    np.testing.assert_array_equal(params["b"], PARAMS["b"])
    np.testing.assert_array_equal(params["w"], whole["w"])


def test_a_partition_and_unprotected_leaves():
    transforms = {"pulled": add_quadratic_penalty(3.0), "free": optax.identity()}
    labels = {"w": "pulled", "b": "free", "v": "pulled"}
    optimizer = optax.partition(transforms, labels, mask_compatible_extra_args=True)
    params, _ = update(optimizer, PARAMS, consolidated())
    without = Consolidation(*({**tree, "b": None} for tree in consolidated()))
    expected, _ = update(add_quadratic_penalty(3.0), PARAMS, without)
    assert_close(params, expected, 0)


def test_multi_steps_and_hyperparameters_pass_forms_on():
    optimizer = optax.MultiSteps(proximal_quadratic_penalty(0.6, 2.0), every_k_schedule=2)
    params, state = update(optimizer, PARAMS, consolidated())
    params, _ = update(optimizer, params, consolidated(), state)
    pulled, _ = update(proximal_quadratic_penalty(0.6, 2.0), PARAMS, consolidated())
    assert_close(params, pulled)
    injected = optax.inject_hyperparams(proximal_quadratic_penalty, static_args="every")(0.3, strength=2.0, every=2)
    params, state = update(injected, PARAMS, consolidated())
    params, _ = update(injected, params, consolidated(), state)
    assert_close(params, pulled)


def test_a_consolidation_of_no_tasks_has_the_forms_of_the_importance():
    shapes = jax.eval_shape(functools.partial(kronecker_fisher, apply_fn), ANCHOR, INPUTS)
    none = init_consolidation(ANCHOR, like=shapes)
    assert jax.tree.structure(none.importance) == jax.tree.structure(consolidated().importance)
    params, _ = update(proximal_quadratic_penalty(1.0, 1e12), PARAMS, none)
    assert_close(params, PARAMS, 0)
    first = consolidate(none, ANCHOR, consolidated().importance, rule="latest")
    for name, form in consolidated().importance.items():
        np.testing.assert_allclose(dense(first.importance[name]), dense(form), atol=1e-6)


def test_decay_and_weight_scale_the_summands():
    total = consolidate(
        consolidated(), PARAMS, consolidated().importance, rule="latest", decay=0.5, weight=2.0
    )  # of one product with itself, so the sum is exact
    assert_close(total.anchor, PARAMS, 0)
    for name, form in consolidated().importance.items():
        np.testing.assert_allclose(dense(total.importance[name]), 2.5 * dense(form), atol=1e-5)


def test_what_cannot_be_joined_is_refused():
    importance = consolidated().importance
    with pytest.raises(ValueError, match="begin with init_consolidation"):
        consolidate(init_consolidation(ANCHOR), ANCHOR, importance, rule="latest")
    with pytest.raises(ValueError, match="rule='separate' is for diagonal importances"):
        consolidate(consolidated(), ANCHOR, importance)
    with pytest.raises(ValueError, match=r"consolidations\[1\].anchor is not known to equal"):
        merge([consolidated(), Consolidation(PARAMS, importance)], [1.0, 1.0])
    negative = {**importance, "w": forms.scale(importance["w"], -1.0)}
    with pytest.raises(ValueError, match=r"importance\['w'\] has entries that are NaN, infinite or negative"):
        consolidate(consolidated(), ANCHOR, negative, rule="latest")


def test_merge_around_one_anchor():
    merged = merge([consolidated(), consolidated()], [1.0, 3.0])
    for name, form in consolidated().importance.items():
        np.testing.assert_allclose(dense(merged.importance[name]), 4 * dense(form), atol=1e-5)


@pytest.mark.parametrize("to", ["mean", "max"])
def test_normalised_by_the_diagonal(to):
    normalized = normalize_importance(consolidated().importance, to)
    entries = np.concatenate([np.ravel(forms.diagonal(form)) for form in normalized.values()])
    np.testing.assert_allclose(getattr(np, to)(entries), 1, rtol=1e-5)


def test_a_file_keeps_forms_and_their_layout(tmp_path):
    file = tmp_path / "kept.safetensors"
    save_consolidation(file, consolidated(), estimator="exact Kronecker factors", num_examples=7)
    loaded = load_consolidation(file, like=init_consolidation(ANCHOR, consolidated().importance))
    assert jax.tree.structure(loaded) == jax.tree.structure(consolidated())
    assert_close(loaded, consolidated(), 0)
    with pytest.raises(ValueError, match="no leaf importance"):
        load_consolidation(file, like=init_consolidation(ANCHOR))
    square = {"w": jnp.ones((3, 3))}
    straight = kronecker_fisher(lambda p, x: x @ p["w"], square, INPUTS[:, :3])
    turned = kronecker_fisher(lambda p, x: p["w"] @ x, square, INPUTS[:, :3])
    save_consolidation(file, Consolidation(square, straight), estimator="straight", num_examples=7)
    with pytest.raises(ValueError, match="importance/w has the layout"):
        load_consolidation(file, like=init_consolidation(square, turned))


def test_the_penalty_on_a_plane():
    plane = plane_through(ANCHOR, PARAMS, draw(2))
    form = penalty_on_plane(plane, consolidated().importance)
    point = tree_map(lambda o, a, b: o + 2 * a - b, plane.origin, *plane.axes)
    expected = quadratic_penalty(point, Consolidation(plane.origin, consolidated().importance), 1.0)
    coordinates = np.array([2.0, -1.0])
    np.testing.assert_allclose(coordinates @ form @ coordinates / 2, expected, rtol=1e-4)


def optimizer_fn(strength):
    return optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, strength, every=2))


@functools.cache
def sequence():
    batch = Batch(jax.random.normal(jax.random.key(3), (20, 4)), jnp.arange(20) % 3, jnp.ones(20))
    return permuted_tasks(batch, batch, 3, jax.random.key(4)), Recipe(apply_fn, optimizer_fn, 4, batch_size=5)


def test_a_sequence_has_one_trace_and_a_sweep_learns_the_same():
    tasks, recipe = sequence()
    _epochs.learn_epoch.clear_cache()
    learned = learn_tasks(methods.kfac(), recipe, PARAMS, tasks, jax.random.key(5), strength=1.0)
    assert _epochs.learn_epoch._cache_size() == 1
    assert forms.is_form(learned.consolidation.importance["w"])
    swept = learn_sweep(methods.kfac(), recipe, [SweepRun(PARAMS, tasks, jax.random.key(5), s) for s in (1.0, 10.0)])
    np.testing.assert_allclose(swept.accuracy_matrix[0], learned.accuracy_matrix, atol=1e-6)
    free = learn_tasks(methods.kfac(), recipe, PARAMS, tasks, jax.random.key(5), strength=0.0)
    change = tree_map(lambda a, b: jnp.abs(a - b).max(), free.params, learned.params)
    assert max(jax.tree.leaves(change)) > 1e-3


@pytest.mark.parametrize("options", [{"fisher": "sampled"}, {"fisher": "empirical"}, {"weight_sharing": "reduce"}])
def test_every_kind_of_kfac_learns(options):
    tasks, recipe = sequence()
    learned = learn_tasks(methods.kfac(**options), recipe, PARAMS, tasks[:2], jax.random.key(5), strength=1.0)
    assert all(float(forms.trace(form)) > 0 for form in learned.consolidation.importance.values())
