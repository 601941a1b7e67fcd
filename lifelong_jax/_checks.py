"""Checks of what users hand over. Shapes and dtypes are checked always, values where they are known: outside of jit."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax.types import Batch, Examples, Params


def check_params(name: str, params: Params) -> None:
    """Raises TypeError, naming the leaf, unless every leaf of `params` is a floating-point array."""
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}, but only floating-point leaves have gradients: "
                f"pass the trainable parameters alone, and close over the rest, or have None in its place."
            )


def check_examples(name: str, examples: Examples, weights: jax.Array | None, weights_name: str = "weights") -> None:
    """Raises ValueError unless all leaves of `examples`, and `weights`, agree on a number of examples of at least 1."""
    leaves = jax.tree.leaves_with_path(examples)
    if not leaves:
        raise ValueError(f"{name} has no arrays: pass a tree of arrays of shape [num_examples, ...].")
    sizes = {name + jax.tree_util.keystr(path): np.shape(leaf)[:1] for path, leaf in leaves}
    if weights is not None:
        if not hasattr(weights, "dtype"):
            raise ValueError(f"{weights_name} must be an array [num_examples], not a {type(weights).__name__}.")
        if np.ndim(weights) != 1:
            raise ValueError(
                f"{weights_name} has shape {np.shape(weights)}, but one weight per example is needed: [num_examples]."
            )
        sizes[weights_name] = np.shape(weights)
    if len(set(sizes.values())) > 1 or () in sizes.values():
        listed = ", ".join(f"{leaf}: {size[0] if size else 'none'}" for leaf, size in sizes.items())
        raise ValueError(f"{name} must have one leading axis of num_examples in common, but its sizes are {listed}.")
    if (0,) in sizes.values():
        raise ValueError(f"{name} is empty: a mean over no examples is not defined.")
    if weights is not None and is_concrete(weights):
        # Beyond these, a weight or a sum's reciprocal is no normal number, and XLA takes it for 0.
        values, least = np.asarray(weights, np.float64), float(np.finfo(np.float32).tiny)
        usable = np.isfinite(values) & ((values == 0) | (values >= least))
        if not (usable.all() and 0 < values.sum() <= 1 / least):
            raise ValueError(
                f"{weights_name} must be finite, not negative and not all 0; those above 0 at least {least:.2g}, and "
                f"their sum at most {1 / least:.2g}."
            )


def check_batch(name: str, batch: Batch, num_classes: int) -> None:
    """Raises ValueError or TypeError, naming the field, unless labels are classes and inputs and weights are finite."""
    check_examples(name, batch._replace(weights=None), batch.weights, f"{name}.weights")
    if not jnp.issubdtype(batch.labels.dtype, jnp.integer):
        raise TypeError(f"{name}.labels has dtype {batch.labels.dtype}, but a class is an integer.")
    if is_concrete(batch.labels):
        labels = np.asarray(batch.labels)
        if not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"{name}.labels has labels from {labels.min()} to {labels.max()}, but there are {num_classes} classes."
            )
    check_finite(f"{name}.inputs", batch.inputs, hint="Clean the data.")


def check_logits(logits: Any) -> None:
    """Raises ValueError unless a network's output for one example, or its shape, is one array with one axis."""
    if not isinstance(logits, (jax.Array, jax.ShapeDtypeStruct)) or logits.ndim != 1:
        raise ValueError(
            f"apply_fn must return [num_classes] for one example, which comes without batch axis, not arrays of shape "
            f"{jax.tree.map(jnp.shape, logits)}."
        )


def check_positive_integer(name: str, value: int | None, *, optional: bool = False) -> None:
    """Raises ValueError unless `value` is an integer of at least 1, or None where it is `optional`."""
    if optional and value is None:
        return
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")


def check_not_negative(name: str, value: Any, *, or_array: bool = False) -> None:
    """Raises ValueError unless `value` is a number, or an array where it may be one, and not negative where known."""
    numeric = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    if not numeric or (np.ndim(value) != 0 and not or_array):
        raise ValueError(f"{name} must be a number{' or an array of numbers' * or_array}, not {value!r}.")
    if is_concrete(value) and not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
        raise ValueError(f"{name} must be finite and not negative, not {value}.")


def check_positive(name: str, value: Any, at_most: float | None = None) -> None:
    """Raises ValueError where the value of a scalar is known and is not finite, not above 0, or above `at_most`."""
    if is_concrete(value) and not (np.isfinite(value) and 0 < value <= (np.inf if at_most is None else at_most)):
        bound = "" if at_most is None else f" and at most {at_most}"
        raise ValueError(f"{name} must be finite, above 0{bound}, not {value}.")


def check_same_structure(name: str, tree: Any, reference_name: str, reference: Any, partial: bool = False) -> None:
    """Raises ValueError, naming the first path that differs, unless two trees agree in structure and shapes.

    Where `partial`, None in `tree` stands for any branch of `reference`.
    """
    with_none = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is None)
    left_out = {path for path, leaf in with_none if leaf is None} if partial else set()

    def shapes(leaves: list[tuple[Any, Any]]) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path): np.shape(leaf)
            for path, leaf in leaves
            if not any(path[:depth] in left_out for depth in range(len(path) + 1))
        }

    ours, theirs = shapes(jax.tree.leaves_with_path(tree)), shapes(jax.tree.leaves_with_path(reference))
    for path in [*theirs, *ours]:
        if path not in ours or path not in theirs:
            lacking = name if path not in ours else reference_name
            raise ValueError(
                f"{name} and {reference_name} must be trees of one structure, but {lacking} has no leaf {path}."
            )
        if ours[path] != theirs[path]:
            raise ValueError(f"{name}{path} has shape {ours[path]}, but {reference_name}{path} has {theirs[path]}.")
    if not left_out and jax.tree.structure(tree) != jax.tree.structure(reference):
        raise ValueError(
            f"{name} and {reference_name} must be trees of one structure, but have {jax.tree.structure(tree)} "
            f"and {jax.tree.structure(reference)}."
        )


def check_importance(name: str, importance: Params) -> None:
    """Raises ValueError, naming the leaf, where values are known and one is NaN, infinite or negative."""
    path = _first_where(lambda lowest: lowest < 0, importance)
    if path is not None:
        raise ValueError(
            f"{name}{path} has entries that are NaN, infinite or negative: an importance is finite and not negative. "
            f"Did training diverge before it was computed?"
        )


def check_finite(name: str, tree: Any, hint: str = "Did training diverge?") -> None:
    """Raises ValueError, naming the leaf, where values are known and one is NaN or infinite."""
    path = _first_where(lambda lowest: lowest == -math.inf, tree)
    if path is not None:
        raise ValueError(f"{name}{path} has entries that are NaN or infinite. {hint}")


def is_finite(tree: Any) -> bool:
    """Says whether no entry of a tree, where values are known, is NaN or infinite."""
    return _first_where(lambda lowest: lowest == -math.inf, tree) is None


def _first_where(fails: Callable[[float], bool], tree: Any) -> str | None:
    """Finds the first leaf whose values are known and whose lowest entry fails, and returns its path."""
    known = [(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree) if is_concrete(leaf)]
    lowest = jax.device_get(_lowest_entries([leaf for _, leaf in known])) if known else []
    failing = (jax.tree_util.keystr(path) for (path, _), low in zip(known, lowest, strict=True) if fails(low))
    return next(failing, None)


def is_concrete(value: Any) -> bool:
    """Says whether a value is known now, or stands for a later one inside a jax transformation."""
    return not isinstance(value, jax.core.Tracer)


@jax.jit  # one program for a whole tree: op by op, each would be compiled for each shape
def _lowest_entries(leaves: list[jax.Array]) -> list[jax.Array]:
    """Finds the smallest entry of each leaf; −∞ where one is NaN or infinite."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        values = jnp.real(leaf)
        values = values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(jnp.float32)
        return jnp.min(jnp.where(jnp.isfinite(leaf), values, -jnp.inf), initial=jnp.inf)

    return list(map(of_leaf, leaves))
