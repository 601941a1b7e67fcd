"""Settings of all tests: four devices on one CPU, and no silent promotion of dtypes."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """For what relies on promotion elsewhere: Adam in optax, and network initialisers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
