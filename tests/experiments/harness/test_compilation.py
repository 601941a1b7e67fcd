"""Compilation in the scripts: its time, where nothing is counted twice, and the folder of compiled programs."""

import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp

from experiments.harness.compilation import time_compilation


def test_compilation_is_measured_once():
    inner = jax.jit(lambda x: jnp.sin(x) * jnp.cos(x))
    outer = jax.jit(lambda x: inner(inner(x[0])) + inner(x[1]))
    x = jnp.ones((2, 3))
    with time_compilation() as seconds:
        before = seconds()
        start = time.perf_counter()
        outer(x).block_until_ready()
        elapsed = time.perf_counter() - start
        measured = seconds()
        outer(x).block_until_ready()
        assert before == 0 < measured <= elapsed
        assert seconds() == measured


def test_nested_spans_are_one_span(monkeypatch):
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    monkeypatch.setattr(jax.monitoring, "unregister_event_duration_listener", listeners.remove)
    now = iter([1.0, 2.0, 3.0, 10.0])
    with time_compilation() as seconds:
        monkeypatch.setattr(time, "perf_counter", lambda: next(now))
        (listen,) = listeners
        listen("/jax/core/compile/jaxpr_trace_duration", 0.5)
        listen("/jax/core/compile/jaxpr_trace_duration", 1.75)  # from 0.25 to 2: it has the first one within it
        listen("/jax/some/other/event", 100.0)
        listen("/jax/core/compile/backend_compile_duration", 0.5)
        thread = threading.Thread(target=listen, args=("/jax/core/compile/backend_compile_duration", 8.0))
        thread.start()
        thread.join()
        assert seconds() == 1.75 + 0.5 + 8.0
    assert not listeners


PROGRAM = """
import sys
import jax
from experiments.harness.settings import RunSettings, parse_settings
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
parse_settings(RunSettings, "permuted", ["--compilation-cache", sys.argv[1]])
jax.jit(lambda x: 3 * x + 1)(1.0)
print(sum(hits))
"""


def test_programs_are_compiled_once_for_all_runs(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "programs")]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [int(run.stdout) for run in runs] == [0, 1]
