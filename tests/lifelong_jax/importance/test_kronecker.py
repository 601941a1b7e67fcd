"""Kronecker factors against the definition, one example after the other, and against full Fisher matrices.

In the networks by hand, each layer is one product of its rows with the matrices that stand at given entries of the
leaf. Their rows, and the Jacobian with respect to zeros that are added to their outputs, make the factors.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lifelong_jax import empirical_kronecker_fisher, fisher_diagonal, forms, kronecker_fisher
from tests.lifelong_jax.importance.problems import NUM_CLASSES, loss_of, make_data, make_mlp, mlp

WEIGHTS = np.array([0.5, 2.0, 0.0, 1.5, 0.25])


def normal(seed: int, *shape: int) -> np.ndarray:
    return 0.6 * np.random.default_rng(seed).normal(size=shape)


def make_params(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


def entries(*shape: int) -> np.ndarray:
    """The index of each entry of a leaf."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def place(blocks: list[np.ndarray], indices: np.ndarray) -> np.ndarray:
    """The leaf × leaf matrix with a block for each group, of the entries of `indices`."""
    matrix = np.zeros((indices.size, indices.size))
    for block, group in zip(blocks, indices, strict=True):
        matrix[np.ix_(group.ravel(), group.ravel())] = block
    return matrix


def factors_of(form: forms.KroneckerFactors) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two matrices of each group."""

    def matrices(basis: Any, values: Any) -> Any:
        if basis is None:
            return map(np.diag, np.asarray(values))
        return [b * v @ b.T for b, v in zip(np.asarray(basis), np.asarray(values), strict=True)]

    rows, columns = matrices(form.row_basis, form.row_values), matrices(form.column_basis, form.column_values)
    return list(zip(rows, columns, strict=True))


def dense(form: Any) -> np.ndarray:
    """The leaf × leaf matrix of a form."""
    if not forms.is_form(form):
        return np.diag(np.ravel(form))
    return place([np.kron(*pair) for pair in factors_of(form)], form.layout.to_matrices(entries(*form.shape)))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=0))


def assert_trees_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Compares importances by their dense matrices: eigenvectors are not unique."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    matrices = (jax.tree.leaves(jax.tree.map(dense, tree, is_leaf=forms.is_form)) for tree in (actual, expected))
    for ours, theirs in zip(*matrices, strict=True):
        assert_close(ours, theirs, tolerance)


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def covariance(likelihood: str, outputs: np.ndarray) -> np.ndarray:
    """The covariance of the gradients of log p(label) with respect to all outputs of one example."""
    if likelihood == "gaussian":
        return np.eye(outputs.size)
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-outputs.ravel()))
        return np.diag(p * (1 - p))
    labels = softmax(outputs).reshape(-1, outputs.shape[-1])
    of_labels = [np.diag(p) - np.outer(p, p) for p in labels]
    return place(of_labels, entries(*labels.shape))


# Networks, as a user writes them and by hand.


class Network(NamedTuple):
    output_fn: Callable[[Any, Any], jax.Array]
    by_hand: Callable[[Any, Any, Any], jax.Array]  # (layer, params, x) -> outputs
    params: dict[str, np.ndarray]
    examples: np.ndarray
    likelihood: str
    layers: dict[str, tuple[np.ndarray, int]]  # the entries [groups, rows, columns], and the number of positions
    vectors: dict[str, np.ndarray]  # the entries [groups, 1, columns]
    lookups: tuple[str, ...] = ()
    sharing: tuple[str, ...] = ("expand", "reduce")


NETWORKS: dict[str, Callable[[], Network]] = {}


def network(make: Callable[[], Network]) -> Callable[[], Network]:
    NETWORKS[make.__name__] = functools.cache(make)
    return NETWORKS[make.__name__]


def normalized(x: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 0.1)


@network
def vectors() -> Network:
    def rest(p: Any, y: jax.Array) -> jax.Array:
        y = jnp.tanh(y @ p["tied"]) @ p["tied"].T + p["twice"]
        return jnp.tanh(y * p["twice"] @ jnp.flip(p["flipped"], axis=0)) * p["scalar"] + p["one"]

    def output_fn(p: Any, x: jax.Array) -> jax.Array:
        y = normalized(jnp.tanh(x @ p["kernel"] + p["bias"])) * p["scale"]
        y = jnp.tanh(jnp.einsum("hd,hed->he", y.reshape(2, 2), p["heads"]) + p["matrix"])
        y = jnp.tanh(jnp.einsum("hd,hd->h", y, p["dots"]) + p["shifts"])
        stack = {"w": jnp.moveaxis(p["stack"], 1, 0), "b": p["biases"]}
        y, _ = jax.lax.scan(lambda y, q: (jnp.tanh(q["w"] @ y + q["b"]), None), y, stack)
        return p["last"] @ rest(p, y)

    def by_hand(layer: Any, p: Any, x: jax.Array) -> jax.Array:
        y = normalized(jnp.tanh(layer("kernel", x[None, None])[0, 0] + p["bias"])) * p["scale"]
        y = jnp.tanh(layer("heads", y.reshape(2, 1, 2)) + p["matrix"][:, None])
        y = jnp.tanh(layer("dots", y).reshape(2) + p["shifts"])
        for g in range(3):
            y = jnp.tanh(layer("stack", y[None, None], np.s_[g : g + 1])[0, 0] + p["biases"][g])
        return layer("last", rest(p, y)[None, None])[0, 0]

    params = make_params(
        **{"kernel": (3, 4), "bias": (4,), "scale": (4,), "heads": (2, 3, 2), "matrix": (2, 3), "dots": (2, 3)},
        **{"shifts": (2,), "stack": (2, 3, 2), "biases": (3, 2), "tied": (2, 2), "twice": (2,), "flipped": (2, 3)},
        **{"scalar": (), "one": (1,), "last": (4, 3), "unused": (2, 3), "unused vector": (3,)},
    )
    layers = {
        "kernel": (entries(1, 3, 4), 1),
        "heads": (entries(2, 3, 2).swapaxes(1, 2), 1),
        "dots": (entries(2, 3, 1), 1),
        "stack": (entries(2, 3, 2).transpose(1, 2, 0), 1),
        "last": (entries(4, 3).T[None], 1),
    }
    in_vectors = {"bias": entries(1, 1, 4), "scale": entries(1, 1, 4), "twice": entries(1, 1, 2)}
    in_vectors |= {"shifts": entries(1, 1, 2), "biases": entries(3, 1, 2)}
    examples = 2 * normal(99, 5, 3)
    return Network(output_fn, by_hand, params, examples, "categorical", layers, in_vectors, sharing=("expand",))


@network
def transformer() -> Network:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.exp(jnp.einsum("thk,shk->hts", q, k))
        # The 1 makes the outputs depend on a shift of all keys: no gradient is 0.
        return jnp.einsum("hts,shk->thk", scores / (1 + scores.sum(axis=-1, keepdims=True)), v)

    def output_fn(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["table"][tokens] + jnp.take(p["columns"], tokens, axis=1).T + p["places"]
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[name]) for name in "qkv")
        x = jnp.tanh(x + jnp.einsum("thk,hkd->td", attend(q, k, v), p["o"]))
        x = normalized(jnp.tanh(x @ p["kernel"] + p["bias"])) * p["scale"]
        return x @ p["transposed"].T

    def by_hand(layer: Any, p: Any, tokens: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(tokens, 6, dtype=p["table"].dtype)[None]
        x = (layer("table", one_hot) + layer("columns", one_hot))[0] + p["places"]
        q, k, v = (layer(name, x[None]).reshape(4, 2, 2) for name in "qkv")
        x = jnp.tanh(x + layer("o", attend(q, k, v).reshape(1, 4, 4))[0])
        x = normalized(jnp.tanh(layer("kernel", x[None])[0] + p["bias"])) * p["scale"]
        return layer("transposed", x[None])[0]

    params = make_params(
        **{"q": (4, 2, 2), "k": (4, 2, 2), "v": (4, 2, 2), "o": (2, 2, 4), "table": (6, 4), "columns": (4, 6)},
        **{"places": (4, 4), "kernel": (4, 5), "bias": (5,), "scale": (5,), "transposed": (3, 5)},
    )
    layers = {name: (entries(1, 4, 4), 4) for name in "qkvo"}
    layers |= {"table": (entries(1, 6, 4), 4), "columns": (entries(4, 6).T[None], 4)}
    layers |= {"kernel": (entries(1, 4, 5), 4), "transposed": (entries(3, 5).T[None], 4)}
    tokens = np.random.default_rng(0).integers(0, 5, (5, 4)).astype(np.int32)  # some repeat, and 5 never comes
    in_vectors = {"bias": entries(1, 1, 5), "scale": entries(1, 1, 5)}
    return Network(output_fn, by_hand, params, tokens, "categorical", layers, in_vectors, ("table", "columns"))


@network
def convolutions() -> Network:
    def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, groups: int) -> jax.Array:
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x[None], kernel, strides, padding, **options)[0]

    def output_fn(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(convolve(x, p["strided"], (2, 1), ((1, 0), (0, 1)), 1) + p["bias"])
        x = jnp.tanh(convolve(x, p["grouped"], (1, 2), "VALID", 2))
        return x.reshape(-1) @ p["dense"]

    def windows(x: jax.Array, height: int, width: int, strides: tuple[int, int]) -> jax.Array:
        """All windows of an image, as rows."""
        tops, lefts = range(0, x.shape[0] - height + 1, strides[0]), range(0, x.shape[1] - width + 1, strides[1])
        return jnp.stack([x[i : i + height, j : j + width].reshape(-1) for i in tops for j in lefts])

    def by_hand(layer: Any, p: Any, x: jax.Array) -> jax.Array:
        rows = windows(jnp.pad(x, ((1, 0), (0, 1), (0, 0))), 3, 2, (2, 1))
        x = jnp.tanh(layer("strided", rows[None])[0] + p["bias"]).reshape(2, 3, 4)
        rows = jnp.stack([windows(channels, 1, 2, (1, 2)) for channels in (x[:, :, :2], x[:, :, 2:])])
        x = jnp.tanh(layer("grouped", rows))  # [groups, positions, columns]
        return layer("dense", x.swapaxes(0, 1).reshape(1, 1, 12))[0, 0]

    params = make_params(strided=(3, 2, 2, 4), bias=(4,), grouped=(1, 2, 2, 6), dense=(12, 3))
    layers = {
        "strided": (entries(1, 12, 4), 6),
        "grouped": (entries(4, 2, 3).swapaxes(0, 1), 2),
        "dense": (entries(1, 12, 3), 1),
    }
    in_vectors, images = {"bias": entries(1, 1, 4)}, 2 * normal(9, 5, 4, 3, 2)
    return Network(output_fn, by_hand, params, images, "bernoulli", layers, in_vectors)


@network
def recurrent() -> Network:
    """Recurrent layers, one after the other; then, in a scan over steps, a stack of layers that the steps share."""

    def output_fn(p: Any, x: jax.Array) -> jax.Array:
        def recurrent_layer(x: jax.Array, q: Any) -> tuple[jax.Array, None]:
            def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
                state = jnp.tanh(state @ q["w"] + x @ p["shared"] + q["b"])
                return state, state

            return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1], None

        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.scan(lambda y, w: (jnp.tanh(w @ y), None), state + x, p["layers"])[0], None

        x, _ = jax.lax.scan(recurrent_layer, x, {"w": p["stack"], "b": p["biases"]})
        return jax.lax.scan(step, jnp.zeros_like(x[0]), x, reverse=True)[0]

    def by_hand(layer: Any, p: Any, x: jax.Array) -> jax.Array:
        for g in range(2):
            state, states = jnp.zeros_like(x[0]), []
            for t in range(3):
                products = layer("stack", state[None, None], np.s_[g : g + 1, t : t + 1])
                products += layer("shared", x[t][None, None], np.s_[:, 3 * g + t : 3 * g + t + 1])
                state = jnp.tanh(products[0, 0] + p["biases"][g])
                states.append(state)
            x = states
        state = jnp.zeros_like(x[0])
        for t in (2, 1, 0):
            state = state + x[t]
            for g in range(2):
                state = jnp.tanh(layer("layers", state[None, None], np.s_[g : g + 1, t : t + 1])[0, 0])
        return state

    params = make_params(stack=(2, 3, 3), shared=(3, 3), biases=(2, 3), layers=(2, 3, 3))
    layers = {"stack": (entries(2, 3, 3), 3), "shared": (entries(1, 3, 3), 6)}
    layers["layers"] = (entries(2, 3, 3).swapaxes(1, 2), 3)
    return Network(output_fn, by_hand, params, normal(9, 5, 3, 3), "gaussian", layers, {"biases": entries(2, 1, 3)})


def run_by_hand(net: Network, params: Any, taps: Any, x: Any) -> tuple[jax.Array, Any]:
    """The outputs of one example, with the taps added to those of layers; again, with the rows of the layers."""
    rows_of = {
        name: jnp.zeros((indices.shape[0], positions, indices.shape[1]), taps[name].dtype)
        for name, (indices, positions) in net.layers.items()
    }

    def layer(name: str, rows: jax.Array, at: Any = np.s_[:]) -> jax.Array:
        groups = at[0] if isinstance(at, tuple) else at
        rows_of[name] = rows_of[name].at[at].set(rows)
        return rows @ params[name].ravel()[net.layers[name][0][groups]] + taps[name][at]

    outputs = net.by_hand(layer, params, x)
    return outputs, (outputs, rows_of)


@functools.cache
def results(name: str) -> dict[str, tuple[Any, dict[str, np.ndarray]]]:
    """For both conventions, the importance, and what a loop over examples makes of it; in one program."""
    net = NETWORKS[name]()
    taps = {
        name: np.zeros((indices.shape[0], positions, indices.shape[2]))
        for name, (indices, positions) in net.layers.items()
    }
    rest = {leaf: value for leaf, value in net.params.items() if leaf not in net.layers}
    settings = {"likelihood": net.likelihood, "weights": WEIGHTS, "microbatch_size": 2}

    @jax.jit
    def run(params: Any, rest: Any, examples: Any) -> Any:
        compute = functools.partial(kronecker_fisher, net.output_fn, params, examples, **settings)
        computed = [compute(weight_sharing=sharing) for sharing in net.sharing]

        def of_example(x: Any) -> Any:
            by_hand = jax.jacrev(functools.partial(run_by_hand, net, params), has_aux=True)(taps, x)
            return net.output_fn(params, x), by_hand, jax.jacrev(lambda rest: net.output_fn(params | rest, x))(rest)

        return computed, jax.lax.map(of_example, examples)

    with jax.enable_x64(True):
        computed, (outputs, by_hand, jacobian) = jax.device_get(run(net.params, rest, net.examples))
    columns, (outputs_by_hand, rows) = by_hand
    assert_close(outputs, outputs_by_hand, 1e-12)
    expected = [loop(net, outputs, rows, columns, jacobian, s == "reduce") for s in net.sharing]
    return dict(zip(net.sharing, zip(computed, expected, strict=True), strict=True))


def loop(net: Network, outputs: Any, rows: Any, columns: Any, jacobian: Any, reduce: bool) -> dict[str, np.ndarray]:
    """The definition, one example after the other: the leaf × leaf matrix of each leaf."""
    weights, expected = WEIGHTS / WEIGHTS.sum(), {}
    covariances = [weight * covariance(net.likelihood, f) for weight, f in zip(weights, outputs, strict=True)]
    for leaf, gradients in jacobian.items():
        gradients = gradients.reshape(len(outputs), -1, net.params[leaf].size)
        full = sum(g.T @ c @ g for g, c in zip(gradients, covariances, strict=True))
        # The matrix of a vector, or of each vector of a stack; of other leaves, the diagonal.
        groups = net.vectors.get(leaf, entries(len(full), 1))
        expected[leaf] = place([full[np.ix_(group.ravel(), group.ravel())] for group in groups], groups)
    for leaf, (indices, _) in net.layers.items():
        blocks = []
        for group in range(len(indices)):
            a = g = 0.0
            for weight, c, x, y in zip(weights, covariances, rows[leaf], columns[leaf], strict=True):
                x, y = x[group], y.reshape(-1, *y.shape[-3:])[:, group]
                if reduce:
                    x, y = x.mean(axis=0, keepdims=True), y.sum(axis=1, keepdims=True)
                a = a + weight * sum(np.outer(row, row) for row in x) / len(x)
                g = g + sum(at.T @ c @ at for at in y.swapaxes(0, 1))
            blocks.append(np.kron(np.diag(np.diag(a)) if leaf in net.lookups else a, g))
        expected[leaf] = place(blocks, indices)
    return expected


@pytest.mark.parametrize(
    ("name", "sharing", "leaf"),
    [(n, sharing, leaf) for n, make in NETWORKS.items() for sharing in make().sharing for leaf in make().params],
)
def test_equals_a_loop_over_examples(name: str, sharing: str, leaf: str) -> None:
    net, (importance, expected) = NETWORKS[name](), results(name)[sharing]
    form, groups = importance[leaf], net.layers[leaf][0] if leaf in net.layers else net.vectors.get(leaf)
    assert (form.layout.matrices if forms.is_form(form) else None) == (None if groups is None else groups.shape)
    assert_close(dense(form), expected[leaf])
    assert expected[leaf].any() == (not leaf.startswith("unused"))


# Where the factors are exact.


def blocks_of_fisher(output_fn: Any, params: Any, examples: Any, likelihood: str) -> Any:
    """The leaf × leaf blocks of the full Fisher matrix."""
    outputs, jacobian = jax.jit(jax.vmap(lambda x: (output_fn(params, x), jax.jacrev(output_fn)(params, x))))(examples)
    covariances = [covariance(likelihood, np.asarray(f)) for f in outputs]

    def block(leaf: Any, gradients: Any) -> np.ndarray:
        gradients = np.asarray(gradients).reshape(len(outputs), -1, leaf.size)
        return sum(g.T @ c @ g for g, c in zip(gradients, covariances, strict=True)) / len(outputs)

    return jax.tree.map(block, params, jacobian)


def deep_linear(params: Any, x: jax.Array) -> jax.Array:
    return x @ params[0] @ params[1]


LINEAR = [normal(0, 3, 4), normal(1, 4, 2)]
EXACT = {
    "one example": (mlp, make_mlp, (1, 3), "categorical", "expand"),
    "a deep linear network": (deep_linear, lambda: LINEAR, (6, 3), "gaussian", "expand"),
    "a loss at each token": (deep_linear, lambda: LINEAR, (6, 4, 3), "gaussian", "expand"),
    "a loss of the mean": (lambda p, x: deep_linear(p, x).mean(0), lambda: LINEAR, (6, 4, 3), "gaussian", "reduce"),
    "a vector of weights": (lambda p, x: (x @ p)[None], lambda: normal(0, 3), (6, 3), "bernoulli", "expand"),
}


@pytest.mark.parametrize("case", EXACT)
def test_equals_the_blocks_of_the_full_fisher_matrix(case: str) -> None:
    output_fn, make, shape, likelihood, sharing = EXACT[case]
    with jax.enable_x64(True):
        params, examples = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (make(), normal(5, *shape)))
        importance = kronecker_fisher(output_fn, params, examples, likelihood=likelihood, weight_sharing=sharing)
        expected = blocks_of_fisher(output_fn, params, examples, likelihood)
    computed = jax.tree.map(dense, jax.device_get(importance), is_leaf=forms.is_form)
    jax.tree.map(assert_close, computed, expected)


def test_large_sides() -> None:
    with jax.enable_x64(True):
        params, inputs = [normal(0, 200, 130), normal(1, 130, 2)], normal(2, 5, 200)
        first, last = kronecker_fisher(deep_linear, params, inputs, likelihood="gaussian")
    hidden = inputs @ params[0]
    expected = (inputs.T @ inputs / 5, params[1] @ params[1].T), (hidden.T @ hidden / 5, np.eye(2))
    jax.tree.map(assert_close, (*factors_of(first), *factors_of(last)), expected)


# Estimators and options, on a small network.


@functools.cache
def mlp_problem() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        inputs, labels = jax.device_get(make_data(jnp.float64))
        return jax.device_get(make_mlp(jnp.float64)), inputs, labels, np.linspace(0.0, 2.0, len(inputs))


@functools.cache
def mlp_fisher(factor: float = 1.0, seed: int | None = None, **options: Any) -> Any:
    params, inputs, _, weights = mlp_problem()
    params = jax.tree.map(lambda leaf: factor * leaf, params)
    with jax.enable_x64(True):
        key = None if seed is None else jax.random.key(seed)
        return jax.device_get(kronecker_fisher(mlp, params, inputs, weights=weights, key=key, **options))


def test_empirical_fisher_of_a_dense_network() -> None:
    params, inputs, labels, weights = mlp_problem()
    hidden = np.tanh(inputs @ params["w1"] + params["b1"])
    residual = softmax(hidden @ params["w2"]) - np.eye(NUM_CLASSES)[labels]
    delta = residual @ params["w2"].T * (1 - hidden**2)
    x, h, r, d = (vectors.T * weights @ vectors / weights.sum() for vectors in (inputs, hidden, residual, delta))
    with jax.enable_x64(True):
        options = {"weights": weights, "microbatch_size": 3}
        computed = jax.device_get(empirical_kronecker_fisher(loss_of(mlp), params, (inputs, labels), **options))
    for leaf, factors in {"w1": (x, d), "w2": (h, r), "b1": (np.eye(1), d)}.items():
        assert_close(dense(computed[leaf]), np.kron(*factors))


def test_sampled_labels_converge_to_the_exact_expectation() -> None:
    sampled, exact = mlp_fisher(num_samples=4000, seed=0), mlp_fisher()
    assert_trees_close(sampled, exact, 0.03)
    ours, theirs = dense(sampled["w2"]), dense(exact["w2"])
    assert np.abs(ours - theirs).max() > 1e-4 * theirs.max()


def test_the_microbatch_size_changes_nothing() -> None:
    one_by_one = mlp_fisher(microbatch_size=1, weight_sharing="reduce")  # with one position, it is "expand"
    assert_trees_close(one_by_one, mlp_fisher())


@pytest.mark.parametrize("max_side", [3, 4])
def test_a_side_larger_than_max_side_keeps_its_diagonal(max_side: int) -> None:
    params, inputs, _, weights = mlp_problem()
    with jax.enable_x64(True):
        diagonal = jax.device_get(fisher_diagonal(mlp, params, inputs, weights=weights))
    computed, full = mlp_fisher(max_side=max_side), mlp_fisher()
    for leaf, form in computed.items():
        ((a, g),) = factors_of(full[leaf])
        full_rows, full_columns = 1 < len(a) <= max_side, len(g) <= max_side
        if not (full_rows or full_columns):
            assert_close(form, diagonal[leaf])
            continue
        assert (form.row_basis is not None, form.column_basis is not None) == (full_rows, full_columns)
        a, g = a if full_rows else np.diag(np.diag(a)), g if full_columns else np.diag(np.diag(g))
        assert_close(dense(form), np.kron(a, g))


def test_a_batch_of_networks_is_mapped() -> None:
    params, inputs, _, weights = mlp_problem()
    stack = jax.tree.map(lambda leaf: np.stack([leaf, -0.5 * leaf]), params)
    with jax.enable_x64(True):
        batched = jax.device_get(jax.vmap(lambda p: kronecker_fisher(mlp, p, inputs, weights=weights))(stack))
    for number, factor in enumerate((1.0, -0.5)):
        assert_trees_close(jax.tree.map(lambda leaf, n=number: leaf[n], batched), mlp_fisher(factor))


def test_factors_of_bfloat16_parameters_are_summed_in_float32() -> None:
    params, inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (LINEAR, normal(5, 6, 3)))
    first, last = jax.device_get(kronecker_fisher(deep_linear, params, inputs, likelihood="gaussian"))
    assert {leaf.dtype for leaf in jax.tree.leaves((first, last))} == {np.dtype("float32")}
    exact_inputs, exact_last = np.asarray(inputs, np.float64), np.asarray(params[1], np.float64)
    expected = [(exact_inputs.T @ exact_inputs / 6, exact_last @ exact_last.T)]
    jax.tree.map(functools.partial(assert_close, tolerance=1e-6), factors_of(first), expected)


@pytest.mark.parametrize(("leaf_dtype", "dtype"), [("float32", "float64"), ("float64", "float32")])
def test_parameters_that_are_cast_have_forms_of_their_own_dtype(leaf_dtype: str, dtype: str) -> None:
    logits_fn = lambda params, x: x.astype(dtype) @ params["w"].astype(dtype) + params["b"].astype(dtype)  # noqa: E731
    with jax.enable_x64(True):
        params = {"w": jnp.ones((3, 2), leaf_dtype), "b": jnp.ones(2, leaf_dtype)}
        computed = kronecker_fisher(logits_fn, params, normal(0, 4, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(computed)} == {np.dtype(leaf_dtype)}


def test_an_empty_vector_has_an_empty_diagonal() -> None:
    logits_fn = lambda params, x: x @ params["w"] + params["empty"].sum()  # noqa: E731
    computed = kronecker_fisher(logits_fn, {"w": jnp.ones((3, 2)), "empty": jnp.zeros(0)}, jnp.ones((4, 3)))
    assert computed["empty"].shape == (0,)


# Meshes.


def of_twelve(weights: Any) -> Any:
    return jax.device_get(kronecker_fisher(mlp, make_mlp(), make_data(num_examples=12)[0], weights=weights))


def test_sharded_examples() -> None:
    mesh, weights = jax.make_mesh((2, 2), ("data", "model")), np.arange(12, dtype=np.float32)
    put = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    inputs = put(make_data(num_examples=12)[0], "data")
    computed = kronecker_fisher(mlp, put(make_mlp()), inputs, weights=put(weights, "data"))
    assert_trees_close(jax.device_get(computed), of_twelve(weights), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_of_a_users_own_shard_map(check_vma: bool) -> None:
    params, inputs = make_mlp(), make_data(num_examples=12)[0]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    of_shard = lambda *data: jax.tree.map(lambda leaf: leaf[None], kronecker_fisher(mlp, *data))  # noqa: E731
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec("x")}
    compute = jax.jit(jax.shard_map(of_shard, mesh=mesh, check_vma=check_vma, **specs))
    if check_vma:
        with pytest.raises(ValueError, match="call it with check_vma=False, or outside of it"):
            compute(params, inputs)
        return
    second = jax.tree.map(lambda leaf: leaf[1], jax.device_get(compute(params, inputs)))
    assert_trees_close(second, of_twelve((np.arange(12) // 3 == 1).astype(np.float32)), 1e-5)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_sharing": "mean"}, "weight_sharing must be one of expand, reduce, not 'mean'"),
        ({"max_side": 0}, "max_side must be an integer of at least 1, not 0"),
        ({"num_samples": 2}, "num_samples and key go together"),
        ({"likelihood": "poisson"}, "likelihood must be one of"),
        ({"inputs": np.zeros((0, 3), np.float32)}, "inputs is empty"),
        ({"weights": np.zeros(7, np.float32)}, "weights must be finite, not negative and not all 0"),
    ],
)
def test_wrong_arguments_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kronecker_fisher(mlp, make_mlp(), **({"inputs": make_data()[0]} | options))
