"""Several runs at once, in threads: as many as there are cores on a CPU, where one small network leaves cores idle."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_at_once() -> int:
    """Returns how many runs to learn at once: the number of cores on a CPU, one on an accelerator.

    Returns:
      The number, at least 1.
    """
    if jax.default_backend() != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_as_finished(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int
) -> Iterator[tuple[Item, Result]]:
    """Maps a function over items in threads, some of them at once.

    `jax.config` holds in the threads, but `with jax.enable_x64(...)` and the like do not.

    Args:
      function: `function(item) -> result`.
      items: taken one by one, when a thread is free.
      at_once: the largest number of threads.

    Yields:
      Each item with its result, in the order in which they finish.

    Raises:
      KeyboardInterrupt: if the function raised it, once the other threads have finished.
      Exception: what the function raised otherwise, at once.
    """
    finished: queue.SimpleQueue = queue.SimpleQueue()

    def run(item: Item) -> None:
        try:
            finished.put((item, function(item), None))
        except BaseException as error:  # of any kind: it is raised again in the main thread
            finished.put((item, None, error))

    remaining, running, interrupted = iter(items), 0, False
    while True:
        while running < at_once and not interrupted:
            try:
                item = next(remaining)
            except StopIteration:
                break
            # Daemons: after an error, or a second Ctrl-C, the process must not wait for the other threads.
            threading.Thread(target=run, args=(item,), daemon=True).start()
            running += 1
        if running == 0:
            break
        item, result, error = finished.get()
        running -= 1
        if isinstance(error, KeyboardInterrupt):
            interrupted = True
        elif error is not None:
            raise error
        else:
            yield item, result
    if interrupted:
        raise KeyboardInterrupt
