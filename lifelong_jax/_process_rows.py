"""A batch over several processes: each reads the rows that its own devices hold."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from lifelong_jax.types import Batch


def own_rows(sharding: NamedSharding, size: int) -> np.ndarray:
    """Returns which rows of a batch the devices of this process hold, in order."""
    indices: Any = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[rows] for (rows,) in indices]))


def rows_of_batches(num_examples: int, batch_size: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays out examples in batches that are padded to a size, each with its own examples.

    Returns:
      `[num_batches, size]`, the place of each row's example in the order, and whether it is no padding.
    """
    starts = np.arange(0, num_examples, batch_size)[:, None]
    lengths = np.minimum(batch_size, num_examples - starts)
    return starts + np.arange(size) % lengths, np.arange(size) < lengths


def weigh_rows(batch: Batch, is_example: np.ndarray) -> Batch:
    """Gives padding weight 0.

    Raises:
      ValueError: if an example has weight 0: the other processes do not know of it, and would not leave it out.
    """
    weights: Any = np.ones(len(is_example), np.float32) if batch.weights is None else np.asarray(batch.weights)
    if not (weights > 0).all():
        raise ValueError(
            "source has examples of weight 0, which processes that read other examples do not know of: leave them out "
            "of the source."
        )
    return batch._replace(weights=weights * is_example)


def place_rows(tree: Any, sharding: NamedSharding, rows: np.ndarray, size: int) -> Any:
    """Makes arrays `[size, ...]` over all processes, of the rows `[len(rows), ...]` that this one has read."""

    def of_leaf(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))

        def part(index: Any) -> np.ndarray:
            return leaf[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(of_leaf, tree)


def held_rows(tree: Any) -> Any:
    """Takes the rows of arrays `[size, ...]` that this process holds, whose values are known to it."""

    def of_leaf(leaf: jax.Array) -> Any:
        return leaf if leaf.is_fully_addressable else np.concatenate([part.data for part in leaf.addressable_shards])

    return jax.tree.map(of_leaf, tree)
