"""A mesh of devices that a script trains on, and the processes that share it."""

import os
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lifelong_jax.tasks import place_batch
from lifelong_jax.types import Batch, Task

AXIS = "data"
_TIMEOUT = 30  # seconds until the others end if a process has died: JAX's own 100 to 300 are for larger programs


def check_mesh(mesh: str | None) -> None:
    """Checks the setting before anything is computed.

    Args:
      mesh: `data=8`, say, or None.

    Raises:
      ValueError: if it is something else.

    Example:
      >>> check_mesh("data=8")
    """
    if mesh is not None and not re.fullmatch(rf"{AXIS}=[1-9]\d*", mesh):
        raise ValueError(f"mesh must be {AXIS}= and the number of devices, such as {AXIS}=8, not {mesh!r}.")


def start_processes(mesh: str | None) -> None:
    """Joins the processes of one program, if `JAX_COORDINATOR_ADDRESS` says that there are several.

    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say which one this is; JAX finds out by itself on SLURM and with MPI.

    Args:
      mesh: the setting.

    Raises:
      ValueError: if there are several processes without a mesh, or the mesh does not fit the devices of all.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not jax.distributed.is_initialized():
        if mesh is None:
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS is set, but processes share the work only on a mesh: give --mesh {AXIS}= and "
                f"the number of all their devices, or unset it"
            )
        number, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=None if number is None else int(number),
            process_id=None if index is None else int(index),
            heartbeat_timeout_seconds=_TIMEOUT,
            shutdown_timeout_seconds=_TIMEOUT,
        )
    if mesh is None:
        return
    size, there, processes = _size(mesh), jax.device_count(), jax.process_count()
    if size > there or (processes > 1 and size != there):
        of = f" of {processes} processes, all of which take part" if processes > 1 else ""
        raise ValueError(f"--mesh {mesh}: there are {there} devices{of}")


def make_mesh(mesh: str | None) -> Mesh | None:
    """Makes the mesh of the setting.

    Args:
      mesh: the setting; `start_processes` has found that it fits the devices.

    Returns:
      The mesh, or None.
    """
    if mesh is None:
        return None
    size = _size(mesh)
    return jax.make_mesh((size,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def _size(mesh: str) -> int:
    return int(mesh.removeprefix(f"{AXIS}="))


def place_tasks(mesh: Mesh, tasks: Sequence[Task]) -> list[Task]:
    """Shards the examples of tasks over a mesh. Where they do not divide evenly, they are padded with weight 0.

    Args:
      mesh: from `make_mesh`.
      tasks: a sequence; examples that tasks share are placed once.

    Returns:
      The tasks. Each process holds the examples of its own devices.
    """
    placed: dict[tuple[int, ...], Batch] = {}

    def place(batch: Batch) -> Batch:
        ids = tuple(map(id, jax.tree.leaves(batch)))
        if ids not in placed:
            placed[ids] = place_batch(batch, NamedSharding(mesh, PartitionSpec(AXIS)))
        return placed[ids]

    parts = ("train", "test", "validation")
    of_tasks = [{part: getattr(task, part) for part in parts} for task in tasks]
    return [
        task._replace(**{part: None if batch is None else place(batch) for part, batch in batches.items()})
        for task, batches in zip(tasks, of_tasks, strict=True)
    ]
