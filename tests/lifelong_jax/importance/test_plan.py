"""Plans: the rule of each leaf of the models, the table that `explain` prints, and default microbatch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import explain
from lifelong_jax._jaxprs import activation_floats
from lifelong_jax.importance.cotangents import Cotangents, stacked
from lifelong_jax.importance.plan import default_microbatch_size
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
