"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

UNFINISHED = ".{}.writing"


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path beside `path` to write a file or a folder to; once that is complete, it takes the place.

    Raises:
      OSError: naming `path`, where it cannot be written.
    """
    unfinished = path.with_name(UNFINISHED.format(path.name))
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


def write(path: pathlib.Path, data: bytes, *, sync: bool = False) -> None:
    """Writes a file; with `sync`, so that it would survive a power failure, which takes some 10 milliseconds."""
    with replacing(path) as unfinished, unfinished.open("wb") as opened:
        opened.write(data)
        if sync:
            opened.flush()
            os.fsync(opened.fileno())
    if sync:
        sync_folder(path.parent)


def sync_folder(path: pathlib.Path) -> None:
    """Lets the names of a folder's files survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: pathlib.Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # a thread of orbax may still write to it after an error
    else:
        path.unlink(missing_ok=True)
