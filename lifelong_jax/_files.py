"""Files: written as a whole or not at all, and compared with the tree that they are read into."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from lifelong_jax._paths import listed

UNFINISHED = ".{}.writing"
"""The name of a file or folder that is not complete yet; `UNFINISHED.format("*")` matches all such names."""


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`. What the block writes there replaces `path` when the block ends.

    The temporary path differs between processes. If the block raises an error, `path` is left as it was.

    Raises:
      OSError: naming `path`, if it cannot be written.
    """
    unfinished = unfinished_path(path)
    with errors_of_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            os.replace(unfinished, path)
        finally:
            discard(unfinished)


def unfinished_path(path: pathlib.Path) -> pathlib.Path:
    """Returns the temporary path beside a path, which differs between processes."""
    return path.with_name(UNFINISHED.format(f"{path.name}.{os.getpid()}"))


@contextlib.contextmanager
def errors_of_writing(path: pathlib.Path) -> Iterator[None]:
    """Lets errors within the block name the path that cannot be written."""
    try:
        yield
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


def check_fits(
    source: str, saved: Mapping[str, list], wanted: Mapping[str, list], remedy: str = "", like: str = "like"
) -> None:
    """Raises ValueError, naming the first leaves that differ, unless two descriptions of leaves agree.

    The remedy, a sentence, is for leaves that one of them lacks, or that have another shape.
    """
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((wanted, saved), (saved, wanted)))
    lacking = [
        f"{tree} has no leaf {listed(names)}" for tree, names in ((source, missing), (like, unexpected)) if names
    ]
    if lacking:
        message = f"{source} and {like} must have the same structure, but {', and '.join(lacking)}."
        raise ValueError(f"{message} {remedy}".rstrip())
    for name, (shape, dtype) in wanted.items():
        if saved[name][0] != shape:
            raise ValueError(f"{name} has shape {saved[name][0]} in {source}, but {shape} in {like}. {remedy}".rstrip())
        if saved[name][1] != dtype:
            raise ValueError(f"{name} has dtype {saved[name][1]} in {source}, but {dtype} in {like}.")
