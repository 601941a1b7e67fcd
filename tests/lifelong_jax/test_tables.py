"""Markdown tables: the example in the docstring."""

import doctest

from lifelong_jax import _tables


def test_example_runs():
    results = doctest.testmod(_tables)
    assert results.failed == 0 < results.attempted
