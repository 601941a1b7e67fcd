"""Compiles Fishers of large models for TPUs that are not at hand, and prints what the compiler says that they hold.

    pip install libtpu && python -m benchmarks.compiled

The models are those of `benchmarks/scaling.py`, and 1 B with a vocabulary that 8 does not divide. Parameters are in
shards over all chips, of which each has one sequence. The gradient is the ordinary one, with the same shardings.
Nothing runs, and no arrays are made. libtpu serves one process at a time.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import scaling
from benchmarks.transformer import functions_of
from lifelong_jax import empirical_fisher_diagonal
from lifelong_jax._tables import markdown_table
from lifelong_jax.models import TransformerConfig
from lifelong_jax.platforms import lowering_for

KEY = jax.random.key(0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v5e:2x4", help="as JAX names it")
    parser.add_argument("--models", nargs="+", choices=scaling.MODELS, default=["1 B", "7 B"])
    arguments = parser.parse_args()
    devices = np.array(topologies.get_topology_desc(arguments.topology, platform="tpu").devices)
    configs = {name: dataclasses.replace(scaling.MODELS[name], dtype="bfloat16") for name in arguments.models}
    configs["1 B, 50,257 tokens"] = dataclasses.replace(scaling.MODELS["1 B"], dtype="bfloat16", vocab_size=50_257)
    header = ["model", "counted, GiB", "empirical Fisher", "gradient"]
    print(markdown_table(header, [[name, *temporaries(config, devices)] for name, config in configs.items()]))


def temporaries(config: TransformerConfig, devices: np.ndarray) -> list[str]:
    """Returns the temporary memory of each chip: counted, of a Fisher and of a gradient."""
    init_fn, _, losses = functions_of(config)
    shapes = jax.eval_shape(init_fn, KEY)
    sequences = jax.ShapeDtypeStruct((devices.size, config.max_length + 1), jnp.int32)

    def fisher(params: Any, sequences: jax.Array) -> Any:
        return empirical_fisher_diagonal(losses, params, sequences, num_samples=1, key=KEY, microbatch_size=1)

    def gradient(params: Any, sequences: jax.Array) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(losses, in_axes=(None, 0))(p, sequences)))(params)

    def held(run: Callable, axis_type: AxisType) -> float:
        mesh = Mesh(devices.ravel(), ("data",), axis_types=(axis_type,))
        params = jax.tree.map(lambda shape: in_shards(shape, mesh), shapes)
        batch = jax.ShapeDtypeStruct(sequences.shape, sequences.dtype, sharding=along(mesh, 0))
        kept = jax.tree.map(lambda shape: shape.sharding, params) if axis_type == AxisType.Auto else None
        with lowering_for("tpu"):
            compiled = jax.jit(run, out_shardings=kept).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    counted = scaling.temporary_bytes(config)
    sizes = counted, held(fisher, AxisType.Explicit), held(gradient, AxisType.Auto)
    return [f"{size / scaling.GIB:.2f}" for size in sizes]


def in_shards(shape: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shards an array over its largest axis that the number of chips divides."""
    _, axis = max((size, axis) for axis, size in enumerate(shape.shape) if size % mesh.size == 0)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=along(mesh, axis))


def along(mesh: Mesh, axis: int) -> NamedSharding:
    """Returns the sharding of one axis over all chips."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


if __name__ == "__main__":
    main()
