"""How the benchmarks time: calls, blocks of code without what is compiled in them, and the spread of several times."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.monitoring


def time_call(function: Callable[[], object]) -> float:
    """Times a call, its result included."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def quartiles(values: Sequence[float], digits: int = 2) -> str:
    """Writes the median and, of more than one value, the quartiles."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class CompilationClock:
    """Adds up the time in which anything was traced, lowered or compiled, in this process."""

    def __init__(self) -> None:
        """Starts to listen."""
        self.spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            # What was traced within this span is within this span's seconds too.
            while self.spans and self.spans[-1][0] >= end - seconds:
                self.spans.pop()
            self.spans.append((end - seconds, end))

    def seconds(self) -> float:
        """Returns the time so far."""
        return sum(end - start for start, end in self.spans)


class Timer(NamedTuple):
    """What a block of code took: wall time without compilation, and compilation."""

    seconds: list[float]
    compilation: list[float]


@contextlib.contextmanager
def timed(clock: CompilationClock) -> Iterator[Timer]:
    """Times a block of code."""
    timer = Timer([], [])
    began, compiled = time.perf_counter(), clock.seconds()
    yield timer
    timer.compilation.append(clock.seconds() - compiled)
    timer.seconds.append(time.perf_counter() - began - timer.compilation[0])
