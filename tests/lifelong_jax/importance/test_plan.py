"""Plans: the rule of each leaf of the models, the table that `explain` prints, and default microbatch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import explain
from lifelong_jax._jaxprs import activation_floats
from lifelong_jax.importance.cotangents import Cotangents, stacked
from lifelong_jax.importance.plan import default_microbatch_size, make_plan, takes_gradient_of_one
from tests.lifelong_jax.importance.models import MODELS, made, some_cotangents


@pytest.mark.parametrize("name", MODELS)
def test_rule_of_each_leaf(name: str) -> None:
    output_fn, params, examples, rules = made(name)
    found = explain(output_fn, params, jax.tree.map(lambda x: np.asarray(x)[0], examples))
    assert len(found) == len(jax.tree.leaves(params))
    for rule in found:
        expected = [wanted for part, wanted in rules.items() if part in rule.leaf] or ["gradient"]
        assert rule.rule == expected[-1], f"{rule.leaf}: {rule.reason}"


def test_explain_prints_a_table() -> None:
    output_fn, params, examples, _ = made("mlp")
    table = explain(output_fn, params, examples[0])
    shapes, *lines = [line for line in str(table).splitlines() if line]
    assert shapes == "One example, (6,), has the outputs (4,). As categorical logits, they are 1 label of 4 classes."
    assert len(lines) == 2 + 4
    assert len({len(line) for line in lines}) == 1
    kernel = next(rule for rule in table if "layers_0" in rule.leaf and "kernel" in rule.leaf)
    assert (kernel.shape, kernel.rule, kernel.multiply_adds, kernel.floats) == ((6, 5), "outer", 30, 11)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, examples[0]))
    assert explain(output_fn, *shapes) == table


def test_a_batch_that_is_given_as_one_example_is_seen_in_the_explanation() -> None:
    output_fn, params, examples, _ = made("mlp")
    batches = np.stack(
        [examples, examples]
    )  # [num_batches, batch_size, num_features] in the place of [num_examples, ...]
    assert "they are 3 labels of 4 classes" in explain(output_fn, params, batches[0]).shapes
    assert explain(lambda *data: jnp.sum(output_fn(*data)), params, examples[0]).shapes.endswith("has the outputs ().")


def explain_embeddings(tied: bool, num_classes: int):
    def logits_fn(params, tokens):
        return jnp.tanh(params["table"][tokens]) @ (params["table"].T if tied else params["head"])

    shapes = {"table": (num_classes, 4)} | ({} if tied else {"head": (4, num_classes)})
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return explain(logits_fn, params, jax.ShapeDtypeStruct((3,), jnp.int32))


def test_explain_says_why_a_large_leaf_is_differentiated_per_example_and_what_to_do() -> None:
    text = str(explain_embeddings(tied=True, num_classes=50_000))
    assert "- ['table']: used 2 times (look-up, product). Each example has a gradient of 200,000 floats." in text
    assert "last layer's weight too" in text
    assert text.endswith(
        "One example is computed at a time by default, so this costs no more than an ordinary gradient."
    )
    assert "pass microbatch_size=1" in str(explain_embeddings(tied=True, num_classes=50))
    untied = explain_embeddings(tied=False, num_classes=50_000)
    assert [rule.rule for rule in untied] == ["product", "lookup"]
    assert untied.advice == ""


@pytest.mark.parametrize(
    "output_fn, says",
    [
        (lambda p, x: jnp.sum(p @ x) * jnp.max(p), "used 2 times (product, reduce_max)"),
        (lambda p, x: jax.jit(lambda p: p @ x)(p) + p[0], "used 2 times (product, "),
        (lambda p, x: p + x, "used by add. Each example has a gradient of 9 floats. If it is added"),
        (lambda p, x: jnp.sin(p) @ x, "used by sin. "),
        (lambda p, x: jax.lax.scan(lambda p, x: (p * x, None), p, x)[0], "Pass it to the scan as a constant"),
        (lambda p, x: p, "As an operand of a product, a convolution or a look-up, it would cost"),
    ],
)
def test_explain_has_advice_for_each_reason(output_fn, says) -> None:
    explanation = explain(output_fn, jnp.ones((3, 3)), jnp.ones(3))
    assert says in explanation.advice


def test_the_gradient_of_one_example_is_taken_where_factors_save_nothing() -> None:
    def taken(output_fn, params, example):
        (tap,) = make_plan(output_fn, params, example).leaf_plans
        return takes_gradient_of_one(tap)

    def recurrent(params, x):
        return jax.lax.scan(lambda h, step: (jnp.tanh((step + h) @ params), None), jnp.zeros(x.shape[1:]), x)[0]

    dense, stack = lambda params, x: x @ params, jnp.ones((2, 4, 4))
    layers = lambda params, x: jax.lax.scan(lambda x, layer: (x @ layer, None), x, params)[0]  # noqa: E731
    assert not taken(dense, jnp.ones((4, 5)), jnp.ones(4))  # an outer product
    assert taken(dense, jnp.ones((4, 5)), jnp.ones((2, 4)))
    assert taken(layers, stack, jnp.ones((2, 4)))
    assert not taken(layers, stack, jnp.ones(4))
    assert not taken(lambda params, x: params[x], jnp.ones((4, 5)), jnp.zeros(7, int))  # a look-up
    assert not taken(recurrent, jnp.ones((4, 4)), jnp.ones((9, 2, 4)))  # each of 9 steps would add 4 × 4 numbers
    assert taken(recurrent, jnp.ones((4, 4)), jnp.ones((9, 3, 4)))


def test_default_microbatch_is_wide_for_vectors_and_narrow_for_tokens() -> None:
    sizes = []
    for name in ("mlp", "transformer_with_causal_mask"):
        output_fn, params, examples, _ = made(name)
        sizes.append(default_microbatch_size(output_fn, some_cotangents(1), params, examples[0]))
    assert sizes[0] > sizes[1] >= 1


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_default_microbatch_is_narrower_where_cotangents_are_many(monkeypatch, backend) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    dense, x = lambda params, x: x @ params, jax.ShapeDtypeStruct((8,), np.float32)

    def size(num_outputs: int) -> int:
        def one_per_output(outputs: jax.Array, index: jax.Array) -> Cotangents:
            return stacked(jnp.eye(num_outputs))

        params = jax.ShapeDtypeStruct((8, num_outputs), np.float32)
        return default_microbatch_size(dense, one_per_output, params, x)

    assert size(10) == size(100) == 1024
    assert 1 <= size(1000) <= 2**28 // 1000**2
    assert size(2**15) == 1


def test_default_microbatch_counts_activations_also_of_what_is_not_differentiated() -> None:
    def size(num_layers: int) -> int:
        def output_fn(head: jax.Array, x: jax.Array) -> jax.Array:
            x, _ = jax.lax.scan(lambda x, scale: (jnp.tanh(scale * x), None), x, jnp.ones(num_layers))
            return x.mean(0) @ head

        x = jax.ShapeDtypeStruct((2048, 8), np.float32)
        return default_microbatch_size(output_fn, some_cotangents(1), jnp.zeros((8, 2)), x)

    assert size(1) > 16 * size(64) > 0


def test_activations_are_what_depends_on_the_example() -> None:
    def output_fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return (2 * params) @ jnp.sin(x)  # 2 * params is computed once

    jaxpr = jax.make_jaxpr(output_fn)(jnp.zeros((5, 3)), jnp.zeros(3)).jaxpr
    assert activation_floats(jaxpr, [True, False]) == 3 + 5
    assert activation_floats(jaxpr, [False, False]) == 5 * 3 + 3 + 5
