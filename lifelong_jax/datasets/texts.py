"""Texts as examples of next-token prediction, from files that may be larger than memory."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from lifelong_jax._checks import check_positive_integer
from lifelong_jax.datasets.folders import files_below, name_some
from lifelong_jax.datasets.sources import Source
from lifelong_jax.types import Batch

_CHUNK = 2**20  # characters


class _Tokens(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _BytesOfFile:
    """The bytes of a file, read when they are indexed."""

    file: pathlib.Path
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: slice) -> np.ndarray:
        with self.file.open("rb") as opened:
            opened.seek(places.start)
            return np.frombuffer(opened.read(places.stop - places.start), np.uint8)


@dataclasses.dataclass(frozen=True)
class _TextSource:
    """Windows of texts; `ends` has the number of windows up to the end of each text."""

    texts: Sequence[_Tokens]
    length: int
    ends: np.ndarray

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.ends, index, side="right"))
        first = (index - (self.ends[number - 1] if number else 0)) * self.length
        return next_token_example(self.texts[number][first : first + self.length + 1], self.length)


def text_source(
    paths: Iterable[str | os.PathLike], encode: Callable[[str], Sequence[int]] | None, length: int
) -> Source:
    """Opens text files as examples whose labels are the next tokens, to be read by `streaming`.

        inputs = t[k · length : (k + 1) · length],    labels = t[k · length + 1 : (k + 1) · length + 1]

    A file's examples are consecutive: each of its tokens but the first is a label once. The last example of a file is
    padded. Bytes are read from the file when an example is indexed, so files may be larger than memory. If there is a
    tokenizer, each file is encoded when the source is opened, and its tokens are held in memory: 4 bytes each, which is
    about the size of the text.

    Args:
      paths: files and folders. A folder stands for all files in it, at any depth, but for hidden ones.
      encode: `encode(text) -> tokens`, a tokenizer, such as `lambda text: tokenizer.encode(text).ids` of Hugging Face's
        package `tokenizers`. None for the bytes of the text in UTF-8, which are tokens from 0 to 255.
      length: the tokens of an example.

    Returns:
      A source, whose examples are those of `next_token_example`. `datasets.sources.Subset` takes a part of it.

    Raises:
      FileNotFoundError: if a path does not exist.
      ValueError: if a file is not text in UTF-8, if there are no files, or if no file has two tokens. Files of folders
        that are not text are left out, with a warning that names some.

    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp(), "sea.txt")
      >>> file.write_text("The sea.")
      8
      >>> source = text_source([file], None, length=4)
      >>> len(source)
      2
      >>> bytes(source[1].inputs.astype("uint8")), bytes(source[1].labels.astype("uint8")), source[1].label_weights
      (b'sea.', b'ea.\\x00', array([1., 1., 1., 0.], dtype=float32))
    """
    check_positive_integer("length", length)
    texts = [text for file in _text_files(paths) if len(text := _open(file, encode)) > 1]
    if not texts:
        raise ValueError("no file of paths has two tokens, of which one could be predicted from the other.")
    return _TextSource(texts, length, np.cumsum([-(-(len(text) - 1) // length) for text in texts]))


def next_token_example(tokens: Any, length: int) -> Batch:
    """Makes the example of some tokens: at each position the input is a token, and the label is the next one.

    Args:
      tokens: `[2 to length + 1]`, integers.
      length: the length of the example. Where tokens are missing, it is padded by 0, of weight 0.

    Returns:
      A `Batch` of NumPy arrays, without the example axis: inputs and labels `[length]`, int32, and label weights
      `[length]`, float32.

    Raises:
      ValueError: if there are more tokens.

    Example:
      >>> example = next_token_example([7, 8, 9], length=3)
      >>> example.inputs, example.labels, example.label_weights
      (array([7, 8, 9], dtype=int32), array([8, 9, 0], dtype=int32), array([1., 1., 0.], dtype=float32))
    """
    if len(tokens) > length + 1:
        raise ValueError(f"tokens must be at most length + 1, {length + 1}, not {len(tokens)}: cut the text.")
    padded = np.zeros(length + 1, np.int32)
    padded[: len(tokens)] = tokens
    label_weights: Any = (np.arange(length) < len(tokens) - 1).astype(np.float32)
    inputs: Any = padded[:-1]
    labels: Any = padded[1:]
    return Batch(inputs, labels, label_weights=label_weights)


def _text_files(paths: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    """Lists the files that are text; refuses what is named and is none."""
    found = []
    for path in (pathlib.Path(path).expanduser() for path in paths):
        if path.is_dir():
            files = [file for file in files_below(path) if not _is_hidden(file.relative_to(path))]
            texts = [file for file in files if _is_text(file)]
            if not texts:
                raise ValueError(f"{path} has no text files in UTF-8, hidden ones aside.")
            if len(texts) < len(files):
                others = [str(file) for file in files if file not in set(texts)]
                warnings.warn(
                    f"{len(others)} of {len(files)} files in {path} are left out, because they are not text in UTF-8: "
                    f"{name_some(others, ', ')}.",
                    stacklevel=3,
                )
            found += texts
        elif not path.exists():
            raise FileNotFoundError(f"no text file or folder {path.absolute()}.")
        elif not _is_text(path):
            raise ValueError(f"{path} is not text in UTF-8: convert it, or leave it out.")
        else:
            found.append(path)
    if not found:
        raise ValueError("paths is empty: name text files or folders.")
    return found


def _is_hidden(path: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(file: pathlib.Path) -> bool:
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            while opened.read(_CHUNK):
                pass
    except UnicodeDecodeError:
        return False
    return True


def _open(file: pathlib.Path, encode: Callable[[str], Sequence[int]] | None) -> _Tokens:
    if encode is None:
        return _BytesOfFile(file, file.stat().st_size)
    return np.asarray(encode(file.read_bytes().decode()), np.int32)
