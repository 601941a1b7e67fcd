"""The user's cache folder: what was decoded, until its files or the way of decoding change."""

import hashlib
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lifelong_jax import _files
from lifelong_jax._extras import needs_extra

with needs_extra("data"):
    import PIL
    import platformdirs

_DECODING = 2  # to be increased whenever decoding, resizing, listing or splitting changes


def cache_file(prefix: str, settings: Sequence[Any], files: Sequence[pathlib.Path]) -> pathlib.Path:
    """Returns where something decoded is kept.

    Args:
      prefix: the beginning of the file's name.
      settings: what the result depends on besides the files.
      files: the files that it is decoded from. Its name depends on their sizes and times, and on Pillow's version: when
        one of them changes, it is decoded again.

    Returns:
      The path of a file, which may not exist.
    """
    stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((_DECODING, PIL.__version__, *settings, stats)).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("lifelong_jax") / f"{prefix}-{digest}.npz"


def read_cache(file: pathlib.Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Reads arrays, checked by their CRC.

    Args:
      file: from `cache_file`.
      names: the names of the arrays.

    Returns:
      The arrays; None if there is no file; None, with a warning, if it is damaged.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as cached:
            return {name: cached[name] for name in names}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can raise any
        warnings.warn(f"{file} is damaged or cannot be read, and is decoded again: {error}", stacklevel=3)
        return None


def write_cache(file: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays; warns if they cannot be written.

    Args:
      file: from `cache_file`.
      arrays: the arrays by their names.
    """
    try:
        with _files.writing(file, sync=True) as opened:
            np.savez(opened, **arrays)
    except OSError as error:
        warnings.warn(f"what was decoded is not kept for the next time: {error}", stacklevel=3)
