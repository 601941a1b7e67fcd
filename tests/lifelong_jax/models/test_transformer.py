"""Transformers: against a written-out loop over layers, and what must not change their outputs."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lifelong_jax import explain, models
from lifelong_jax._jaxprs import equations_within
from lifelong_jax.models.transformer import rotate

GPT2 = models.TransformerConfig(vocab_size=13, max_length=9, num_layers=3, num_heads=4, width=8)
MODERN = dataclasses.replace(
    GPT2, num_kv_heads=2, hidden_size=10, norm="rms", positions="rotary", tied=False, bias=False
)
CONFIGS = {"gpt2": GPT2, "modern": MODERN}
TOKENS = jnp.array([3, 1, 4, 1, 5, 12, 0])


def drawn(config, deviation=0.5):
    """Parameters that are normal with the given deviation, so that no bias is 0 and attention is not flat."""
    init_fn, apply_fn = models.transformer_functions(config)
    leaves, structure = jax.tree.flatten(jax.eval_shape(init_fn, jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(scale=deviation, size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.jit(apply_fn), jax.tree.unflatten(structure, leaves)


def written_out(config, params, tokens):
    """The logits in NumPy, in float64: a loop over layers and heads, without any of the module's functions."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    length, size = len(tokens), config.width // config.num_heads

    def dense(layer, x):
        return x @ layer["kernel"] + layer.get("bias", 0)

    def norm(layer, x):
        x = x if config.norm == "rms" else x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer["scale"] + layer.get("bias", 0)

    def turned(x):  # a pair of features is a complex number
        numbers = x[:, : size // 2] + 1j * x[:, size // 2 :]
        numbers = numbers * np.exp(1j * np.outer(range(length), 10_000.0 ** (-np.arange(size // 2) / (size // 2))))
        return np.concatenate([numbers.real, numbers.imag], axis=-1)

    def attention(query, key, value):
        query, key = (turned(query), turned(key)) if config.positions == "rotary" else (query, key)
        scores = np.where(np.tri(length), query @ key.T / math.sqrt(size), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True) @ value

    x = params["tokens"]["embedding"][tokens]
    if config.positions == "learned":
        x = x + params["positions"]["embedding"][:length]
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], params["layers"])
        normal = norm(layer["attention_norm"], x)
        heads = {
            name: np.split(
                dense(layer[name], normal),
                config.num_heads if name == "query" else config.num_kv_heads or config.num_heads,
                axis=-1,
            )
            for name in ("query", "key", "value")
        }
        shared = config.num_heads // len(heads["key"])
        outputs = [
            attention(query, heads["key"][i // shared], heads["value"][i // shared])
            for i, query in enumerate(heads["query"])
        ]
        x = x + dense(layer["attended"], np.concatenate(outputs, axis=-1))
        hidden = dense(layer["up"], norm(layer["perceptron_norm"], x))
        hidden = hidden / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + dense(layer["down"], hidden)
    return norm(params["norm"], x) @ (params["tokens"]["embedding"].T if config.tied else params["output"]["kernel"])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_a_written_out_loop_and_depend_on_no_later_token(name):
    config = CONFIGS[name]
    apply_fn, params = drawn(config)
    logits = apply_fn(params, TOKENS)
    assert (logits.shape, logits.dtype) == ((7, 13), jnp.float32)
    np.testing.assert_allclose(logits, written_out(config, params, TOKENS), rtol=1e-4, atol=1e-4)

    changed = apply_fn(params, TOKENS.at[4].set(9))
    np.testing.assert_allclose(changed[:4], logits[:4], rtol=1e-5, atol=1e-5)
    assert (np.abs(changed - logits).max(axis=1)[4:] > 1e-2).all()


def test_a_text_may_be_one_token_in_a_batch():
    apply_fn, params = drawn(GPT2)
    singles = jax.jit(jax.vmap(apply_fn, (None, 0)))(params, TOKENS[:2, None])
    np.testing.assert_allclose(singles[0], apply_fn(params, TOKENS)[:1], rtol=1e-4, atol=1e-5)


def test_shared_heads_of_keys_and_values_are_repeated_ones():
    shared, params = drawn(dataclasses.replace(GPT2, num_kv_heads=2))
    full, _ = drawn(GPT2)

    def repeat(leaf):  # of heads of size 2
        heads = leaf.reshape(*leaf.shape[:-1], 2, 2)
        return jnp.repeat(heads, 2, axis=-2).reshape(*leaf.shape[:-1], 8)

    repeated = {name: jax.tree.map(repeat, params["layers"][name]) for name in ("key", "value")}
    expected = full(params | {"layers": params["layers"] | repeated}, TOKENS)
    np.testing.assert_allclose(shared(params, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_scores_of_rotated_queries_and_keys_depend_on_the_distance_of_their_positions_alone():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(np.tile(rng.normal(size=(1, 2, 6)), (8, 1, 1)), jnp.float32) for _ in range(2))
    scores = np.einsum("qhd,khd->hqk", rotate(query), rotate(key))
    np.testing.assert_allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], atol=1e-5)
    assert (np.ptp(scores[:, 0], axis=-1) > 0.1).all()  # on the distance they do depend
    np.testing.assert_array_equal(rotate(query)[0], query[0])
    half = rotate(query.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), rotate(query), atol=0.03)


def loss_of(config):
    apply_fn, params = drawn(config, 0.2)
    return lambda params: jnp.sum(jax.nn.log_softmax(apply_fn(params, TOKENS))[:, 0]), params


def test_remat_holds_only_the_inputs_of_layers():
    def held(config):
        loss, params = loss_of(config)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)))

    num_params = sum(leaf.size for leaf in jax.tree.leaves(drawn(GPT2)[1]))
    inputs = GPT2.num_layers * len(TOKENS) * GPT2.width
    few = held(dataclasses.replace(GPT2, remat=True)) - num_params
    assert inputs <= few < 2 * inputs + 1000 < held(GPT2) - num_params


@pytest.mark.slow
def test_remat_changes_no_gradient():
    (loss, params), (with_remat, _) = loss_of(GPT2), loss_of(dataclasses.replace(GPT2, remat=True))
    expected, gradient = jax.jit(jax.grad(loss))(params), jax.jit(jax.grad(with_remat))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected)
    assert np.abs(expected["layers"]["up"]["kernel"]).max() > 0.1


def test_a_tied_output_layer_is_the_transposed_embedding():
    tied, params = drawn(GPT2)
    untied, _ = drawn(dataclasses.replace(GPT2, tied=False))
    copied = params | {"output": {"kernel": params["tokens"]["embedding"].T}}
    np.testing.assert_allclose(untied(copied, TOKENS), tied(params, TOKENS), rtol=1e-6)


def test_bfloat16_computes_about_the_same():
    apply_fn, params = drawn(MODERN)
    coarse, _ = drawn(dataclasses.replace(MODERN, dtype="bfloat16"))
    logits, expected = coarse(params, TOKENS), apply_fn(params, TOKENS)
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected).max() < 0.1 * expected.std()
    equations = jax.make_jaxpr(coarse)(params, TOKENS).eqns
    products = [e for outer in equations for e in equations_within(outer) if e.primitive.name == "dot_general"]
    assert {v.aval.dtype for product in products for v in product.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("dtype", "remat"), [("float32", False), ("bfloat16", True)])
def test_importances_tap_all_kernels_within_the_scan(dtype, remat):
    config = dataclasses.replace(MODERN, dtype=dtype, remat=remat, bias=True, positions="learned")
    init_fn, apply_fn = models.transformer_functions(config)
    params = jax.eval_shape(init_fn, jax.random.key(0))
    rules = {rule.leaf: rule.rule for rule in explain(apply_fn, params, jax.ShapeDtypeStruct((7,), jnp.int32))}
    assert [rule for leaf, rule in rules.items() if "kernel" in leaf] == ["product"] * 7
    assert [rule for leaf, rule in rules.items() if "embedding" in leaf] == ["lookup"] * 2


def test_parameters_are_those_of_the_module_which_draws_them_as_gpt2_does():
    init_fn, apply_fn = models.transformer_functions(GPT2)
    assert models.transformer_functions(dataclasses.replace(GPT2)) == (init_fn, apply_fn)
    params = jax.jit(init_fn)(jax.random.key(1))
    of_module = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(models.Transformer(GPT2, rngs=nnx.Rngs(1)))))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, of_module)
    layers = params["layers"]
    deviations = [np.std(leaf) for leaf in (params["tokens"]["embedding"], layers["up"]["kernel"])]
    np.testing.assert_allclose(deviations, 0.02, rtol=0.1)
    added = [np.std(layers[name]["kernel"]) for name in ("attended", "down")]
    np.testing.assert_allclose(added, 0.02 / math.sqrt(6), rtol=0.1)
    assert np.abs(layers["up"]["kernel"][0] - layers["up"]["kernel"][1]).max() > 0.02
    np.testing.assert_array_equal(layers["up"]["bias"], 0)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)


def test_a_continuation_is_drawn_from_the_softmax_and_one_program_serves_all_prompts():
    table = jnp.log(jnp.array([[0.0, 0.5, 0.5, 0], [0, 0, 0.25, 0.75], [1, 0, 0, 0], [0, 1, 0, 0]]))
    num_traces = 0

    def bigrams(params, tokens):
        nonlocal num_traces
        num_traces += 1
        return params[tokens]

    text = models.generate(bigrams, table, jnp.array([0]), 2000, jax.random.key(0))
    assert (text.shape, text.dtype) == ((2000,), jnp.int32)
    counts = np.zeros((4, 4))
    np.add.at(counts, (np.append(0, text[:-1]), text), 1)
    np.testing.assert_allclose(counts / counts.sum(axis=1, keepdims=True), np.exp(table), atol=0.06)

    likeliest = models.generate(bigrams, table, np.array([2, 0, 1]), 1998, jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(likeliest[:5], [3, 1, 3, 1, 3])
    assert num_traces == 1


def test_a_continuation_is_what_the_network_says_of_the_text_before_it():
    apply_fn, params = drawn(GPT2, 1.0)
    continuation = models.generate(apply_fn, params, TOKENS[:3], 4, jax.random.key(0), temperature=0)
    logits = apply_fn(params, jnp.concatenate([TOKENS[:3], continuation]))
    np.testing.assert_array_equal(continuation, np.argmax(logits[2:-1], axis=-1))
    with pytest.raises(ValueError, match="at most 9 tokens"):
        models.generate(apply_fn, params, TOKENS, 3, jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "width must be a multiple of num_heads, 3, not 8"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, 4; 3 does not"),
        ({"num_heads": 8, "positions": "rotary"}, "must be even, not 1"),
        ({"norm": "batch"}, "norm must be one of layer, rms, not 'batch'"),
        ({"dtype": jnp.float32}, "dtype must be one of float32, bfloat16"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1"),
    ],
)
def test_configs_that_no_network_has_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GPT2, **arguments)


def test_tokens_and_prompts_of_another_shape_or_dtype_are_refused():
    apply_fn, params = drawn(GPT2)
    for tokens in (jnp.zeros((2, 3), jnp.int32), jnp.zeros(10, jnp.int32), jnp.int32(0)):
        with pytest.raises(ValueError, match=r"one example \[length\] of at most 9 tokens"):
            apply_fn(params, tokens)
    with pytest.raises(TypeError, match="tokens must be integers, not float32"):
        apply_fn(params, jnp.zeros(3))
    key = jax.random.key(0)
    for prompt in (jnp.zeros(0, jnp.int32), jnp.zeros((1, 2), jnp.int32)):
        with pytest.raises(ValueError, match="prompt must be at least 1 token"):
            models.generate(apply_fn, params, prompt, 3, key)
    with pytest.raises(TypeError, match="prompt must be integers"):
        models.generate(apply_fn, params, jnp.zeros(2), 3, key)
    with pytest.raises(ValueError, match="temperature must be at least 0, not -1"):
        models.generate(apply_fn, params, TOKENS, 2, key, temperature=-1)
    with pytest.raises(ValueError, match="num_tokens must be an integer of at least 1"):
        models.generate(apply_fn, params, TOKENS, 0, key)
