"""Several processes that run one program: what one of them does alone, and what none does before all are there."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lifelong_jax._numerics import is_of_all_processes


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
