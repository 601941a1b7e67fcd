"""How the entries of a leaf make matrices: the layout of Kronecker factors."""

import math
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How the entries of a leaf make matrices: the leaf is split into more axes, and these are reordered.

    Attributes:
      shape: the leaf's shape.
      split: the lengths of the axes that the leaf is split into.
      order: their order in the matrices.
      matrices: (groups, rows, columns).
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    matrices: tuple[int, int, int]

    def to_matrices(self, leaf: Any) -> Any:
        """Maps a leaf to `[groups, rows, columns]`."""
        return leaf.reshape(self.split).transpose(self.order).reshape(self.matrices)

    def from_matrices(self, matrices: Any) -> Any:
        """Maps `[groups, rows, columns]` to a leaf."""
        ordered = matrices.reshape([self.split[axis] for axis in self.order])
        return ordered.transpose(np.argsort(self.order)).reshape(self.shape)


def find_layout(indices: np.ndarray, shape: tuple[int, ...]) -> Layout | None:
    """Finds the layout of a leaf from the index in the leaf of each entry of its matrices, `[groups, rows, columns]`.

    Returns None if the entries are moved in another way than a layout can (reversed, say).

    Example:
      >>> find_layout(np.array([[[0, 2], [1, 3]]]), (2, 2))  # transposed
      Layout(shape=(2, 2), split=(2, 2), order=(1, 0), matrices=(1, 2, 2))
    """
    lengths_and_strides = [axis for number in range(3) for axis in _split(np.moveaxis(indices, number, 0)[:, 0, 0])]
    by_stride = sorted(range(len(lengths_and_strides)), key=lambda axis: -lengths_and_strides[axis][1])
    split = tuple(lengths_and_strides[axis][0] for axis in by_stride)
    layout = Layout(shape, split, tuple(int(axis) for axis in np.argsort(by_stride)), indices.shape)
    size = math.prod(shape)
    if math.prod(split) != size or not np.array_equal(layout.to_matrices(np.arange(size).reshape(shape)), indices):
        return None
    return layout


def _split(indices: np.ndarray) -> list[tuple[int, int]]:
    """Splits an axis into axes along which the index grows evenly; returns their lengths and strides."""
    axes, offsets = [], indices - indices[0]
    while len(offsets) > 1:
        even = offsets == np.arange(len(offsets)) * offsets[1]
        length = len(offsets) if even.all() else int(np.argmin(even))
        axes.append((length, int(offsets[1])))
        offsets = offsets[::length]
    return axes[::-1]
