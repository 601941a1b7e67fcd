"""Consolidations and training states on disk: written whole or not at all, checked when they are read, never pickled.

A consolidation is a safetensors file, which any program reads. A checkpoint is a folder that orbax writes, with a
manifest of its files' SHA-256 digests, since orbax restores flipped bits without a word.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from lifelong_jax import __version__, _checks, _files
from lifelong_jax.types import Consolidation

State = TypeVar("State")

_FORMAT = "lifelong_jax consolidation 1"
_PENALTY = "strength / 2 * sum(importance * (params - anchor) ** 2), beside a loss that is a mean over examples"
_DTYPES = ("bfloat16", "float16", "float32", "float64")  # the floating ones that safetensors and NumPy both have
_MANIFEST = "manifest.json"


def save_consolidation(
    file: str | os.PathLike, consolidation: Consolidation, *, estimator: str, num_examples: int, sync: bool = True
) -> None:
    """Writes a consolidation into a safetensors file, for another program to go on from.

    Each leaf's name is its path in the tree, as error messages write it: `anchor['params']['Dense_0']['kernel']`. The
    metadata (`read_metadata`) say which estimator made the importance and from how many examples, by which formula λ
    weighs it, the version of the library, and the SHA-256 digest of all the rest.

    Args:
      file: where; what was there is replaced at once, when the new file is complete.
      consolidation: what is kept, from `consolidate`, or one task's `Consolidation(params, importance)`.
      estimator: how the importance was computed, in words: "exact Fisher diagonal, 5 tasks".
      num_examples: how many examples it is a mean over; of several tasks, all of them.
      sync: whether to wait until the file would survive a power failure, some 10 milliseconds.

    Raises:
      TypeError: if a leaf is not floating-point, or `estimator` is no text.
      ValueError: if anchor and importance differ in structure or shapes, an entry is NaN, infinite, or, of the
        importance, negative, a dtype is not one of bfloat16, float16, float32, float64, two leaves have one path, or
        `num_examples` is no positive integer.
      OSError: if the file cannot be written; what was there is kept.

    Example:
      >>> import tempfile
      >>> kept = Consolidation({"w": np.ones(3, np.float32)}, {"w": np.zeros(3, np.float32)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_consolidation(f"{folder}/kept.safetensors", kept, estimator="exact Fisher diagonal", num_examples=60)
      ...     load_consolidation(f"{folder}/kept.safetensors", like=kept).anchor
      {'w': Array([1., 1., 1.], dtype=float32)}
    """
    if not isinstance(estimator, str):
        raise TypeError(f"estimator must be a text, not a {type(estimator).__name__}.")
    _checks.check_positive_integer("num_examples", num_examples)
    anchor, importance = consolidation
    _checks.check_params("anchor", anchor)
    _checks.check_params("importance", importance)
    _checks.check_same_structure("importance", importance, "anchor", anchor)
    _checks.check_finite("anchor", anchor)
    _checks.check_importance("importance", importance)
    leaves = _named_leaves("anchor", anchor) | _named_leaves("importance", importance)
    tensors = {name: np.ascontiguousarray(leaf).reshape(np.shape(leaf)) for name, leaf in leaves.items()}
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but only {', '.join(_DTYPES)} can be saved.")
    metadata = {
        "format": _FORMAT,
        "estimator": estimator,
        "num_examples": str(num_examples),
        "penalty": _PENALTY,
        "library_version": __version__,
    }
    metadata["sha256"] = _digest(tensors, metadata)
    _files.write(pathlib.Path(file), safetensors.numpy.save(tensors, metadata), sync=sync)


def load_consolidation(file: str | os.PathLike, like: Consolidation) -> Consolidation:
    """Reads a consolidation that `save_consolidation` wrote.

    Args:
      file: where it is.
      like: what its structure, shapes and dtypes must be, such as `init_consolidation(params)`; the values are not
        looked at, and may be `jax.ShapeDtypeStruct`. The arrays are placed as these are.

    Returns:
      A consolidation with the structure of `like`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or no consolidation, or does not fit `like`: the first leaf that does not is named.

    Example:
      >>> load_consolidation("/nowhere.safetensors", like=Consolidation(np.zeros(3), np.zeros(3)))
      Traceback (most recent call last):
        ...
      FileNotFoundError: No such file or directory: /nowhere.safetensors
    """
    tensors, _ = _read(file)
    wanted = _named_leaves("anchor", like.anchor) | _named_leaves("importance", like.importance)
    _check_fits(str(file), _describe(tensors), _describe(wanted))
    return jax.tree.unflatten(
        jax.tree.structure(like), [_place(name, tensors[name], leaf) for name, leaf in wanted.items()]
    )


def read_metadata(file: str | os.PathLike) -> dict[str, str]:
    """Reads what a saved consolidation says of itself.

    Args:
      file: from `save_consolidation`.

    Returns:
      `estimator`, `num_examples`, `penalty` (what λ multiplies), `library_version`, `format` and `sha256`, all texts.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or no consolidation.

    Example:
      >>> import tempfile
      >>> kept = Consolidation(np.ones(3, np.float32), np.zeros(3, np.float32))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_consolidation(f"{folder}/kept.safetensors", kept, estimator="MAS", num_examples=60)
      ...     read_metadata(f"{folder}/kept.safetensors")["estimator"]
      'MAS'
    """
    return _read(file)[1]


def save_checkpoint(folder: str | os.PathLike, step: int, state: Any, *, keep: int = 2) -> None:
    """Writes a checkpoint into `folder/<step>`, which appears when it is complete, and removes old ones.

    Args:
      folder: where the checkpoints of one piece of work are; made where it is missing.
      step: how far the work has come, not negative.
      state: a tree of arrays, random keys and numbers.
      keep: how many checkpoints are left: this one and the newest before it; 2, lest one be damaged. Later ones are
        removed, as the work has gone back behind them.

    Raises:
      ValueError: if `step` is no integer or negative, or `keep` is no positive integer.
      OSError: if it cannot be written; the checkpoints that were there are kept.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for step in range(3):
      ...         save_checkpoint(folder, step, {"w": np.full(2, step)})
      ...     restore_checkpoint(folder, like={"w": np.zeros(2, int)})
      (2, {'w': array([2, 2])})
    """
    _checks.check_positive_integer("keep", keep)
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, not {step!r}.")
    leaves = _describe(_named_leaves("state", state))
    folder = pathlib.Path(folder).absolute()
    path = folder / f"{step:08d}"
    with _files.replacing(path) as unfinished:
        for stale in folder.glob(_files.UNFINISHED.format("*")):  # what a killed process left
            _files.discard(stale)
        unfinished.mkdir()
        size = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(folder).free < size:  # orbax would find out in its threads, which then print a screenful
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _write_errors_as_os_errors(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(unfinished / "state", args=ocp.args.StandardSave(state))
        manifest = {"leaves": leaves, "sha256": _digests(unfinished)}
        _files.write(unfinished / _MANIFEST, json.dumps(manifest, indent=2).encode(), sync=True)
        if path.exists():
            _remove_checkpoint(path)
    _files.sync_folder(folder)
    others = [other for other in _checkpoints(folder) if other != path]
    later = [other for other in others if int(other.name) > step]  # damaged, or the work had gone on from there
    for other in later + others[len(later) + keep - 1 :]:
        _remove_checkpoint(other)


def restore_checkpoint(folder: str | os.PathLike, like: State) -> tuple[int, State] | None:
    """Reads the newest checkpoint that is whole. Of each damaged one, a warning names what is wrong with it.

    Args:
      folder: from `save_checkpoint`.
      like: a tree of the structure, shapes and dtypes of the one that was saved. The arrays are placed as these are.

    Returns:
      The step and the state, or None where there is no checkpoint.

    Raises:
      ValueError: if the newest whole checkpoint does not fit `like`: the first leaf that does not is named.

    Example:
      >>> restore_checkpoint("/nowhere", like=np.zeros(2)) is None
      True
    """
    for path in _checkpoints(pathlib.Path(folder).absolute()):
        try:
            manifest = _verified_manifest(path)
        except ValueError as error:
            warnings.warn(f"checkpoint {path} is not used: {error}", stacklevel=2)
            continue
        _check_fits(str(path), manifest["leaves"], _describe(_named_leaves("state", like)))
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return int(path.name), checkpointer.restore(path / "state", args=ocp.args.StandardRestore(like))
    return None


def _read(file: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{file} is no consolidation that save_consolidation wrote, or is damaged.")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}.") from error
    if metadata.get("sha256") != _digest(tensors, metadata):
        raise ValueError(f"{file} is damaged: its SHA-256 digest is not the one that was written with it.")
    return tensors, metadata


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps([said, _describe(tensors)], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _named_leaves(name: str, tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    named = {name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"two leaves of {name} have the same path: name its branches apart.")
    return named


def _describe(leaves: Mapping[str, Any]) -> dict[str, list]:
    """Of each leaf the shape and the dtype, as JSON has them."""
    return {
        name: [list(np.shape(leaf)), str(getattr(leaf, "dtype", type(leaf).__name__))] for name, leaf in leaves.items()
    }


def _check_fits(source: str, saved: Mapping[str, list], wanted: Mapping[str, list]) -> None:
    for name in [*wanted, *saved]:
        if name not in saved or name not in wanted:
            lacking = source if name not in saved else "like"
            raise ValueError(f"{source} and like must be trees of one structure, but {lacking} has no leaf {name}.")
        for what, ours, theirs in zip(("shape", "dtype"), saved[name], wanted[name], strict=True):
            if ours != theirs:
                raise ValueError(f"{name} has {what} {ours} in {source}, but {theirs} in like.")


def _place(name: str, tensor: np.ndarray, like: Any) -> jax.Array:
    placed = jax.device_put(tensor, getattr(like, "sharding", None))
    if placed.dtype != tensor.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}: set jax_enable_x64.")
    return placed


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: -int(path.name))


def _digests(folder: pathlib.Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / _MANIFEST:
            with path.open("rb") as opened:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def _verified_manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        written = manifest["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{_MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_MANIFEST} is damaged") from error
    found = _digests(path)
    for name in sorted({*written, *found}):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if written.get(name) != found[name]:
            raise ValueError(f"{name} is not what was written")
    return manifest


def _remove_checkpoint(path: pathlib.Path) -> None:
    (path / _MANIFEST).unlink(missing_ok=True)  # first: what is removed halfway is no checkpoint
    shutil.rmtree(path)


@contextlib.contextmanager
def _write_errors_as_os_errors() -> Iterator[None]:
    """Where a disk fills up, orbax's threads log a traceback each, and then it raises a ValueError."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
    finally:
        logger.setLevel(level)
