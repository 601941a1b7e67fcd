"""The README's programs run as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"


def run_program(word):
    (program,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if word in code)
    names = {}
    exec(compile(program, str(README), "exec"), names)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((names["params"], names["consolidation"])))
    return names


def test_the_training_loop():
    assert run_program("def step")["step"]._cache_size() == 1  # one compilation serves all tasks


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_stream():
    assert run_program("learn_stream")["info"].loss[-1].mean() < 1.0


def test_no_figure_is_missing():
    assert not re.search(r"\{[A-Z_0-9]+\}|@@|TO BE TIMED", README.read_text())
