"""The public names, and those of version 0.1."""

import importlib

import pytest

import lifelong_jax


def test_there_are_not_too_many_names():
    assert len(lifelong_jax.__all__) <= 48
    assert len(set(lifelong_jax.__all__)) == len(lifelong_jax.__all__)
    assert not set(lifelong_jax.__all__) & set(lifelong_jax._NEW_NAMES)


@pytest.mark.parametrize("name", lifelong_jax._NEW_NAMES)
def test_a_name_of_version_0_1_warns_with_the_new_one(name):
    module, attribute = lifelong_jax._NEW_NAMES[name].split(".")
    new = f"lifelong_jax.{module}.{attribute}"
    with pytest.warns(DeprecationWarning, match=rf"^lifelong_jax\.{name} is now {new}\.$") as warned:
        found = getattr(lifelong_jax, name)
    assert warned[0].filename == __file__
    assert found is getattr(importlib.import_module(f"lifelong_jax.{module}"), attribute)


def test_an_old_name_can_be_imported():
    with pytest.warns(DeprecationWarning, match=r"lifelong_jax\.ewc is now lifelong_jax\.methods\.ewc\."):
        from lifelong_jax import ewc
    assert ewc is lifelong_jax.methods.ewc


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'lifelong_jax' has no attribute 'ewk'"):
        lifelong_jax.ewk  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'ewk'"):
        from lifelong_jax import ewk  # noqa: F401
