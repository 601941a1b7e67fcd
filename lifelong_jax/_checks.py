"""Checks of arguments: shapes and dtypes always, values where they are known, which is outside of jit."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax._processes import to_host
from lifelong_jax.compression import CompressedDiagonal
from lifelong_jax.forms import KroneckerFactors, is_form
from lifelong_jax.types import Batch, Example, Examples, Params


def check_params(name: str, params: Params) -> None:
    """Raises an error, naming the leaf, unless every leaf of `params` is a floating-point array that is trained."""
    is_node = lambda node: _is_statistic(node) or isinstance(node, CompressedDiagonal)  # noqa: E731
    for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_node):
        if path[:1] == (jax.tree_util.DictKey("batch_stats"),) or _is_statistic(leaf):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is a running statistic of batch normalisation, which would be "
                f"trained, penalised and given importance: pass only the trainable parameters, variables['params'] in "
                f"linen or nnx.split(model, nnx.Param, ...) in nnx, and close over the others."
            )
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (int, float, complex)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array: pass the trainable "
                f"arrays alone. Of an equinox module, take params, static = eqx.partition(model, eqx.is_inexact_array) "
                f"and the function lambda params, x: eqx.combine(params, static)(x)."
            )
        dtype = leaf.dtype if isinstance(leaf, CompressedDiagonal) else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype}, but only floating-point leaves have gradients: "
                f"pass only the trainable parameters and close over the others, or put None in its place."
            )


def _is_statistic(node: Any) -> bool:
    return type(node).__name__ == "BatchStat"  # flax.nnx's variable


def check_examples(
    name: str,
    examples: Examples,
    weights: jax.Array | None,
    weights_name: str = "weights",
    *,
    may_be_padding: bool = False,
) -> None:
    """Raises ValueError unless all leaves of `examples`, and `weights`, have the same number of examples, 1 or more.

    If `may_be_padding`, all weights may be 0.
    """
    leaves = jax.tree.leaves_with_path(examples)
    if not leaves:
        raise ValueError(f"{name} has no arrays: pass a tree of arrays of shape [num_examples, ...].")
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array: make an array "
                f"[num_examples, ...] of each list, by np.asarray."
            )
    sizes = {name + jax.tree_util.keystr(path): np.shape(leaf)[:1] for path, leaf in leaves}
    if weights is not None:
        if not hasattr(weights, "dtype"):
            raise ValueError(f"{weights_name} must be an array [num_examples], not a {type(weights).__name__}.")
        if np.ndim(weights) != 1:
            raise ValueError(f"{weights_name} has shape {np.shape(weights)}, but must be [num_examples].")
        sizes[weights_name] = np.shape(weights)
    if len(set(sizes.values())) > 1 or () in sizes.values():
        listed = ", ".join(f"{leaf}: {size[0] if size else 'none'}" for leaf, size in sizes.items())
        raise ValueError(f"all arrays of {name} must have the same leading axis, num_examples, but have {listed}.")
    if (0,) in sizes.values():
        raise ValueError(f"{name} is empty: a mean over no examples is not defined.")
    if weights is not None and is_concrete(weights):
        # XLA replaces subnormal numbers by 0: no weight, nor the reciprocal of their sum, may be one.
        values, least = to_host(weights).astype(np.float64), float(np.finfo(np.float32).tiny)
        usable = np.isfinite(values) & ((values == 0) | (values >= least))
        if not (usable.all() and (may_be_padding or values.any()) and values.sum() <= 1 / least):
            raise ValueError(
                f"{weights_name} must be finite, not negative and not all 0; a weight above 0 must be at least "
                f"{least:.2g}, and their sum at most {1 / least:.2g}."
            )


def check_batch(name: str, batch: Batch) -> None:
    """Raises ValueError or TypeError, naming the field, unless a batch's sizes agree and are not 0."""
    check_examples(name, batch._replace(weights=None), batch.weights, f"{name}.weights")


ONE_CLASS_EACH = "Use labels[:, 0] for a column, or labels.argmax(axis=1) for one-hot rows"
"""How to make labels of columns and of one-hot rows."""


def check_classes(name: str, batch: Batch, num_classes: int | None = None) -> None:
    """Raises ValueError or TypeError, naming the field, unless each example has one class, below `num_classes`."""
    if np.ndim(batch.labels) != 1:
        raise ValueError(
            f"{name}.labels has shape {np.shape(batch.labels)}, but must be [num_examples], one class per example. "
            f"{ONE_CLASS_EACH}."
        )
    check_class_numbers(name, batch.labels, num_classes)


def check_class_numbers(name: str, labels: Any, num_classes: int | None) -> None:
    """Raises TypeError or ValueError, naming the field, unless labels are integers from 0 to below `num_classes`."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}.labels has dtype {labels.dtype}, but labels must be integers.")
    if num_classes is None or not is_concrete(labels) or not labels.size:
        return
    labels = to_host(labels)
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"{name}.labels has labels from {labels.min()} to {labels.max()}, but there are {num_classes} classes, "
            f"numbered from 0."
        )


def check_labels(loss_fn: Any, name: str, params: Params, examples: Any) -> None:
    """Raises an error that names the argument unless labels are what one of the library's own losses takes."""
    if hasattr(loss_fn, "check_examples"):
        loss_fn.check_examples(name, params, examples)


def shapes_of(tree: Any) -> Any:
    """Returns the shapes and dtypes of a tree of arrays, without what their types say of a mesh."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def first_example(examples: Examples) -> Example:
    """Returns the shapes and dtypes of one example."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)


@contextlib.contextmanager
def for_one_example(name: str, example: Example) -> Iterator[None]:
    """Adds to an error of the function `name` what it was called with: many networks are written for batches."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"{name} was called for one example, without batch axis, of shape {jax.tree.map(jnp.shape, example)}. If "
            f"its network is written for batches, call network(params, x[None])[0] in it."
        )
        if not jax.sharding.get_abstract_mesh().empty:
            error.add_note(
                f"{name} is computed on automatic axes of a mesh. An array that it closes over must not be on explicit "
                f"axes: let it close over np.asarray(array), or make the array a parameter or a part of the examples."
            )
        raise


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
    """Raises ValueError unless `value` is a number (or an array, if allowed) and, where known, not negative."""
    numeric = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    if not numeric or (np.ndim(value) != 0 and not or_array):
        raise ValueError(f"{name} must be a number{' or an array of numbers' * or_array}, not {value!r}.")
    if is_concrete(value) and not np.all(np.isfinite(to_host(value).astype(np.float64)) & (to_host(value) >= 0)):
        raise ValueError(f"{name} must be finite and not negative, not {value}.")


def check_positive(name: str, value: Any, at_most: float | None = None) -> None:
    """Raises ValueError unless a scalar, where its value is known, is finite, above 0 and not above `at_most`."""
    if is_concrete(value) and not (np.isfinite(value) and 0 < np.asarray(value) <= (at_most or np.inf)):
        bound = "" if at_most is None else f" and at most {at_most}"
        raise ValueError(f"{name} must be finite, above 0{bound}, not {value}.")


def check_same_structure(name: str, tree: Any, reference_name: str, reference: Any, partial: bool = False) -> None:
    """Raises ValueError, naming the first path that differs, unless two trees agree in structure and shapes.

    A form has the shape of the leaf in whose place it is. If `partial`, None in `tree` stands for any
    branch of `reference`.
    """
    with_none = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is None or is_form(node))
    left_out = {path for path, leaf in with_none if leaf is None} if partial else set()

    def shapes(leaves: list[tuple[Any, Any]]) -> dict[str, tuple[int, ...]]:
        return {
            jax.tree_util.keystr(path): np.shape(leaf)
            for path, leaf in leaves
            if not any(path[:depth] in left_out for depth in range(len(path) + 1))
        }

    ours, theirs = (shapes(jax.tree.leaves_with_path(tree, is_leaf=is_form)) for tree in (tree, reference))
    for path in [*theirs, *ours]:
        if path not in ours or path not in theirs:
            without = name if path not in ours else reference_name
            raise ValueError(
                f"{name} and {reference_name} must be trees of one structure, but {without} has no leaf {path}."
            )
        if ours[path] != theirs[path]:
            raise ValueError(f"{name}{path} has shape {ours[path]}, but {reference_name}{path} has {theirs[path]}.")
    structure, reference_structure = (jax.tree.structure(tree, is_leaf=is_form) for tree in (tree, reference))
    if not left_out and structure != reference_structure:  # type: ignore[operator]
        raise ValueError(
            f"{name} and {reference_name} must be trees of one structure, but have {structure} and "
            f"{reference_structure}."
        )


@contextlib.contextmanager
def for_a_consolidation() -> Iterator[None]:
    """Adds to an error of trees that differ what to do if one of them belongs to a network that has grown."""
    try:
        yield
    except ValueError as error:
        error.add_note("If the network has grown or shrunk, lifelong_jax.growth makes its consolidation fit.")
        raise


def check_same_inputs(name: str, x: Example, reference_name: str, reference: Example) -> None:
    """Raises ValueError or TypeError, naming the leaf, unless two inputs agree in structure, shapes and dtypes."""
    check_same_structure(name, x, reference_name, reference)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(x), jax.tree.leaves(reference), strict=True):
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != jax.dtypes.canonicalize_dtype(other.dtype):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, but {reference_name} has {other.dtype}: "
                f"convert the inputs of all tasks to one dtype. Of bytes, datasets.scale_bytes makes floats."
            )


def check_same_forms(name: str, importance: Params, reference_name: str, reference: Params) -> None:
    """Raises ValueError, naming the leaf, unless two importances agree in structure, in shapes and in their forms."""
    check_same_structure(name, importance, reference_name, reference)
    theirs = jax.tree.leaves(reference, is_leaf=is_form)
    for (path, ours), other in zip(jax.tree.leaves_with_path(importance, is_leaf=is_form), theirs, strict=True):
        with_factors = [isinstance(form, KroneckerFactors) for form in (ours, other)]
        if jax.tree.structure(ours) == jax.tree.structure(other) or not any(with_factors):  # type: ignore[operator]
            continue
        kinds = [
            f"Kronecker factors ({form.layout})" if factored else "a diagonal"
            for form, factored in zip((ours, other), with_factors, strict=True)
        ]
        raise ValueError(
            f"{name}{jax.tree_util.keystr(path)} has {kinds[0]}, but {reference_name} has {kinds[1]}: begin with "
            f"init_consolidation(params, like=importance)."
        )


def check_importance(name: str, importance: Params) -> None:
    """Raises ValueError, naming the leaf, if a known value is NaN, infinite or negative."""
    # Eigenvalues are NaN if a factor is; eigenvectors may be negative.
    values = [
        (path, [form.row_values, form.column_values] if isinstance(form, KroneckerFactors) else form)
        for path, form in jax.tree.leaves_with_path(importance, is_leaf=is_form)
    ]
    path = _first_where(lambda lowest: lowest < 0, values)
    if path is not None:
        raise ValueError(
            f"{name}{path} has entries that are NaN, infinite or negative, which no importance has. Did training "
            f"diverge before it was computed?"
        )


def check_finite(name: str, tree: Any, hint: str = "Did training diverge?") -> None:
    """Raises ValueError, naming the leaf, if a known value is NaN or infinite."""
    path = _first_where(lambda lowest: lowest == -math.inf, jax.tree.leaves_with_path(tree))
    if path is not None:
        raise ValueError(f"{name}{path} has entries that are NaN or infinite. {hint}")


def is_finite(tree: Any) -> bool:
    """Returns whether all known values of a tree are finite."""
    return _first_where(lambda lowest: lowest == -math.inf, jax.tree.leaves_with_path(tree)) is None


def is_zero(tree: Any) -> bool:
    """Returns whether all values of a tree are 0."""
    with jax.ensure_compile_time_eval():
        return not jax.device_get(_any_nonzero(tree))


@jax.jit
def _any_nonzero(tree: Any) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)]))


def _first_where(fails: Callable[[float], bool], leaves: list[tuple[Any, Any]]) -> str | None:
    """Returns the path of the first leaf whose values are known and whose lowest entry fails, or None."""
    known = [(path, leaf) for path, tree in leaves for leaf in jax.tree.leaves(tree) if is_concrete(leaf)]
    with jax.ensure_compile_time_eval():  # else, within a function that is being traced, the entries would not be known
        lowest = jax.device_get(_lowest_entries([leaf for _, leaf in known])) if known else []
    failing = (jax.tree_util.keystr(path) for (path, _), low in zip(known, lowest, strict=True) if fails(low))
    return next(failing, None)


def is_concrete(value: Any) -> bool:
    """Returns whether a value is known, rather than traced by a jax transformation."""
    return not isinstance(value, jax.core.Tracer)


@jax.jit  # one program for the whole tree, rather than one for each operation and shape
def _lowest_entries(leaves: list[jax.Array]) -> list[jax.Array]:
    """Returns the smallest entry of each leaf, or −∞ if an entry is NaN or infinite."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        leaf = leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf.astype(jnp.float32)
        # A finite number less itself is 0. On a CPU, XLA would hold all of `isfinite`, or lose a NaN in the minimum.
        return jnp.where(jnp.sum(leaf - leaf) == 0, jnp.min(jnp.real(leaf), initial=jnp.inf), -jnp.inf)

    return list(map(of_leaf, leaves))


def check_method(method: Any) -> None:
    """Raises ValueError unless the rule and the decay of a `Method` are valid."""
    check_choice("method.rule", method.rule, ("separate", "latest"))
    check_not_negative("method.decay", method.decay)
