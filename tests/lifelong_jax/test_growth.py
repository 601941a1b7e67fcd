"""A consolidation of a network that grew or shrank: the old entries keep their penalty, and the new ones have none."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax import (
    Consolidation,
    add_quadratic_penalty,
    consolidate,
    forms,
    init_consolidation,
    kronecker_fisher,
    quadratic_penalty,
)
from lifelong_jax._layouts import Layout
from lifelong_jax.consolidation import compress_consolidation, decompress_consolidation
from lifelong_jax.growth import extend_consolidation, restrict_consolidation
from tests.problems import flat


def draw(seed, **shapes):
    random = np.random.default_rng(seed)
    return jax.device_put({name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


OLD_SHAPES = {"bias": (3,), "head": (4, 3), "trunk": (5, 4)}
GROWN_SHAPES = {"bias": (5,), "head": (4, 5), "other": (2,), "trunk": (5, 4)}
OLD = Consolidation(draw(0, **OLD_SHAPES), jax.tree.map(jnp.abs, draw(1, **OLD_SHAPES)))
GROWN = draw(2, **GROWN_SHAPES)


def first(array, shape):
    return array[tuple(map(slice, shape))]


def test_old_entries_are_kept_and_new_ones_have_importance_0():
    extended = extend_consolidation(OLD, GROWN)
    expected = init_consolidation(GROWN)
    for name in ("bias", "head"):
        where = tuple(map(slice, OLD_SHAPES[name]))
        expected.anchor[name] = expected.anchor[name].at[where].set(OLD.anchor[name])
        expected.importance[name] = expected.importance[name].at[where].set(OLD.importance[name])
    expected.anchor["trunk"], expected.importance["trunk"] = OLD.anchor["trunk"], OLD.importance["trunk"]
    chex.assert_trees_all_equal(extended, expected)
    assert extended.anchor["trunk"] is OLD.anchor["trunk"]


def test_the_penalty_is_that_of_the_old_entries():
    here = draw(3, **GROWN_SHAPES)
    of_old = {name: first(here[name], shape) for name, shape in OLD_SHAPES.items()}
    ours = quadratic_penalty(here, extend_consolidation(OLD, GROWN), 2.0)
    np.testing.assert_allclose(ours, quadratic_penalty(of_old, OLD, 2.0), rtol=1e-6)


def test_restricting_takes_back_what_extending_did():
    extended = extend_consolidation(OLD, GROWN)
    chex.assert_trees_all_equal(restrict_consolidation(extended, OLD.anchor), OLD)
    shapes = jax.eval_shape(lambda: OLD.anchor)
    chex.assert_trees_all_equal(restrict_consolidation(extended, shapes), OLD)


def test_a_trunk_is_taken_elsewhere():
    new = {"trunk": GROWN["trunk"], "head": jnp.ones((4, 7))}
    trunk = restrict_consolidation(OLD, {"trunk": new["trunk"], "head": None})
    assert jax.tree.structure(trunk.anchor) == jax.tree.structure({"trunk": 0, "head": None})
    moved = extend_consolidation(trunk, new)
    chex.assert_trees_all_equal(moved.importance, {"trunk": OLD.importance["trunk"], "head": jnp.zeros((4, 7))})
    chex.assert_trees_all_equal(moved.anchor, {"trunk": OLD.anchor["trunk"], "head": jnp.ones((4, 7))})


def test_a_branch_that_is_not_protected_stays_so():
    old, new = ({"trunk": jnp.array(trunk), "head": None} for trunk in ([1.0, 1.0], [1.0, 1.0, 0.0]))
    extended = extend_consolidation(Consolidation(old, old), jax.tree.map(jnp.zeros_like, new))
    chex.assert_trees_all_equal(extended, Consolidation(new, new))


def test_a_tree_may_be_one_array():
    extended = extend_consolidation(Consolidation(jnp.ones(2), jnp.full(2, 3.0)), jnp.zeros(3))
    chex.assert_trees_all_equal(extended, Consolidation(jnp.array([1.0, 1, 0]), jnp.array([3.0, 3, 0])))


class Dense(eqx.Module):
    kernel: jax.Array
    bias: jax.Array


class EquinoxNet(eqx.Module):
    trunk: Dense
    heads: list[Dense]


class NnxNet(nnx.Module):
    def __init__(self, *sizes):
        make = functools.partial(nnx.Linear, rngs=nnx.Rngs(0))
        self.trunk, self.heads = make(2, 4), nnx.List([make(4, size) for size in sizes])


def as_lists(*sizes):
    state = nnx.to_pure_dict(nnx.state(NnxNet(*sizes), nnx.Param))
    return {"trunk": state["trunk"], "heads": list(state["heads"].values())}


def as_equinox(*sizes):
    params = as_lists(*sizes)
    return EquinoxNet(Dense(**params["trunk"]), [Dense(**head) for head in params["heads"]])


KINDS = {
    "nnx": lambda *sizes: nnx.state(NnxNet(*sizes), nnx.Param),
    "lists": as_lists,
    "tuples": lambda *sizes: as_lists(*sizes) | {"heads": tuple(as_lists(*sizes)["heads"])},
    "equinox": as_equinox,
}


def consolidated(params):
    return Consolidation(jax.tree.map(lambda leaf: leaf + 1, params), jax.tree.map(jnp.ones_like, params))


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_any_kind_of_tree_becomes_any_other(old, new):
    params = KINDS[new](3, 2)
    extended = extend_consolidation(consolidated(KINDS[old](2)), params)
    assert jax.tree.structure(extended) == jax.tree.structure(Consolidation(params, params))
    assert flat(extended.importance).sum() == 2 * 4 + 4 + 4 * 2 + 2
    back = restrict_consolidation(extended, KINDS[old](2))
    chex.assert_trees_all_equal(back, consolidated(KINDS[old](2)))


def test_params_may_be_donated():
    params = jax.tree.map(jnp.copy, GROWN)
    extended = extend_consolidation(OLD, params)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    chex.assert_tree_all_finite(extended)


def test_dtypes_are_those_of_a_consolidation():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), GROWN)
    assert {leaf.dtype for leaf in jax.tree.leaves(extend_consolidation(OLD, params))} == {jnp.dtype(jnp.float32)}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), GROWN)
        extended = extend_consolidation(OLD, params)
        assert extended.anchor["trunk"].dtype == np.float32  # kept as it is
        for tree in extended:
            assert {tree[name].dtype for name in ("bias", "head", "other")} == {np.dtype(np.float64)}
        np.testing.assert_array_equal(extended.anchor["head"][:, 3:], params["head"][:, 3:])


def test_both_work_inside_of_jit():
    extended = jax.jit(extend_consolidation)(OLD, GROWN)
    chex.assert_trees_all_equal(extended, extend_consolidation(OLD, GROWN))
    chex.assert_trees_all_equal(jax.jit(restrict_consolidation)(extended, OLD.anchor), OLD)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("under_jit", [False, True])
def test_sharded_arrays_stay_sharded(kind, under_jit):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    extend, restrict = (jax.jit(f) if under_jit else f for f in (extend_consolidation, restrict_consolidation))

    def place(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    old = {"w": place(jnp.ones((2, 4)), None, "model"), "b": place(jnp.ones(3)), "c": place(jnp.ones(4), "model")}
    new = {"w": place(jnp.zeros((2, 8)), None, "model"), "b": place(jnp.zeros(4), "model"), "c": place(jnp.zeros(5))}
    extended = extend(Consolidation(old, old), new)
    for tree in extended:
        np.testing.assert_array_equal(tree["w"], [[1, 1, 1, 1, 0, 0, 0, 0]] * 2)
        np.testing.assert_array_equal(tree["b"], [1, 1, 1, 0])
        np.testing.assert_array_equal(tree["c"], [1, 1, 1, 1, 0])
    if kind == AxisType.Explicit or not under_jit:  # else the compiler chooses
        for name, leaf in new.items():
            assert extended.anchor[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    chex.assert_trees_all_equal(jax.device_get(restrict(extended, old)), jax.device_get(Consolidation(old, old)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trunk": None, "body": GROWN["trunk"]},
            r"params has no leaf trunk, but the consolidation has \(params has body, other besides\): drop what "
            r"is gone first, by restrict_consolidation",
        ),
        ({"trunk": None, "other": None}, r"params has no leaf trunk, but the consolidation has: drop"),
        (
            {"trunk": jnp.ones((5, 3)), "bias": jnp.ones((3, 1))},
            r"params must have all entries of the consolidation, but has bias of shape \(3, 1\), not \(3,\), "
            r"trunk of shape \(5, 3\), not \(5, 4\): drop",
        ),
    ],
)
def test_what_a_grown_network_lacks_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        extend_consolidation(OLD, GROWN | change)


def test_what_a_consolidation_lacks_is_named():
    with pytest.raises(ValueError, match=r"the consolidation has no leaf other, but params has: put None .* extend_"):
        restrict_consolidation(OLD, GROWN)
    with pytest.raises(ValueError, match=r"but has head of shape \(4, 3\), not \(4, 9\): put None in the place"):
        restrict_consolidation(OLD, {"head": jnp.ones((4, 9))})


def test_errors_of_a_network_that_has_grown_say_where_to_go():
    optimizer = add_quadratic_penalty(1.0)
    for use in (
        lambda: quadratic_penalty(GROWN, OLD, 1.0),
        lambda: optimizer.update(GROWN, optimizer.init(GROWN), GROWN, **OLD._asdict()),
        lambda: consolidate(OLD, GROWN, GROWN),
    ):
        with pytest.raises(ValueError, match=r"has shape|has no leaf") as raised:
            use()
        assert raised.value.__notes__ == [
            "If the network has grown or shrunk, lifelong_jax.growth makes its consolidation fit."
        ]


def test_arguments_that_fit_no_network_are_refused():
    with pytest.raises(ValueError, match=r"consolidation.importance has no leaf \['bias'\]"):
        extend_consolidation(Consolidation(OLD.anchor, {}), GROWN)
    with pytest.raises(TypeError, match=r"params\['trunk'\] has dtype int32"):
        extend_consolidation(OLD, GROWN | {"trunk": jnp.ones((5, 4), int)})
    with pytest.raises(ValueError, match=r"like has no leaf \['bias'\]"):
        restrict_consolidation(OLD, OLD.anchor, like={})
    with pytest.raises(ValueError, match=r"params\['a'\]\['b'\] and params\['a/b'\] have the same path"):
        extend_consolidation(OLD, GROWN | {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


# Kronecker factors.


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def convolution(params, x):
    outputs = jax.lax.conv_general_dilated(
        x[None], params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jnp.sum(jnp.tanh(outputs[0] + params["b"]), axis=(0, 1)) @ params["v"]


def heads(params, x):  # one matrix for each head, [inputs, heads, outputs]
    return jnp.tanh(jnp.einsum("hi,iho->ho", x, params["w"])).sum(axis=0) @ params["v"]


def scanned(params, x):
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(layer[0] @ x + layer[1]), None), x, (params["w"], params["b"]))
    return x @ params["v"]


CASES = {  # the network; the shapes of an example and of the parameters before and after
    "outputs": (dense, (3,), {"w": (3, 4), "b": (4,), "v": (4, 2)}, (3,), {"w": (3, 4), "b": (4,), "v": (4, 5)}),
    "hidden": (dense, (3,), {"w": (3, 4), "b": (4,), "v": (4, 2)}, (3,), {"w": (3, 6), "b": (6,), "v": (6, 2)}),
    "inputs": (dense, (1,), {"w": (1, 4), "b": (4,), "v": (4, 2)}, (3,), {"w": (3, 4), "b": (4,), "v": (4, 2)}),
    "channels": (
        convolution,
        (3, 3, 2),
        {"w": (2, 2, 2, 3), "b": (3,), "v": (3, 2)},
        (3, 3, 4),
        {"w": (2, 2, 4, 5), "b": (5,), "v": (5, 2)},
    ),
    "groups": (heads, (2, 3), {"w": (3, 2, 4), "v": (4, 2)}, (4, 3), {"w": (3, 4, 5), "v": (5, 2)}),
    "layers": (
        scanned,
        (3,),
        {"w": (2, 3, 3), "b": (2, 3), "v": (3, 2)},
        (3,),
        {"w": (4, 3, 3), "b": (4, 3), "v": (3, 3)},
    ),
}


@functools.cache
def with_factors(case):
    """The Kronecker factors of a network before and after it grew, each with its parameters."""
    network, old_example, old_shapes, example, shapes = CASES[case]
    random = np.random.default_rng(4)
    networks = ((draw(5, **old_shapes), old_example), (draw(6, **shapes), example))
    return [
        (params, kronecker_fisher(network, params, jnp.asarray(random.normal(size=(6, *size)), jnp.float32)))
        for params, size in networks
    ]


def quadratic(form, change):
    return float(jnp.sum(forms.quadratic_terms(form, change)))


QUICK = {"outputs", "groups"}


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_factors_of_old_entries_are_kept_exactly(case):
    (old_params, importance), (params, like) = with_factors(case)
    extended = extend_consolidation(Consolidation(old_params, importance), params, like=like)
    changes = draw(7, **{name: leaf.shape for name, leaf in params.items()})
    assert any(forms.is_form(form) and form.shape != params[name].shape for name, form in importance.items())
    for name, form in extended.importance.items():
        old_change = first(changes[name], old_params[name].shape)
        np.testing.assert_allclose(quadratic(form, changes[name]), quadratic(importance[name], old_change), rtol=1e-4)
        np.testing.assert_allclose(forms.trace(form), forms.trace(importance[name]), rtol=1e-4)
        for basis in (form.row_basis, form.column_basis) if forms.is_form(form) else ():
            if basis is not None:
                products = jnp.swapaxes(basis, 1, 2) @ basis
                np.testing.assert_allclose(products, np.broadcast_to(np.eye(basis.shape[-1]), basis.shape), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_factors_are_cut_exactly(case):
    (old_params, like), (params, importance) = with_factors(case)
    cut = restrict_consolidation(Consolidation(params, importance), old_params, like=like)
    changes = draw(8, **{name: leaf.shape for name, leaf in old_params.items()})
    for name, form in cut.importance.items():
        spread = jnp.zeros(params[name].shape).at[tuple(map(slice, changes[name].shape))].set(changes[name])
        np.testing.assert_allclose(quadratic(form, changes[name]), quadratic(importance[name], spread), rtol=1e-4)


def test_factors_go_on_after_growing():
    (old_params, importance), (params, like) = with_factors("hidden")
    extended = jax.jit(extend_consolidation)(Consolidation(old_params, importance), params, like=like)
    following = consolidate(extended, params, like, rule="latest")
    for name, form in following.importance.items():
        assert forms.is_form(form) == forms.is_form(like[name])
        assert float(forms.trace(form)) > float(forms.trace(like[name]))


def test_new_leaves_have_the_forms_to_come():
    (params, like), _ = with_factors("outputs")
    trunk = restrict_consolidation(Consolidation(params, like), {"w": params["w"], "b": params["b"]})
    assert trunk.importance["w"] is like["w"]  # nothing is cut, so no like is needed
    shapes = jax.eval_shape(lambda: like)
    extended = extend_consolidation(trunk, params, like=shapes)
    chex.assert_trees_all_equal(extended.importance, like | {"v": forms.zeros_like(like["v"])})


def test_factors_need_an_importance_of_the_grown_network():
    (old_params, importance), (params, like) = with_factors("outputs")
    old = Consolidation(old_params, importance)
    with pytest.raises(ValueError, match=r"Kronecker factors, and those of v are not known: pass like=jax.eval_shape"):
        extend_consolidation(old, params)
    with pytest.raises(ValueError, match=r"and those of new are not known"):
        extend_consolidation(old, old_params | {"new": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"and those of v are not known"):
        restrict_consolidation(Consolidation(params, like), old_params)
    diagonals = like | {"v": params["v"]}
    with pytest.raises(ValueError, match=r"consolidation.importance/v has Kronecker factors, but like has a diagonal"):
        extend_consolidation(old, params, like=diagonals)
    diagonals = importance | {"v": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=r"consolidation.importance/v has a diagonal, but like has Kronecker factors"):
        extend_consolidation(Consolidation(old_params, diagonals), params, like=like)
    diagonals = like | {"w": params["w"]}
    with pytest.raises(ValueError, match=r"importance\['w'\] has Kronecker factors .*, but like has a diagonal"):
        extend_consolidation(old, params, like=diagonals)


def form_of(shape, split, order, matrices, *, full_rows=True):
    groups, rows, columns = matrices
    row_factor = jnp.ones((groups, rows, rows) if full_rows else (groups, rows))
    column_factor = jnp.broadcast_to(jnp.eye(columns), (groups, columns, columns))
    return forms.from_factors(row_factor, column_factor, Layout(shape, split, order, matrices))


def test_factors_that_are_no_block_are_refused():
    old = form_of((2, 6), (2, 2, 3), (1, 0, 2), (2, 2, 3))  # two heads of 3
    more_heads = form_of((2, 9), (2, 3, 3), (1, 0, 2), (3, 2, 3))
    larger_heads = form_of((2, 8), (2, 2, 4), (1, 0, 2), (2, 2, 4))
    kept = Consolidation({"w": jnp.ones((2, 6))}, {"w": old})
    grown = extend_consolidation(kept, {"w": jnp.ones((2, 9))}, like={"w": more_heads})
    np.testing.assert_allclose(forms.trace(grown.importance["w"]), forms.trace(old))
    message = r"importance/w has Kronecker factors of shapes \(2, 6\) and \(2, 8\), but the smaller leaf is no block"
    with pytest.raises(ValueError, match=message):
        extend_consolidation(kept, {"w": jnp.ones((2, 8))}, like={"w": larger_heads})
    with pytest.raises(ValueError, match="the smaller leaf is no block"):
        kept = Consolidation({"w": jnp.ones((2, 8))}, {"w": larger_heads})
        restrict_consolidation(kept, {"w": jnp.ones((2, 6))}, like={"w": old})


STRAIGHT = {size: ((size, 2), (size, 2), (0, 1), (1, size, 2)) for size in (3, 5)}


def test_a_matrix_does_not_become_a_diagonal():
    kept = Consolidation({"w": jnp.ones((3, 2))}, {"w": form_of(*STRAIGHT[3])})
    with pytest.raises(ValueError, match=r"importance/w has a matrix for a side .* larger max_side"):
        extend_consolidation(kept, {"w": jnp.ones((5, 2))}, like={"w": form_of(*STRAIGHT[5], full_rows=False)})
    kept = Consolidation({"w": jnp.ones((5, 2))}, {"w": form_of(*STRAIGHT[5])})
    with pytest.raises(ValueError, match=r"importance/w has a matrix for a side .* larger max_side"):
        restrict_consolidation(kept, {"w": jnp.ones((3, 2))}, like={"w": form_of(*STRAIGHT[3], full_rows=False)})


def test_a_diagonal_becomes_a_matrix():
    kept = Consolidation({"w": jnp.ones((5, 2))}, {"w": form_of(*STRAIGHT[5], full_rows=False)})
    cut = restrict_consolidation(kept, {"w": jnp.ones((3, 2))}, like={"w": form_of(*STRAIGHT[3])})
    np.testing.assert_allclose(forms.factors_of(cut.importance["w"])[0], np.eye(3)[None], atol=1e-6)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_what_is_compressed_grows_without_another_error(storage):
    old = compress_consolidation(OLD, importance=storage)
    extended = extend_consolidation(old, GROWN)
    assert {name for name, form in extended.importance.items() if forms.is_form(form)} == {"bias", "head", "trunk"}
    assert extended.anchor["head"].dtype == jnp.bfloat16 and extended.importance["head"].storage == storage
    exact = extend_consolidation(decompress_consolidation(old), GROWN)
    chex.assert_trees_all_equal(decompress_consolidation(extended).importance, exact.importance)
    chex.assert_trees_all_close(extended.anchor["head"].astype(jnp.float32), exact.anchor["head"], rtol=0.01)
    chex.assert_trees_all_equal(restrict_consolidation(extended, OLD.anchor), old)
    like = jax.eval_shape(lambda tree: compress_consolidation(Consolidation(tree, tree)).importance, GROWN)
    assert forms.is_form(extend_consolidation(old, GROWN, like=like).importance["other"])
    cut = restrict_consolidation(old, {"head": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    chex.assert_trees_all_equal(
        decompress_consolidation(cut).importance["head"], forms.diagonal(old.importance["head"])[:2]
    )
