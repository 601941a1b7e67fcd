"""Checkpoints of any state on disk: written whole or not at all, checked when they are read, never pickled.

A checkpoint is a folder that orbax writes, with a manifest of SHA-256 digests of its files, because orbax restores
flipped bits without an error.
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
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import jax

from lifelong_jax import _files
from lifelong_jax._processes import is_first, text_of_first, together

State = TypeVar("State")

_MANIFEST = "manifest.json"
_writing = threading.Lock()  # one checkpoint at a time: the logger's level is changed meanwhile


def save_checkpoint(folder: str | os.PathLike, step: int, state: Any) -> None:
    """Writes a checkpoint into `folder/<step>`, which appears when it is complete, and removes older ones.

    The newest one before it is kept too, in case this one is damaged. Later ones are removed: the sequence has gone
    back to an earlier checkpoint. Of several processes, all call it, with one folder; each writes its own shards.

    Args:
      folder: the folder of one sequence's checkpoints; it is made if it is missing.
      step: the number of the checkpoint, not negative: epochs, say.
      state: a tree of arrays, random keys and numbers.

    Raises:
      ValueError: if `step` is not an integer, or negative.
      OSError: if it cannot be written; the checkpoints that were there are kept.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for step in range(3):
      ...         save_checkpoint(folder, step, {"w": np.full(2, step)})
      ...     restore_checkpoint(folder, like={"w": np.zeros(2, int)})
      (2, {'w': array([2, 2])})
    """
    import orbax.checkpoint as ocp  # here, as it is slow to import

    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, not {step!r}.")
    leaves = _files.describe_leaves(_files.named_leaves("state", state))
    folder = pathlib.Path(folder).absolute()
    path = folder / f"{step:08d}"
    several, failure = jax.process_count() > 1, f"{path} is not written"
    with together(failure, several), contextlib.ExitStack() as stack:
        unfinished = path
        with together(failure, several):
            if is_first():
                unfinished = stack.enter_context(_files.replacing(path))
                _begin(unfinished, sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(state)))
        if several:
            unfinished = folder / text_of_first(unfinished.name)
        with _writing, _write_errors_as_os_errors(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(unfinished / "state", args=ocp.args.StandardSave(state))
        if is_first():
            manifest = {"leaves": leaves, "sha256": _digests(unfinished)}
            _files.write(unfinished / _MANIFEST, json.dumps(manifest, indent=2).encode(), sync=True)
            if path.exists():
                _remove_checkpoint(path)
    if is_first():
        _files.sync_folder(folder)
        others = [other for other in _checkpoints(folder) if other != path]
        # Later ones are damaged, or from before the sequence went back to an earlier checkpoint.
        later = [other for other in others if int(other.name) > step]
        for other in later + others[len(later) + 1 :]:
            _remove_checkpoint(other)


def _begin(unfinished: pathlib.Path, size: int) -> None:
    """Makes the folder of a checkpoint that is not complete yet, if the disk has room for it."""
    for stale in unfinished.parent.glob(_files.UNFINISHED.format("*")):  # left by a killed process
        _files.discard(stale)
    unfinished.mkdir()
    if shutil.disk_usage(unfinished).free < size:  # in orbax, each thread would print a traceback
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def restore_checkpoint(folder: str | os.PathLike, like: State) -> tuple[int, State] | None:
    """Reads the newest checkpoint that is whole. A warning says what is wrong with each damaged one.

    The state may have been on another mesh, of another number of devices or of processes.

    Args:
      folder: from `save_checkpoint`.
      like: a tree of the structure, shapes and dtypes of the one that was saved. The arrays are placed as these are.

    Returns:
      The step and the state, or None where there is no checkpoint.

    Raises:
      ValueError: if the newest whole checkpoint does not fit `like`: the first leaf that does not is named.

    Example:
      >>> restore_checkpoint("/nowhere", like=0.0) is None
      True
    """
    import orbax.checkpoint as ocp

    several, folder = jax.process_count() > 1, pathlib.Path(folder).absolute()
    with together(f"{folder} is not read", several):
        name = _newest_whole(folder) if is_first() else ""
    path = folder / (text_of_first(name) if several else name)
    if path == folder:
        return None
    leaves = _read_manifest(path)["leaves"]
    _files.check_fits(str(path), leaves, _files.describe_leaves(_files.named_leaves("state", like)))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        return int(path.name), checkpointer.restore(path / "state", args=ocp.args.StandardRestore(like))


def _newest_whole(folder: pathlib.Path) -> str:
    """Returns the name of the newest checkpoint that is whole, or an empty one. It warns of those that are not."""
    for path in _checkpoints(folder):
        try:
            _verify(path)
        except ValueError as error:
            warnings.warn(f"checkpoint {path} is not used: {error}", stacklevel=3)
        else:
            return path.name
    return ""


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


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        manifest = {name: dict(manifest[name]) for name in ("sha256", "leaves")}
        if not all(isinstance(leaf, list) and len(leaf) == 2 for leaf in manifest["leaves"].values()):
            raise ValueError("a leaf has no shape and dtype")
    except FileNotFoundError as error:
        raise ValueError(f"{_MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_MANIFEST} is damaged") from error
    return manifest


def _verify(path: pathlib.Path) -> None:
    written, found = _read_manifest(path)["sha256"], _digests(path)
    for name in sorted({*written, *found}):
        if name not in found:
            raise ValueError(f"{name} is missing")
        if written.get(name) != found[name]:
            raise ValueError(f"{name} is not what was written")


def _remove_checkpoint(path: pathlib.Path) -> None:
    (path / _MANIFEST).unlink(missing_ok=True)  # first: without it, a half-removed checkpoint is not used
    shutil.rmtree(path)


@contextlib.contextmanager
def _write_errors_as_os_errors() -> Iterator[None]:
    """If the disk is full, each of orbax's threads logs a traceback, and orbax then raises a ValueError."""
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
