"""The README's programs run as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

README = pathlib.Path(__file__).absolute().parent.parent / "README.md"


def run_program(word):
    (program,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if word in code)
    names = {}
    exec(compile(program, str(README), "exec"), names)
    return names


def assert_finite(*trees):
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


def test_the_training_loop():
    names = run_program("def step")
    assert_finite(names["params"], names["consolidation"])
    assert names["step"]._cache_size() == 1  # one compilation serves all tasks


def test_keeping_a_consolidation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_finite(run_program("save_consolidation")["kept"])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_stream():
    names = run_program("learn_stream")
    assert_finite(names["params"], names["consolidation"])
    assert names["info"].loss[-1].mean() < 1.0
