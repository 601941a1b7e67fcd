"""The examples in the docstrings, and the public names."""

import doctest
import importlib
import pathlib

import pytest

import lifelong_jax

MODULES = sorted(path.stem for path in pathlib.Path(lifelong_jax.__file__).parent.glob("*.py") if path.stem[0] != "_")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    assert doctest.testmod(importlib.import_module(f"lifelong_jax.{module}")).failed == 0


def test_public_names():
    assert lifelong_jax.__all__ == sorted(lifelong_jax.__all__)
    for name in lifelong_jax.__all__:
        assert getattr(lifelong_jax, name).__doc__
