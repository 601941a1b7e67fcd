"""Forms of leaves against dense float64 matrices, which `np.kron` makes of the same factors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import forms
from lifelong_jax._layouts import Layout, find_layout

STEP_SIZE = 0.7

# For each leaf its shape, and the index in the leaf of each entry of its matrices, `[groups, rows, columns]`.
LEAVES = {
    "plain": ((3, 4), np.arange(12).reshape(1, 3, 4)),
    "transposed": ((4, 3), np.arange(12).reshape(4, 3).T[None]),
    "vector": ((4,), np.arange(4).reshape(1, 1, 4)),
    "column": ((4,), np.arange(4).reshape(1, 4, 1)),
    "groups in front": ((2, 3, 4), np.arange(24).reshape(2, 3, 4)),
    "groups in the middle": ((3, 2, 4), np.arange(24).reshape(3, 2, 4).swapaxes(0, 1)),
    "groups in an axis": ((3, 8), np.arange(24).reshape(3, 2, 4).swapaxes(0, 1)),
    "groups behind": ((3, 4, 2), np.moveaxis(np.arange(24).reshape(3, 4, 2), -1, 0)),
    "several axes a side": ((2, 3, 2, 2), np.arange(24).reshape(1, 6, 4)),
    "axes in turns": ((2, 3, 2, 2), np.arange(24).reshape(2, 3, 2, 2).transpose(0, 2, 1, 3).reshape(1, 4, 6)),
    "rows out of order": ((2, 3, 4), np.arange(24).reshape(2, 3, 4).swapaxes(0, 1).reshape(1, 6, 4)),
}
SIDES = {"both": (True, True), "rows": (True, False), "columns": (False, True), "neither": (False, False)}
CASES = [(leaf, "both") for leaf in LEAVES] + [
    (leaf, sides) for leaf in ("transposed", "groups in the middle") for sides in SIDES if sides != "both"
]
over_cases = pytest.mark.parametrize(("leaf", "sides"), CASES)


def random_factor(random, groups, size, full=True):
    """A positive definite matrix for each group, or its diagonal."""
    root = random.normal(size=(groups, size, size + 1))
    factor = root @ root.swapaxes(1, 2)
    return factor if full else np.einsum("gii->gi", factor)


def random_factors(leaf, sides="both", seed=0):
    random = np.random.default_rng(seed)
    groups, rows, columns = LEAVES[leaf][1].shape
    full_rows, full_columns = SIDES[sides]
    return random_factor(random, groups, rows, full_rows), random_factor(random, groups, columns, full_columns)


def make_form(leaf, factors):
    shape, indices = LEAVES[leaf]
    return forms.from_factors(*map(jnp.asarray, factors), find_layout(indices, shape))


def as_matrices(factor):
    return factor if factor.ndim == 3 else factor[:, :, None] * np.eye(factor.shape[1])


def place(blocks, indices):
    """The leaf × leaf matrix of one block for each group."""
    matrix = np.zeros((indices.size, indices.size))
    for block, group in zip(blocks, indices, strict=True):
        matrix[np.ix_(group.ravel(), group.ravel())] = block
    return matrix


def dense(leaf, factors):
    """The leaf × leaf matrix of Kronecker products."""
    blocks = [np.kron(a, g) for a, g in zip(*map(as_matrices, factors), strict=True)]
    return place(blocks, LEAVES[leaf][1])


def dense_of(form):
    """The leaf × leaf matrix of a form, column by column."""
    size = np.prod(form.shape, dtype=int)
    basis = jnp.eye(size, dtype=form.dtype).reshape(size, *form.shape)
    return jax.vmap(functools.partial(forms.times, form))(basis).reshape(size, size)


def random_change(leaf, seed=9):
    return np.random.default_rng(seed).normal(size=LEAVES[leaf][0])


@jax.jit
def compute_all(form, change):
    return {
        "times": forms.times(form, change),
        "terms": forms.quadratic_terms(form, change),
        "gradient": jax.grad(lambda x: forms.quadratic_terms(form, x).sum())(change),
        "shrink": forms.shrink(form, change, STEP_SIZE),
        "scaled": dense_of(forms.scale(form, 2.5)),
        "diagonal": forms.diagonal(form),
        "trace": forms.trace(form),
        "factors": forms.factors_of(form),
    }


@functools.cache
def computed(leaf, sides):
    """What the functions return for a form, and its dense matrix."""
    factors = random_factors(leaf, sides)
    with jax.enable_x64(True):
        results = jax.device_get(compute_all(make_form(leaf, factors), random_change(leaf)))
    return results, dense(leaf, factors)


# Layouts.


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_layout_maps_a_leaf_to_its_matrices_and_back(leaf):
    shape, indices = LEAVES[leaf]
    layout = find_layout(indices, shape)
    change = random_change(leaf)
    matrices = layout.to_matrices(change)
    np.testing.assert_array_equal(matrices, change.ravel()[indices])
    np.testing.assert_array_equal(layout.from_matrices(matrices), change)
    assert (layout.shape, layout.matrices) == (shape, indices.shape)
    assert hash(layout) == hash(find_layout(indices, shape))


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reversed_entries_have_no_layout(leaf, axis):
    shape, indices = LEAVES[leaf]
    found = find_layout(np.flip(indices, axis), shape)
    assert (found is None) == (indices.shape[axis] > 1)


@pytest.mark.parametrize(
    "indices", [[0, 1, 3, 2], [1, 0, 3, 2], [0, 1, 2, 4, 3, 5], [0, 2, 1, 3, 4], [0, 0, 1, 1], [0, 2, 4, 1, 3, 6]]
)
def test_entries_in_no_order_have_no_layout(indices):
    indices = np.array(indices)
    assert find_layout(indices.reshape(1, 1, -1), (indices.size,)) is None


# Functions of one form.


@over_cases
def test_factors_are_those_that_the_form_was_made_of(leaf, sides):
    results, _ = computed(leaf, sides)
    chex.assert_trees_all_close(results["factors"], random_factors(leaf, sides), rtol=0, atol=1e-12)


@over_cases
def test_times_is_the_product_with_the_dense_matrix(leaf, sides):
    results, matrix = computed(leaf, sides)
    expected = matrix @ random_change(leaf).ravel()
    np.testing.assert_allclose(results["times"].ravel(), expected, rtol=1e-10, atol=1e-10)


@over_cases
def test_quadratic_terms_sum_to_the_quadratic_form_and_none_is_negative(leaf, sides):
    results, matrix = computed(leaf, sides)
    change = random_change(leaf).ravel()
    np.testing.assert_allclose(results["terms"].sum(), change @ matrix @ change, rtol=1e-12)
    assert (results["terms"] >= 0).all()


@over_cases
def test_the_gradient_of_the_quadratic_form_is_twice_times(leaf, sides):
    results, _ = computed(leaf, sides)
    np.testing.assert_allclose(results["gradient"], 2 * results["times"], rtol=1e-10, atol=1e-10)


@over_cases
def test_shrink_leaves_the_solution_of_the_proximal_step(leaf, sides):
    results, matrix = computed(leaf, sides)
    change = random_change(leaf)
    left = np.linalg.solve(np.eye(change.size) + STEP_SIZE * matrix, change.ravel())
    np.testing.assert_allclose((change - results["shrink"]).ravel(), left, rtol=0, atol=1e-12)


@over_cases
def test_scale_multiplies_the_dense_matrix(leaf, sides):
    results, matrix = computed(leaf, sides)
    np.testing.assert_allclose(results["scaled"], 2.5 * matrix, rtol=0, atol=1e-11)


@over_cases
def test_diagonal_and_trace_are_those_of_the_dense_matrix(leaf, sides):
    results, matrix = computed(leaf, sides)
    np.testing.assert_allclose(results["diagonal"], np.diag(matrix).reshape(LEAVES[leaf][0]), rtol=1e-10)
    np.testing.assert_allclose(results["trace"], np.trace(matrix), rtol=1e-12)


def test_an_array_is_the_diagonal_of_its_form():
    form, change = np.random.default_rng(0).uniform(size=(2, 3, 2)).astype(np.float32)
    chex.assert_trees_all_close(forms.times(form, change), form * change)
    chex.assert_trees_all_close(forms.quadratic_terms(form, change), form * change**2)
    chex.assert_trees_all_close(forms.scale(jnp.asarray(form), 3), 3 * form)
    chex.assert_trees_all_equal(forms.diagonal(form), form)
    chex.assert_trees_all_close(forms.trace(form), form.sum(dtype=np.float32), rtol=1e-6)


def test_eigenvalues_that_rounding_made_negative_are_zero():
    vectors = np.random.default_rng(0).normal(size=(1, 12, 2)).astype(np.float32)
    form = forms.from_factors(vectors @ vectors.swapaxes(1, 2), np.ones((1, 3), np.float32), Layout(*[None] * 4))
    assert np.linalg.eigvalsh(vectors @ vectors.swapaxes(1, 2)).min() < 0
    assert form.row_values.min() == 0
    assert form.column_basis is None
    np.testing.assert_allclose(forms.factors_of(form)[0], vectors @ vectors.swapaxes(1, 2), rtol=0, atol=1e-4)


# The proximal step.


@pytest.mark.parametrize("step_size", [0.0, 1e12, 1e38, np.inf])
def test_shrink_is_finite_at_any_step_size(step_size):
    row_values = jnp.asarray([[0.0, 1e-38, 1e-12, 1.0, 1e12, 1e30]], jnp.float32)
    form = forms.KroneckerFactors(
        None, row_values, None, jnp.asarray([[0.0, 1.0, 1e8]]), Layout((6, 3), (6, 3), (0, 1), (1, 6, 3))
    )
    taken = forms.shrink(form, jnp.full((6, 3), 2.0), jnp.float32(step_size))
    assert np.isfinite(taken).all()
    np.testing.assert_array_equal(taken[0], 0)
    np.testing.assert_array_equal(taken[:, 0], 0)
    stiffness = np.minimum(step_size, 3e38) * np.asarray([1.0, 1e12, 1e30])[:, None] * np.array([1.0, 1e8])
    np.testing.assert_allclose(taken[3:, 1:], 2 * stiffness / (1 + stiffness), rtol=1e-6)


@pytest.mark.parametrize("step_size", [0.0, 1e12, 1e38])
def test_a_large_step_takes_all_of_a_change_that_matters(step_size):
    form = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), make_form("plain", random_factors("plain")))
    change = random_change("plain").astype(np.float32)
    taken = forms.shrink(form, change, jnp.float32(step_size))
    np.testing.assert_allclose(taken, change if step_size else 0 * change, rtol=0, atol=1e-5)


def test_many_small_steps_are_one_large_step_to_first_order():
    with jax.enable_x64(True):
        form = make_form("groups in the middle", random_factors("groups in the middle"))
        change = jnp.asarray(random_change("groups in the middle"))
        shrink = jax.jit(forms.shrink)
        distances = []
        for step_size in (2e-5, 1e-5):
            left = change
            for _ in range(5):
                left = left - shrink(form, left, step_size)
            distances.append(np.abs(left - (change - shrink(form, change, 5 * step_size))).max())
    assert 1e-9 < distances[1] < 1e-4
    assert 3.9 < distances[0] / distances[1] < 4.1


# Sums.


def nearest_product(leaf, *summands):
    """The nearest Kronecker product of a sum, by Van Loan's rearrangement, and its relative distance."""
    pairs = [[as_matrices(factor) for factor in factors] for factors in summands]
    blocks, squared_error, squared_norm = [], 0.0, 0.0
    for group in range(LEAVES[leaf][1].shape[0]):
        rearranged = sum(np.outer(a[group].ravel(), g[group].ravel()) for a, g in pairs)
        left, values, right = np.linalg.svd(rearranged)
        rows, columns = (matrix[group].shape for matrix in pairs[0])
        blocks.append(np.kron(values[0] * left[:, 0].reshape(rows), right[0].reshape(columns)))
        squared_error, squared_norm = squared_error + np.sum(values[1:] ** 2), squared_norm + np.sum(values**2)
    return place(blocks, LEAVES[leaf][1]), np.sqrt(squared_error / squared_norm)


@jax.jit
def add_all(form, other):
    total = forms.add(form, other)
    return total, dense_of(total), forms.sum_error(form, other)


def check_sum(leaf, factors, others, rtol=1e-10):
    """Compares a sum with the nearest product, and its error with the explicit distance."""
    with jax.enable_x64(True):
        form, matrix, error = jax.device_get(add_all(make_form(leaf, factors), make_form(leaf, others)))
    expected, expected_error = nearest_product(leaf, factors, others)
    exact = dense(leaf, factors) + dense(leaf, others)
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=rtol * np.abs(expected).max())
    np.testing.assert_allclose(error, expected_error, rtol=1e-8, atol=1e-7)
    np.testing.assert_allclose(error, np.linalg.norm(matrix - exact) / np.linalg.norm(exact), rtol=1e-8, atol=1e-7)
    assert (form.row_values >= 0).all()
    assert (form.column_values >= 0).all()
    return error


@pytest.mark.parametrize(
    ("leaf", "sides"), [("vector", "both"), ("column", "both"), *(("groups in the middle", sides) for sides in SIDES)]
)
def test_a_sum_is_the_nearest_kronecker_product(leaf, sides):
    factors, others = random_factors(leaf, sides), random_factors(leaf, sides, seed=1)
    error = check_sum(leaf, factors, others)
    assert (error > 0.03) == (leaf not in ("vector", "column"))
    assert error < np.sqrt(0.5)


@pytest.mark.parametrize("ratio", [1e-9, 1e-3, 1e6])
def test_a_sum_of_unequal_forms_is_the_nearest_kronecker_product(ratio):
    leaf = "groups in the middle"
    (rows, columns), others = random_factors(leaf), random_factors(leaf, seed=1)
    check_sum(leaf, (ratio * rows, columns), others)
    check_sum(leaf, (rows * np.array([1.0, ratio])[:, None, None], columns), others)


@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e-8, 1e-4])
def test_a_sum_of_nearly_parallel_forms_is_the_nearest_kronecker_product(distance):
    leaf = "groups in the middle"
    factors, others = random_factors(leaf), random_factors(leaf, seed=1)
    near = tuple(3 * factor + distance * other for factor, other in zip(factors, others, strict=True))
    check_sum(leaf, factors, near)


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1])
def test_a_sum_of_forms_that_share_no_entry_keeps_the_larger_half(gap):
    factors = np.diag([1.0, 1.0, 0.0])[None], np.diag([1.0, 0.0, 1.0, 0.0])[None]
    others = np.diag([0.0, 0.0, np.sqrt(2)])[None], (1 - gap) * np.diag([0.0, 1.0, 0.0, 1.0])[None]
    with jax.enable_x64(True):
        _, matrix, error = jax.device_get(add_all(make_form("plain", factors), make_form("plain", others)))
    exact = dense("plain", factors) + dense("plain", others)
    np.testing.assert_allclose(error, nearest_product("plain", factors, others)[1], rtol=1e-4)
    np.testing.assert_allclose(error, np.linalg.norm(matrix - exact) / np.linalg.norm(exact), rtol=1e-10)


@pytest.mark.parametrize("zero", ["first", "second", "both", "one group", "one side"])
def test_zeros_add_nothing(zero):
    leaf = "groups in the middle"
    factors = random_factors(leaf)
    with jax.enable_x64(True):
        form = make_form(leaf, factors)
        zeros = forms.zeros_like(form)
        if zero == "one group":
            zeros = make_form(leaf, [factor * np.array([1.0, 0.0])[:, None, None] for factor in factors])
        if zero == "one side":
            zeros = make_form(leaf, (0 * factors[0], factors[1]))
        first, second = (zeros, form) if zero != "second" else (form, zeros)
        second = zeros if zero == "both" else second
        total, matrix, error = add_all(first, second)
        expected = dense_of(first) + dense_of(second)
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(error, 0, atol=1e-7)
    chex.assert_tree_all_finite(total)


@pytest.mark.parametrize(
    ("row_scale", "column_scale"),
    [(1e20, 1e-20), (1e-20, 1e20), (1e20, 1e10), (1e10, 1e20), (1e-20, 1e-10), (1e-10, 1e-20), (1e30, 1e-30)],
)
@pytest.mark.parametrize("sides", ["both", "neither"])
def test_a_sum_of_huge_and_tiny_factors_is_exact_in_float32(row_scale, column_scale, sides):
    leaf = "groups in the middle"
    scales = (row_scale, column_scale)
    summands = [
        [(scale * factor).astype(np.float32) for scale, factor in zip(scales, factors, strict=True)]
        for factors in (random_factors(leaf, sides), random_factors(leaf, sides, seed=1))
    ]
    total, _, error = add_all(*(make_form(leaf, factors) for factors in summands))
    expected, expected_error = nearest_product(leaf, *([f.astype(np.float64) for f in fs] for fs in summands))
    factors = [np.asarray(factor, np.float64) for factor in forms.factors_of(total)]
    np.testing.assert_allclose(dense(leaf, factors), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(error, expected_error, rtol=1e-2)


def test_arrays_are_added_exactly():
    form, other = np.random.default_rng(0).uniform(size=(2, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(forms.add(form, other), form + other)
    assert forms.sum_error(jnp.asarray(form), jnp.asarray(other)) == 0


# Transformations and trees.


def test_batches_of_forms_are_mapped():
    leaf = "groups in the middle"
    with jax.enable_x64(True):
        singles = [make_form(leaf, random_factors(leaf, seed=seed)) for seed in (0, 1)]
        others = [make_form(leaf, random_factors(leaf, seed=seed)) for seed in (2, 3)]
        changes = np.stack([random_change(leaf, seed) for seed in (0, 1)])
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731

        def both(form, other, change):
            return compute_all(form, change), add_all(form, other)[1:]

        batched = jax.jit(jax.vmap(both))(stack(singles), stack(others), changes)
        one_by_one = [both(*arguments) for arguments in zip(singles, others, changes, strict=True)]
        for number, single in enumerate(one_by_one):
            picked = jax.tree.map(lambda leaf, number=number: leaf[number], batched)
            chex.assert_trees_all_close(picked, single, rtol=1e-10, atol=1e-10)


def test_kronecker_factors_are_a_tree_whose_layout_is_static():
    form = make_form("plain", random_factors("plain", "rows"))
    leaves, structure = jax.tree.flatten(form)
    assert [leaf.shape for leaf in leaves] == [(1, 3, 3), (1, 3), (1, 4)]
    again = jax.tree.unflatten(structure, leaves)
    assert again.layout == form.layout
    chex.assert_trees_all_equal(again, form)
    assert (form.shape, form.dtype) == ((3, 4), np.float32)
    transposed = forms.KroneckerFactors(None, form.row_values, None, form.column_values, Layout((4, 3), *[None] * 3))
    plain = forms.KroneckerFactors(None, form.row_values, None, form.column_values, form.layout)
    assert jax.tree.structure(plain) != jax.tree.structure(transposed)
    assert jax.tree.structure(plain) != structure  # its row basis is None
    assert forms.is_form(form)
    assert not any(map(forms.is_form, leaves))


@pytest.mark.parametrize("sides", SIDES)
def test_zeros_like_needs_shapes_alone(sides):
    leaf = "transposed"
    form = make_form(leaf, random_factors(leaf, sides))
    for like in (form, jax.eval_shape(lambda: form)):
        zeros = forms.zeros_like(like)
        chex.assert_trees_all_equal_shapes_and_dtypes(zeros, form)
        assert jax.tree.structure(zeros) == jax.tree.structure(form)
        np.testing.assert_array_equal(dense_of(zeros), 0)
        for basis in (zeros.row_basis, zeros.column_basis):
            assert basis is None or (basis == jnp.eye(basis.shape[-1])).all()
    diagonal = forms.zeros_like(jax.ShapeDtypeStruct((2, 3), jnp.bfloat16))
    chex.assert_trees_all_equal(diagonal, jnp.zeros((2, 3), jnp.bfloat16))


def test_num_bytes_needs_shapes_alone():
    def importance():
        full, half = random_factors("groups in front"), random_factors("transposed", "columns")
        return {
            "full": make_form("groups in front", full),
            "half": make_form("transposed", half),
            "diagonal": jnp.zeros((5, 3), jnp.bfloat16),
        }

    expected = 4 * (2 * (9 + 3) + 2 * (16 + 4)) + 4 * (3 + 16 + 4) + 2 * 15
    assert forms.num_bytes(importance()) == expected
    assert forms.num_bytes(jax.eval_shape(importance)) == expected
