"""Merged parameters are means weighted by importances, with a floor that has no unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import Consolidation, forms, merge
from lifelong_jax._layouts import Layout
from lifelong_jax.compression import compress, decompress
from lifelong_jax.merging import merge_models
from tests.problems import flat

SHAPES = {"w": (3, 5), "b": (5,), "scale": ()}


def make_trees(num_models=3, dtype=np.float64):
    """Parameters, and importances, some of which are 0."""
    random = np.random.default_rng(0)
    models, importances = (
        [{name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in SHAPES.items()} for _ in range(num)]
        for num in (num_models, num_models)
    )
    return models, [jax.tree.map(lambda leaf: jnp.maximum(leaf, 0), importance) for importance in importances]


def expected(models, importances, floor, weights):
    """The formula, over all entries of all trees at once."""
    models, importances = (np.stack([flat(tree) for tree in trees]) for trees in (models, importances))
    precisions = np.asarray(weights)[:, None] * (importances + floor * importances.mean())
    return (precisions * models).sum(axis=0) / precisions.sum(axis=0)


@pytest.mark.parametrize("floor", [1e-3, 0.3])
@pytest.mark.parametrize("weights", [None, (2.0, 0.0, 0.5)])
def test_the_formula(floor, weights):
    with jax.enable_x64(True):
        models, importances = make_trees()
        merged = merge_models(models, importances, floor=floor, weights=weights)
        np.testing.assert_allclose(flat(merged), expected(models, importances, floor, weights or (1, 1, 1)), rtol=1e-12)


def test_without_a_floor_it_is_the_anchor_of_merged_consolidations():
    models, importances = make_trees(dtype=np.float32)
    importances = [jax.tree.map(lambda leaf: leaf + 0.1, importance) for importance in importances]
    consolidations = [Consolidation(*pair) for pair in zip(models, importances, strict=True)]
    anchor = merge(consolidations, strengths=[1.0, 2.0, 0.5]).anchor
    merged = merge_models(models, importances, floor=0.0, weights=[1.0, 2.0, 0.5])
    np.testing.assert_allclose(flat(merged), flat(anchor), rtol=1e-5, atol=1e-6)


def test_a_large_floor_gives_the_plain_average_and_so_does_no_importance():
    models, importances = make_trees(dtype=np.float32)
    plain = np.average([flat(model) for model in models], axis=0, weights=[1, 3, 1])
    none = [jax.tree.map(jnp.zeros_like, model) for model in models]
    for given, floor in ((importances, 1e8), (none, 0.3), (none, 0.0)):
        np.testing.assert_allclose(flat(merge_models(models, given, floor=floor, weights=[1, 3, 1])), plain, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-30, 1e30, 2.0**126])
def test_the_unit_of_the_importances_does_not_matter(unit):
    models, importances = make_trees(dtype=np.float32)
    scaled = [jax.tree.map(lambda leaf: leaf * np.float32(unit), importance) for importance in importances]
    np.testing.assert_allclose(
        flat(merge_models(models, scaled)), flat(merge_models(models, importances)), rtol=1e-4, atol=1e-6
    )


def test_where_no_network_needs_a_parameter_it_is_their_mean():
    merged = merge_models([jnp.array([1.0, 1.0]), jnp.array([3.0, 3.0])], [jnp.array([0.0, 1.0])] * 2, floor=0.0)
    np.testing.assert_array_equal(merged, [2, 2])


def test_one_network_and_equal_networks_stay_as_they_are():
    (model, _, _), (importance, other, _) = make_trees(dtype=np.float32)
    np.testing.assert_array_equal(flat(merge_models([model], [importance])), flat(model))
    np.testing.assert_array_equal(flat(merge_models([model, model], [importance, other])), flat(model))


def test_dtypes_are_kept_and_none_stays():
    models = [{"w": jnp.full(2, x, jnp.bfloat16), "frozen": None} for x in (1.0, 2.0)]
    importances = [{"w": jnp.full(2, x, jnp.float32), "frozen": None} for x in (3.0, 1.0)]
    merged = merge_models(models, importances, floor=0.0)
    assert merged["frozen"] is None
    assert merged["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["w"].astype(jnp.float32), [1.25, 1.25])


def test_under_jit_and_vmap():
    models, importances = make_trees(2, np.float32)
    plain = merge_models(models, importances, floor=0.3, weights=[1.0, 2.0])
    run = lambda floor, weight, *trees: merge_models(*trees, floor=floor, weights=[1.0, weight])  # noqa: E731
    floors = jax.jit(jax.vmap(run, (0, None, None, None)))(jnp.array([0.3, 1.0]), 2.0, models, importances)
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[0], floors)), flat(plain), rtol=1e-5)


def test_codes_count_for_what_they_stand_for():
    models, importances = make_trees(2, np.float32)
    codes = jax.jit(lambda trees: [forms.tree_map(compress, tree) for tree in trees])(importances)
    decoded = jax.jit(lambda trees: [forms.tree_map(decompress, tree) for tree in trees])(codes)
    found, expected = merge_models(models, codes), merge_models(models, decoded)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-6)
    assert not np.allclose(flat(found), flat(merge_models(models, importances)), rtol=1e-6)


def test_errors():
    models, importances = make_trees(2, np.float32)
    negative = jax.tree.map(lambda leaf: leaf - 1, importances[1])
    layout = Layout((3, 5), (3, 5), (0, 1), (1, 3, 5))
    factored = importances[1] | {"w": forms.from_factors(jnp.ones((1, 3)), jnp.ones((1, 5)), layout)}
    for arguments, options, message in (
        (([], []), {}, "one or more networks, .* but has 0, 0 and 0"),
        ((models, importances[:1]), {}, "has 2, 1 and 2"),
        ((models, importances), {"weights": [1.0]}, "has 2, 2 and 1"),
        ((models, importances), {"weights": [0.0, 0.0]}, "weights are all 0"),
        ((models, importances), {"weights": [1.0, -1.0]}, r"weights\[1\] must be finite and not negative"),
        ((models, importances), {"floor": -1.0}, "floor must be finite and not negative"),
        ((models, importances), {"floor": np.inf}, "floor must be finite and not negative"),
        (([models[0], models[1] | {"b": jnp.ones(4)}], importances), {}, r"params_list\[1\]\['b'\] has shape \(4,\)"),
        (
            (models, [importances[0], {"w": importances[1]["w"]}]),
            {},
            r"importances\[1\] has no leaf",
        ),
        ((models, [importances[0], negative]), {}, r"importances\[1\].*NaN, infinite or negative"),
        ((models, [importances[0], factored]), {}, r"importances\[1\] has Kronecker factors.*forms.diagonal"),
        (([models[0] | {"b": jnp.full(5, jnp.nan)}, models[1]], importances), {}, r"params_list\[0\]\['b'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_models(*arguments, **options)
    with pytest.raises(TypeError, match=r"params_list\[0\].*floating-point"):
        merge_models([{"w": jnp.arange(2)}], [{"w": jnp.ones(2)}])
