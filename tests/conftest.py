"""Settings of all tests: four devices on one CPU, no silent promotion of dtypes, and little optimisation."""

import os

# Most tests are about numbers, not speed, and most of their time is compilation: the simple emitters, in one module of
# LLVM, take less than half of it. Flags that were set before come last, and win. What tests start inherits all of them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=4",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import ctypes
import gc
import pathlib
import sys

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_finish():
    """What is imported stays, so that the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def free_compiled_programs():
    """Frees what has been compiled, and gives its memory back: a worker would grow to several GiB."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: None)(0)  # glibc alone has it


def is_large():
    """Whether the process holds more than 1 GiB; True where that is not known."""
    if sys.platform != "linux":
        return True
    num_pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE") > 2**30


@pytest.fixture(scope="module", autouse=True)
def _free_after_modules():
    """Not after each one: the next module has many of the small programs too, one for each operation and shape."""
    yield
    if is_large():
        free_compiled_programs()


@pytest.fixture
def free_afterwards():
    """For tests that compile much, and share little of it with the others of their module."""
    yield
    free_compiled_programs()


@pytest.fixture
def standard_promotion():
    """For what relies on promotion elsewhere: Adam in optax, and network initialisers; in a sweep's threads too."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def optimized():
    """For tests of what the compiler makes of a program: its products, its memory, its copies."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


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
