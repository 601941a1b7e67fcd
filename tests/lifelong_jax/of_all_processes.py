"""What is computed in the same way by one process and by several: `python -m tests.lifelong_jax.of_all_processes`."""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lifelong_jax import (
    Consolidation,
    Task,
    consolidate,
    empirical_fisher_diagonal,
    fisher_diagonal,
    init_consolidation,
    init_training,
    learn_task,
    learn_tasks,
    mas_importance,
    methods,
)
from lifelong_jax.checkpoint import load_consolidation, save_consolidation
from lifelong_jax.losses import cross_entropy
from lifelong_jax.training import TrainingState
from tests.problems import RECIPE, apply_fn, coupled_sgd, make_params, make_tasks

LOSS = cross_entropy(apply_fn)


def put(tree, sharding):
    """Makes arrays of all processes of arrays that each process has."""
    arrays = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), arrays)


def on_host(tree):
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)


def measure(folder: pathlib.Path):
    """Computes it all on the first four devices; returns NumPy arrays."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    tasks = [
        Task(put(task.train, split), put(task.test, split), put(task.permutation, whole))
        for task in make_tasks(2, num_train=24, num_test=8)
    ]
    batch, key, results = tasks[0].train, jax.random.key(0), {}
    params = put(make_params(), whole)
    shards = {
        "w1": put(make_params()["w1"], NamedSharding(mesh, P(None, "data"))),
        "w2": put(make_params()["w2"], split),
    }
    importance = jax.jit(empirical_fisher_diagonal, static_argnums=0)(LOSS, shards, batch)
    results["empirical"] = on_host(importance)
    results["exact"] = on_host(fisher_diagonal(apply_fn, params, batch.inputs, weights=batch.weights))
    results["sampled"] = on_host(fisher_diagonal(apply_fn, params, batch.inputs, num_samples=2, key=key))
    results["mas"] = on_host(mas_importance(apply_fn, params, batch.inputs))
    state = init_training(coupled_sgd(1.0), shards, key)
    kept = consolidate(init_consolidation(shards), shards, jax.tree.map(jnp.abs, shards))
    assert [leaf.sharding for leaf in jax.tree.leaves((state.params, kept.anchor))] == 2 * [
        leaf.sharding for leaf in jax.tree.leaves(shards)
    ]
    learn = jax.jit(learn_task, static_argnums=(0, 1), static_argnames=("num_epochs", "batch_size"))
    state, info = learn(LOSS, coupled_sgd(1.0), state, kept, batch, num_epochs=1, batch_size=8)
    results["one task"] = on_host((state.params, info.loss))
    again = init_training(coupled_sgd(1.0), state.params, state.key)  # a key of all processes
    assert isinstance(again, TrainingState)
    recipe = RECIPE._replace(num_epochs=1, batch_size=8)
    learned = learn_tasks(methods.ewc(), recipe, params, tasks, key, strength=1.0)
    results["sequence"] = (on_host((learned.params, learned.consolidation)), learned.accuracy_matrix)
    results |= files(folder, kept, shards, params, mesh)
    return results


def files(folder, kept, shards, params, mesh):
    """Saves, and loads onto another mesh."""
    file, options = folder / "kept.safetensors", {"estimator": "MAS", "num_examples": 24}
    save_consolidation(file, kept, **options)
    other = NamedSharding(jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2), P(("x",)))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=other), kept)
    like.anchor["w1"] = like.importance["w1"] = kept.anchor["w1"]
    loaded = load_consolidation(file, like)
    assert loaded.anchor["w2"].sharding == other and loaded.anchor["w1"].sharding == kept.anchor["w1"].sharding
    save_consolidation(folder / "digest.safetensors", kept, **options, anchor="digest")
    of_digest = load_consolidation(folder / "digest.safetensors", params=params, like=kept)
    contents = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.glob("*.safetensors"))]
    refused = []
    if jax.process_index() == 0:
        file.write_bytes(file.read_bytes()[:-1])
    multihost_utils.sync_global_devices("cut")
    blocked = folder / "blocked"
    blocked.touch()
    for attempt in (
        lambda: load_consolidation(file, like),
        lambda: save_consolidation(blocked / "x.safetensors", kept, **options),
        lambda: save_consolidation(file, Consolidation(shards, {**shards, "w2": shards["w2"] * jnp.nan}), **options),
    ):
        try:
            attempt()
        except (ValueError, OSError, RuntimeError) as error:
            refused.append(f"{type(error).__name__}: {error}")
    return {"loaded": on_host((loaded, of_digest)), "contents": contents, "refused": refused}


if __name__ == "__main__":
    jax.distributed.initialize(
        num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
    )
    folder = pathlib.Path(sys.argv[1])
    measured = measure(folder)
    # Not printed: gloo writes into the same lines.
    (folder / f"refused.{jax.process_index()}").write_text("\n".join(measured.pop("refused")))
    if jax.process_index() == 0:
        np.savez(folder / "measured.npz", *jax.tree.leaves(measured))
