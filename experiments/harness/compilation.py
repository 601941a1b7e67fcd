"""How long JAX compiles, which the times in tables leave out, and where it keeps what it has compiled."""

import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def time_compilation() -> Iterator[Callable[[], float]]:
    """Measures tracing, lowering and compilation, in all threads.

    Yields:
      A function that returns the seconds so far, added up over the threads.

    Example:
      >>> with time_compilation() as seconds:
      ...     _ = jax.jit(lambda x: x + 1)(1.0)
      >>> seconds() > 0
      True
    """
    spans: dict[int, list[tuple[float, float]]] = {}

    def listen(event: str, seconds: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            of_thread = spans.setdefault(threading.get_ident(), [])
            while of_thread and of_thread[-1][0] >= end - seconds:  # the trace of a function that this one calls
                of_thread.pop()
            of_thread.append((end - seconds, end))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: sum(end - start for of_thread in list(spans.values()) for start, end in list(of_thread))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def keep_programs(folder: str) -> None:
    """Lets JAX keep all compiled programs in a folder, and use those that are there.

    Call it before anything is compiled.

    Args:
      folder: it is made if it does not exist.
    """
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # by default, only the slow ones
