"""What chips can do at most: operations and bytes per second, published or measured."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import time_call

PRECISIONS = ("highest", "default")  # of products of float32: in full, or by JAX's default, which is coarser


class Chip(NamedTuple):
    """The limits of a chip, as its maker publishes them, of dense products.

    Attributes:
      bfloat16: floating-point operations per second, of products of bfloat16.
      highest: the same for float32 in full. A TPU takes six products of bfloat16 for it.
      default: the same for float32 by JAX's default: TensorFloat-32 on a GPU, bfloat16 on a TPU.
      bytes_per_second: of its memory.
      memory: in bytes.
      network: bytes per second that it sends to chips nearby, and receives as many at the same time.
    """

    bfloat16: float
    highest: float
    default: float
    bytes_per_second: float
    memory: float
    network: float


def _tpu(teraflops: float, gigabytes_per_second: float, gigabytes: float, network: float) -> Chip:
    flops = 1e12 * teraflops
    return Chip(flops, flops / 6, flops, 1e9 * gigabytes_per_second, 1e9 * gigabytes, 1e9 * network)


H100 = Chip(989e12, 67e12, 495e12, 3350e9, 80e9, 450e9)
V5P = _tpu(459, 2765, 95, 300)

A100 = Chip(312e12, 19.5e12, 156e12, 2039e9, 80e9, 300e9)

# By the beginning of JAX's name of the device; the first that fits.
CHIPS = {
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H100._replace(bytes_per_second=4800e9, memory=141e9),
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-SXM4-40GB": A100._replace(bytes_per_second=1555e9, memory=40e9),
    "TPU v5 lite": _tpu(197, 819, 16, 100),
    "TPU v5": V5P,
    "TPU v6 lite": _tpu(918, 1640, 32, 224),
}


def find_chip(kind: str) -> Chip | None:
    """Returns the limits of a device by JAX's name of its kind; None if they are not in the table."""
    return next((chip for name, chip in CHIPS.items() if kind.startswith(name)), None)


def measure_flops(precision: str, size: int) -> float:
    """Measures operations per second: the fastest of several products of square matrices of float32."""
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    return 2 * size**3 / _fastest(functools.partial(product, matrix, matrix))


def measure_bytes(num_bytes: int) -> float:
    """Measures bytes per second: the fastest of several copies of an array, which is read once and written once."""
    array = jnp.zeros(num_bytes // 4)
    return 2 * array.nbytes / _fastest(functools.partial(jax.jit(lambda x: x + 1), array))


def _fastest(call: functools.partial) -> float:
    return min(time_call(call) for _ in range(6))
