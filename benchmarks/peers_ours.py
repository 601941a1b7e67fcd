"""This library's runs for `benchmarks.peers`."""

import functools

import jax
import numpy as np

from benchmarks.timing import CompilationClock
from benchmarks.whole_run import learn_by_host
from lifelong_jax import Batch, SweepRun, methods
from lifelong_jax.tasks import Task
from lifelong_jax.types import Params

METHODS = {
    "exact": methods.ewc(),
    "empirical": methods.ewc("empirical"),
    "mas": methods.mas(),
}


def learn(way: str, arrays: str, strength: float, share: float) -> dict[str, float]:
    """Makes a run. Returns the seconds of its parts, and the average accuracy."""
    return learn_by_host(METHODS[way], functools.partial(load, arrays, strength), CompilationClock())


def load(file: str, strength: float) -> SweepRun:
    """Reads the arrays."""
    with np.load(file) as stored:
        arrays = dict(stored)
    batches = {
        split: Batch(
            jax.numpy.asarray(arrays[f"{split}_inputs"]),
            jax.numpy.asarray(arrays[f"{split}_labels"].astype(np.int32)),
            jax.numpy.ones(len(arrays[f"{split}_labels"])),
        )
        for split in ("train", "test")
    }
    tasks = [Task(**batches, permutation=jax.numpy.asarray(order)) for order in arrays["permutations"]]
    return SweepRun(params_of(arrays), tasks, jax.random.key(0), strength)


def params_of(arrays: dict[str, np.ndarray]) -> Params:
    """Returns the first parameters, as flax names them."""
    return {
        "params": {
            f"Dense_{index}": {name: jax.numpy.asarray(arrays[f"{name}_{index}"]) for name in ("kernel", "bias")}
            for index in range(3)
        }
    }
