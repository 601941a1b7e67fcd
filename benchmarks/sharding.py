"""Compiles importances, and the ordinary gradient, for eight devices, and asks the compiler what each device holds.

    python -m benchmarks.sharding                                # eight simulated devices of a CPU
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu \\
        python -m benchmarks.sharding --topology v5e:2x4         # a TPU that is not at hand, with `pip install libtpu`

Nothing is run. Parameters are whole on each device ("data-parallel"), sharded over the devices that the examples are
sharded over ("FSDP"), or over four devices beside two parts of the examples ("tensor-parallel"). The gradient is of as
many examples at a time, and its result is sharded as the parameters. Temporary memory is what is held besides
arguments and results. The floating-point operations of a loop over microbatches count once, so all examples are
computed at once.
"""

import argparse
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.transformer import functions_of
from lifelong_jax import empirical_fisher_diagonal, fisher_diagonal
from lifelong_jax._tables import markdown_table
from lifelong_jax.models import TransformerConfig
from lifelong_jax.platforms import lowering_for

NUM_DEVICES = 8
LAYOUTS = {"data-parallel": ((8,), None), "FSDP": ((8,), "rows"), "tensor-parallel": ((2, 4), "columns")}
COLLECTIVES = re.compile(r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(")


def mlp_of(depth: int, width: int) -> tuple[Callable, Any, Any]:
    """Makes an MLP's logits, the shapes of its parameters, and those of its examples."""
    sizes = [784, *[width] * depth, 16]

    def logits(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = [{"kernel": shape(a, b), "bias": shape(b)} for a, b in itertools.pairwise(sizes)]
    examples = (shape(512, 784), jax.ShapeDtypeStruct((512,), jnp.int32))
    return logits, params, examples


def passes_of_mlp(depth: int, width: int) -> tuple[dict[str, Callable], Any, Any]:
    """Makes the passes of an MLP, and the shapes that they take."""
    logits, params, examples = mlp_of(depth, width)

    def loss(params: Any, example: Any) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, example[0]), example[1])

    def mean_loss(params: Any, examples: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0))(params, examples))

    passes = {
        "gradient": jax.grad(mean_loss),
        "empirical": functools.partial(empirical_fisher_diagonal, loss),
        "sampled": lambda params, examples: fisher_diagonal(logits, params, examples[0], **one_sample()),
        "exact": lambda params, examples: fisher_diagonal(logits, params, examples[0]),
    }
    return passes, params, examples


def passes_of_transformer(num_layers: int, width: int) -> tuple[dict[str, Callable], Any, Any]:
    """Makes the passes of a transformer, layers stacked and rematerialised, and the shapes that they take."""
    config = TransformerConfig(1024, 256, num_layers=num_layers, num_heads=8, width=width, remat=True, tied=False)
    init_fn, logits, losses = functions_of(config)
    sequences = jax.ShapeDtypeStruct((NUM_DEVICES, config.max_length + 1), jnp.int32)

    def mean_loss(params: Any, sequences: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(lambda sequence: jnp.sum(losses(params, sequence)))(sequences))

    passes = {
        "gradient": jax.grad(mean_loss),
        "empirical": functools.partial(empirical_fisher_diagonal, losses, **one_sample()),
        "sampled": functools.partial(fisher_diagonal, logits, **one_sample()),
    }
    return passes, jax.eval_shape(init_fn, jax.random.key(0)), sequences


def one_sample() -> dict[str, Any]:
    """Returns the arguments of a sampled Fisher."""
    return {"num_samples": 1, "key": jax.random.key(0)}


def spec_of(shape: tuple[int, ...], how: str | None) -> PartitionSpec:
    """Shards an axis of a layer's own shape: an axis of stacked layers stays whole."""
    first = 1 if len(shape) == 3 or (len(shape) == 2 and shape[0] < NUM_DEVICES) else 0
    if how == "rows" and shape[first] % NUM_DEVICES == 0:
        return PartitionSpec(*[None] * first, "data")
    if how == "columns":
        return PartitionSpec(*[None] * (len(shape) - 1), "model")
    return PartitionSpec()


def compile_pass(run: Callable, devices: np.ndarray, layout: str, params: Any, examples: Any, kind: AxisType) -> Any:
    """Compiles a pass with parameters and examples that are sharded in a layout."""
    shape, how = LAYOUTS[layout]
    mesh = Mesh(devices.reshape(shape), ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec_of(leaf.shape, how)), params)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    placed = jax.tree.map(place, params, shardings)
    by_device = jax.tree.map(lambda leaf: place(leaf, NamedSharding(mesh, PartitionSpec("data"))), examples)
    out_shardings = shardings if kind == AxisType.Auto else None  # types say it
    return jax.jit(run, out_shardings=out_shardings).lower(placed, by_device).compile()


def rows_of(name: str, passes: dict[str, Callable], params: Any, examples: Any, devices: np.ndarray) -> list[list[str]]:
    """Compiles all passes in all layouts, and returns the rows of the table."""
    rows = []
    layouts = [layout for layout in LAYOUTS if name == "MLP" or layout != "tensor-parallel"]
    for layout in layouts:
        held: dict[str, int] = {}
        for of, run in passes.items():
            kind = AxisType.Auto if of == "gradient" else AxisType.Explicit
            compiled = compile_pass(run, devices, layout, params, examples, kind)
            memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
            held[of] = memory.temp_size_in_bytes
            names = COLLECTIVES.findall(compiled.as_text())
            counted = ", ".join(f"{names.count(kind)} {kind}" for kind in sorted(set(names)))
            result = f"{memory.output_size_in_bytes / 2**20:.1f}"
            ratio = f"{held[of] / held['gradient']:.2f}" if of != "gradient" and held["gradient"] else ""
            rows.append([name, layout, of, result, f"{held[of] / 2**20:.1f}", ratio, f"{cost['flops']:.2e}", counted])
    return rows


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", help="a TPU to compile for, such as v5e:2x4")
    topology = parser.parse_args().topology
    if topology is None:
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
        devices, platform = np.array(jax.devices()), "cpu"
    else:
        from jax.experimental import topologies

        devices, platform = np.array(topologies.get_topology_desc(topology, platform="tpu").devices), "tpu"
    header = ["network", "parameters", "pass", "result, MiB", "temporary, MiB", "/ gradient", "FLOPs", "collectives"]
    rows = []
    with lowering_for(platform):
        rows += rows_of("MLP", *passes_of_mlp(8, 1024), devices)
        rows += rows_of("transformer", *passes_of_transformer(4, 512), devices)
    print(f"Eight devices: {devices.flat[0].device_kind}, JAX {jax.__version__}\n")
    print(markdown_table(header, rows, num_text_columns=3))


if __name__ == "__main__":
    main()
