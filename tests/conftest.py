"""Settings of all tests: four devices on one CPU, and no silent promotion of dtypes."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """For what relies on promotion elsewhere: Adam in optax, and network initialisers; in a sweep's threads too."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def mocked_birds(tmp_path):
    """A folder in which TFDS seems to have prepared `caltech_birds2011`: five random images a split, of many shapes."""
    import tensorflow_datasets as tfds

    folder = tmp_path / "caltech_birds2011" / "0.2.0"
    folder.mkdir(parents=True)
    with tfds.testing.mock_data():
        info = tfds.builder("caltech_birds2011", file_format="array_record").info
        splits = [tfds.core.SplitInfo(name=name, shard_lengths=[5], num_bytes=0) for name in ("train", "test")]
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(folder)
    (folder / "caltech_birds2011-train.array_record-00000-of-00001").touch()
    with tfds.testing.mock_data(num_examples=5, data_dir=tmp_path):
        yield tmp_path
