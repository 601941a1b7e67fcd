"""Programs are made for the platform that is asked for, whatever device there is."""

import jax
import jax.numpy as jnp
import pytest

from lifelong_jax.platforms import is_for_cpu, lowering_for


def test_programs_are_for_the_default_device_unless_another_platform_is_named(monkeypatch):
    assert is_for_cpu()
    with lowering_for("tpu"):
        assert not is_for_cpu()
        with lowering_for("cpu"):
            assert is_for_cpu()
        assert not is_for_cpu()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not is_for_cpu()
    for device in (jax.devices()[0], "cpu"):
        with jax.default_device(device):
            assert is_for_cpu()


def test_a_function_is_traced_again_for_another_platform():
    choose = jax.jit(lambda x: x if is_for_cpu() else 2 * x)
    assert choose(jnp.ones(())) == 1
    with lowering_for("cuda"):
        assert choose(jnp.ones(())) == 2
    assert choose(jnp.ones(())) == 1


def test_a_platform_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="platform must be one of 'cpu', 'cuda', 'rocm', 'tpu', not 'gpu'"):
        lowering_for("gpu")
