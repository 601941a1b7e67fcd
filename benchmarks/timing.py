"""What the benchmarks share: timing of calls and blocks of code, turns, medians with quartiles, and data."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from lifelong_jax.datasets import Dataset, load_dataset
from lifelong_jax.types import Batch

Name = TypeVar("Name", bound=Hashable)


def device() -> str:
    """Describes the device and the version of JAX."""
    return f"{jax.devices()[0].device_kind}, {jax.device_count()} device(s), JAX {jax.__version__}"


def load_part(name: str, num_examples: int | None) -> Dataset:
    """Loads a data set: its first training examples and a sixth of that number of test examples, or all if None."""
    dataset = random_images() if name == "random" else load_dataset(name)
    if num_examples is None:
        return dataset
    train = jax.tree.map(lambda leaf: leaf[:num_examples], dataset.train)
    test = jax.tree.map(lambda leaf: leaf[: max(1, num_examples // 6)], dataset.test)
    return dataset._replace(train=train, test=test)


def random_images() -> Dataset:
    """Draws random images, of the size and number of MNIST's."""
    draw = np.random.default_rng(0)
    parts = [
        Batch(
            draw.random((size, 28, 28, 1), np.float32), np.arange(size, dtype=np.int32) % 10, np.ones(size, np.float32)
        )
        for size in (60_000, 10_000)
    ]
    return Dataset(*jax.tree.map(jnp.asarray, parts), num_classes=10)


def time_call(function: Callable[[], object]) -> float:
    """Times a call, until its result is computed."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def take_turns(functions: Mapping[Name, Callable[[], object]], turns: int) -> dict[Name, list[float]]:
    """Times each function once per turn, in forward and backward order by turns. Returns the seconds by name."""
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for turn in range(turns):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            seconds[name].append(time_call(functions[name]))
    return seconds


def quartiles(values: Iterable[float], digits: int = 2) -> str:
    """Formats the median and, if there are several values, the quartiles."""
    values = list(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class CompilationClock:
    """Adds up the time that this process spends on tracing, lowering and compiling."""

    def __init__(self) -> None:
        """Starts to listen."""
        self.spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            # This span contains the spans that began within it, so these are not counted twice.
            while self.spans and self.spans[-1][0] >= end - seconds:
                self.spans.pop()
            self.spans.append((end - seconds, end))

    def seconds(self) -> float:
        """Returns the time so far."""
        return sum(end - start for start, end in self.spans)


@dataclasses.dataclass
class Timer:
    """The times of a block of code, known when it ends.

    Attributes:
      seconds: wall time, without compilation.
      compilation: the time of compilation, in seconds.
    """

    seconds: float = math.nan
    compilation: float = math.nan


@contextlib.contextmanager
def timed(clock: CompilationClock) -> Iterator[Timer]:
    """Times a block of code."""
    timer = Timer()
    began, compiled = time.perf_counter(), clock.seconds()
    yield timer
    timer.compilation = clock.seconds() - compiled
    timer.seconds = time.perf_counter() - began - timer.compilation
