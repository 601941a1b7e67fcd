"""Files: written as a whole or not at all, and compared with the tree that they are read into."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

UNFINISHED = ".{}.writing"
"""The name of a file or folder that is not complete yet; `UNFINISHED.format("*")` matches all such names."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`. What the block writes there replaces `path` when the block ends.

    The temporary path differs between processes. If the block raises an error, `path` is left as it was.

    Raises:
      OSError: naming `path`, if it cannot be written.
    """
    unfinished = path.with_name(UNFINISHED.format(f"{path.name}.{os.getpid()}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            os.replace(unfinished, path)
        finally:
            discard(unfinished)
    except OSError as error:
        message = f"cannot be written ({error.strerror}); what was there before is kept"
        raise OSError(error.errno, message, str(path)) from error


@contextlib.contextmanager
def writing(path: pathlib.Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` when the block ends. With `sync`, it waits as `write` does."""
    with replacing(path) as unfinished, unfinished.open("wb") as opened:
        yield opened
        if sync:
            opened.flush()
            os.fsync(opened.fileno())
    if sync:
        sync_folder(path.parent)


def write(path: pathlib.Path, data: bytes, *, sync: bool = False) -> None:
    """Writes a file. With `sync`, it waits until the file would survive a power failure: about 10 milliseconds."""
    with writing(path, sync=sync) as opened:
        opened.write(data)


def sync_folder(path: pathlib.Path) -> None:
    """Waits until the names of the files in a folder would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: pathlib.Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a thread of orbax may still write to it after an error
    else:
        path.unlink(missing_ok=True)


def named_leaves(name: str, tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, as error messages write them."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"two leaves of {name} have the same path: rename one of them.")
    return named


def describe_leaves(leaves: Mapping[str, Any]) -> dict[str, list]:
    """Returns each leaf's shape and dtype, in a form that JSON keeps."""
    return {
        name: [list(np.shape(leaf)), str(getattr(leaf, "dtype", type(leaf).__name__))] for name, leaf in leaves.items()
    }


def check_fits(source: str, saved: Mapping[str, list], wanted: Mapping[str, list]) -> None:
    """Raises ValueError, naming the first leaf that differs, unless two descriptions of leaves agree."""
    for name in [*wanted, *saved]:
        if name not in saved or name not in wanted:
            without = source if name not in saved else "like"
            raise ValueError(f"{source} and like must have the same structure, but {without} has no leaf {name}.")
        for what, found, expected in zip(("shape", "dtype"), saved[name], wanted[name], strict=True):
            if found != expected:
                raise ValueError(f"{name} has {what} {found} in {source}, but {expected} in like.")
