"""The arithmetic of large models on many chips is that of the compiler, on small ones."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import scaling
from benchmarks.transformer import functions_of
from lifelong_jax import Consolidation, empirical_fisher_diagonal, fisher_diagonal, forms, proximal_adam
from lifelong_jax.consolidation import compress_consolidation
from tests.programs import program_of

pytestmark = pytest.mark.usefixtures("optimized", "standard_promotion", "free_afterwards")

NUM_CHIPS = 4
LONG = scaling.GPT(512, 64, num_layers=3, num_heads=2, width=64)  # activations weigh most
WIDE = scaling.GPT(256, 16, num_layers=3, num_heads=2, width=128)  # weights weigh most


def sharded(config, num_sequences):
    """Parameters in equal shards over all devices, and sequences, one after the other on each."""
    mesh = jax.make_mesh((NUM_CHIPS,), ("data",), axis_types=(AxisType.Auto,))

    def put(shape):
        axis = max((size, axis) for axis, size in enumerate(shape.shape) if size % NUM_CHIPS == 0)[1]
        spec = PartitionSpec(*[None] * axis, "data")
        return jax.device_put(jnp.full(shape.shape, 0.02, shape.dtype), NamedSharding(mesh, spec))

    params = jax.tree.map(put, jax.eval_shape(functions_of(config)[0], jax.random.key(0)))
    sequences = jnp.zeros((num_sequences, config.max_length + 1), jnp.int32)
    return params, jax.device_put(sequences, NamedSharding(mesh, PartitionSpec("data")))


def fishers(config):
    _, logits, losses = functions_of(config)
    options = {"num_samples": 1, "key": jax.random.key(0), "microbatch_size": 1}
    return {
        "empirical": lambda params, x: empirical_fisher_diagonal(losses, params, x, **options),
        "sampled": lambda params, x: fisher_diagonal(logits, params, x, **options),
    }


def test_parameters_are_counted_with_all_of_their_kernels():
    for config in (LONG, scaling.MODELS["70 B"]):
        kernels = config.num_layers * scaling.layer_params(config) + 2 * config.vocab_size * config.width
        vectors = (2 * config.num_layers + 1) * config.width
        assert scaling.count_params(config) == kernels + vectors


@pytest.mark.parametrize(("name", "config"), [("empirical", LONG), ("sampled", WIDE)])
def test_a_fisher_takes_the_bytes_that_are_counted_on_each_chip(name, config):
    params, sequences = sharded(config, NUM_CHIPS)
    memory = program_of(fishers(config)[name], params, sequences).memory_analysis()
    shard = scaling.FLOAT32 * scaling.count_params(config) // NUM_CHIPS
    assert 0 <= memory.output_size_in_bytes - shard < 200  # pointers
    assert 0 <= memory.argument_size_in_bytes - shard - sequences.nbytes // NUM_CHIPS < 200
    counted = scaling.temporary_bytes(config, scaling.FLOAT32)
    assert counted / 1.5 < memory.temp_size_in_bytes < 1.5 * counted


@pytest.mark.parametrize(("name", "config"), [("empirical", WIDE), ("sampled", LONG)])
def test_a_fisher_takes_three_products_per_weight_and_token_and_layers_once_more(name, config):
    config = dataclasses.replace(config, num_layers=1)  # the compiler counts a loop's body once
    params = jax.eval_shape(functions_of(config)[0], jax.random.key(0))
    sequence = jax.ShapeDtypeStruct((1, config.max_length + 1), jnp.int32)
    flops = jax.jit(fishers(config)[name]).lower(params, sequence).compile().cost_analysis()["flops"]
    assert flops == pytest.approx(scaling.fisher_flops(config), rel=0.1)


@pytest.mark.parametrize(("kept_bytes", "is_small"), [(8, False), (3, True)])
def test_anchor_and_importance_take_the_bytes_that_are_counted_and_the_penalty_needs_no_network(kept_bytes, is_small):
    params, _ = sharded(LONG, NUM_CHIPS)
    kept = Consolidation(params, params)
    kept = jax.jit(compress_consolidation)(kept) if is_small else kept
    scales = 4 * len(jax.tree.leaves(params)) if is_small else 0
    size = scaling.count_params(LONG)
    assert forms.num_bytes(kept) == kept_bytes * size + scales
    optimizer = proximal_adam(1e-3, 1.0)
    arguments = (params, jax.jit(optimizer.init)(params), params, kept)

    def step(grads, state, params, kept):
        return optimizer.update(grads, state, params, **kept._asdict())

    compiled = jax.jit(step, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, params), None)).lower(*arguments)
    compiled = compiled.compile()
    adam = 4 * scaling.FLOAT32 * size // NUM_CHIPS  # parameters, gradients and two moments
    held = compiled.memory_analysis().argument_size_in_bytes
    assert held - adam == pytest.approx(scaling.penalty_cost(LONG, NUM_CHIPS, kept_bytes).memory, abs=scales + 500)
    assert not re.search("all-(gather|reduce|to-all)|collective", compiled.as_text())
