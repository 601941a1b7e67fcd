"""The layout of safetensors, written and read one tensor at a time: a header of JSON, and the tensors' bytes."""

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}
"""The names of the dtypes, in the order in which safetensors writes their tensors."""

DTYPES = tuple(_CODES)


class StoredTensor(NamedTuple):
    """A tensor in an open file. What is read of it is a copy: the file is mapped no longer than that takes."""

    file: BinaryIO
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def mapped(self) -> np.ndarray:
        """Returns the tensor as a part of the file."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def read(self, index: Any = ()) -> np.ndarray:
        """Returns a part of the tensor."""
        return np.array(self.mapped()[index])


def read_tensors(opened: BinaryIO) -> dict[str, StoredTensor]:
    """Returns the tensors of a file whose header safetensors has found to be whole."""
    size = int.from_bytes(opened.read(8), "little")
    header = json.loads(opened.read(size))
    dtypes = {code: jnp.dtype(name) for name, code in _CODES.items()}
    return {
        name: StoredTensor(
            opened, 8 + size + tensor["data_offsets"][0], tuple(tensor["shape"]), dtypes[tensor["dtype"]]
        )
        for name, tensor in header.items()
        if name != "__metadata__"
    }


def make_header(leaves: Mapping[str, list], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Makes the header of a file, and the places of its tensors, from their shapes and dtypes.

    The order is that of safetensors, which has the metadata in any order: here equal contents make equal files.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    places, end = {}, 0
    for name in sorted(leaves, key=lambda name: (DTYPES.index(leaves[name][1]), name)):
        shape, dtype = leaves[name]
        places[name], start = end, end
        end += math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)  # so that the tensors are aligned
    contents = len(written).to_bytes(8, "little") + written
    return contents, {name: len(contents) + place for name, place in places.items()}
