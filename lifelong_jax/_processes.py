"""Several processes that run one program: arrays of all of them, what one does alone, and what all wait for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def copy_arrays(tree: Any) -> Any:
    """Copies the arrays of a tree, each to where it is, so that a program may donate the copies."""

    def copy(leaf: Any) -> jax.Array:
        if is_of_all_processes(leaf):
            return jnp.copy(leaf)  # `device_put` takes no random keys of other processes
        return jax.device_put(leaf, may_alias=False)  # unlike jnp.copy, it has nothing to compile

    return jax.tree.map(copy, tree)


def to_host(array: Any) -> np.ndarray:
    """Returns the values of an array, which are known. All processes must call it, if it is an array of all."""
    if not is_of_all_processes(array) or array.is_fully_replicated:
        return np.asarray(array)
    with jax.ensure_compile_time_eval():  # else, within a function that is being traced, they would not be known
        return multihost_utils.process_allgather(array, tiled=True)


def place_arrays(tree: Any, sharding: NamedSharding) -> Any:
    """Places arrays, of which each process has all values, without comparing what each has, as `device_put` does."""

    def place(leaf: Any) -> jax.Array:
        values = to_host(leaf)
        return jax.make_array_from_callback(np.shape(values), sharding, lambda index: values[index])

    return jax.tree.map(place, tree)


def is_of_all_processes(leaf: Any) -> bool:
    """Returns whether a leaf is an array, or stands for one, of which other processes have a part; not within jit."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


def span_processes(tree: Any) -> bool:
    """Returns whether a tree has an array of which other processes have a part."""
    return any(map(is_of_all_processes, jax.tree.leaves(tree)))


def is_first() -> bool:
    """Returns whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together(what: str, several: bool) -> Iterator[None]:
    """Waits at the end of the block for all processes, if `several`. If one of them has failed, all raise an error."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if several:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if error is None and failed.size:
            raise RuntimeError(f"{what}: process {failed[0]} has failed. Its own error says why.")
    if error is not None:
        raise error


def number_of_first(number: int) -> int:
    """Returns the number that the first process has. All processes must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.array(number, np.int32)))


def text_of_first(text: str) -> str:
    """Returns the text that the first process has. All processes must call it."""
    written = text.encode()
    padded = np.zeros(number_of_first(len(written)), np.uint8)
    padded[: len(written)] = np.frombuffer(written, np.uint8)[: len(padded)]
    return multihost_utils.broadcast_one_to_all(padded).tobytes().decode()


def any_of_all(*flags: bool) -> list[bool]:
    """Returns for each flag whether it is set in one of the processes. All must call it."""
    if jax.process_count() == 1:
        return list(flags)
    return multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist()
