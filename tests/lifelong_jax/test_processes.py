"""Several processes compute what one does, write one file, and fail together."""

import jax
import numpy as np
import pytest

from tests.lifelong_jax.of_all_processes import measure
from tests.processes import run_processes


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_and_write_what_one_does(tmp_path, num_processes):
    with jax.enable_x64(True):
        (tmp_path / "one").mkdir()
        measured = measure(tmp_path / "one")
    (tmp_path / "several").mkdir()
    arguments = ("-m", "tests.lifelong_jax.of_all_processes", tmp_path / "several")
    run_processes(num_processes, 4 // num_processes, *arguments, environment={"JAX_ENABLE_X64": "true"})
    outputs = [(tmp_path / "several" / f"refused.{index}").read_text().splitlines() for index in range(num_processes)]
    errors = measured.pop("refused")
    assert [error.split(":")[0] for error in errors] == ["ValueError", "FileExistsError", "ValueError"]
    assert [line.replace("/several/", "/one/") for line in outputs[0]] == errors
    for output in outputs[1:]:
        first, second, third = output
        assert "kept.safetensors is damaged, or not a" in first
        assert second.endswith("x.safetensors is not written: process 0 has failed. Its own error says why.")
        assert third == errors[2]
    with np.load(tmp_path / "several" / "measured.npz") as found:
        for ours, theirs in zip(found.values(), jax.tree.leaves(measured), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-14)
