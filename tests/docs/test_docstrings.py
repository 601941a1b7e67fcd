"""The examples in the docstrings run, and the public names have docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import lifelong_jax

FOUND = [module.name for module in pkgutil.walk_packages(lifelong_jax.__path__, "lifelong_jax.")]
MODULES = ["lifelong_jax", *(name for name in FOUND if "._" not in name)]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_public_names():
    assert lifelong_jax.__all__ == sorted(lifelong_jax.__all__)
    for name in lifelong_jax.__all__:
        assert getattr(lifelong_jax, name).__doc__
