"""Runs a program in several processes on this machine, each with devices of its own."""

import os
import pathlib
import re
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def start_processes(num_processes, num_devices, *arguments, environment=None):
    """Starts `python *arguments` in each process, which finds the others by `jax.distributed.initialize`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    shared = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | (environment or {})
    shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(num_processes)}
    if num_processes == 1:
        del shared["JAX_COORDINATOR_ADDRESS"]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=shared | {"JAX_PROCESS_ID": str(index)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num_processes)
    ]


def run_processes(num_processes, num_devices, *arguments, environment=None, timeout=300):
    """Runs them to their end; returns the lines that each has printed, and fails if one fails."""
    started = start_processes(num_processes, num_devices, *arguments, environment=environment)
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, outputs, strict=True):
        assert process.returncode == 0, f"{out}\n{err}"
    return [lines_of(out) for out, _ in outputs]


def lines_of(printed):
    """The lines that a process has printed itself: gloo's messages may stand in the same lines."""
    kept = re.sub(r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks[^\n]*?: \d+\n?", "", printed)
    return [line for line in kept.splitlines() if line]
