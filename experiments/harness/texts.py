"""Texts that come with Python, and tokenizers: that of a published model, or the bytes of a text."""

import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Callable, Iterable, Sequence

import tokenizers

from lifelong_jax.datasets import Source, text_source

MODULES = ("argparse", "ast", "difflib", "doctest", "inspect", "pdb", "pickle", "statistics", "tarfile", "typing")
"""Of the standard library: their source code is a text."""


def prose() -> list[str]:
    """Reads Python's documentation of the language.

    Returns:
      Its paragraphs. Some stand in several chapters.

    Example:
      >>> len(prose()) > 1000
      True
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    return [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]


def code() -> list[str]:
    """Reads the source code of some of the standard library.

    Returns:
      Its pieces between empty lines.

    Example:
      >>> len(code()) > 1000
      True
    """
    sources = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    return [block for source in sources for block in source.split("\n\n")]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """How texts become tokens.

    Attributes:
      encode: `encode(text) -> tokens`.
      decode: `decode(tokens) -> text`, of any tokens.
      vocab_size: the number of tokens.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int


def _bytes_of(text: str) -> list[int]:
    return list(text.encode())


def _text_of(tokens: Sequence[int]) -> str:
    return bytes(map(int, tokens)).decode(errors="replace")


BYTES = Tokenizer(_bytes_of, _text_of, 256)
"""The tokens are the bytes of the text in UTF-8."""


def read_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer as Hugging Face stores it.

    Args:
      path: path of a file "tokenizer.json".

    Returns:
      The tokenizer. It adds no special tokens, and does not cut or pad.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not such a file.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer {file.absolute()}.")
    try:
        read = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # it raises no other kind
        raise ValueError(f"{file} is not a tokenizer.json of the package tokenizers: {error}.") from error
    read.no_truncation()
    read.no_padding()
    return Tokenizer(
        encode=lambda text: read.encode(text, add_special_tokens=False).ids,
        decode=lambda tokens: read.decode([int(token) for token in tokens], skip_special_tokens=False),
        vocab_size=read.get_vocab_size(),
    )


def open_texts(paths: Iterable[str | pathlib.Path], tokenizer: Tokenizer, length: int) -> Source:
    """Opens texts as examples of tokens.

    Args:
      paths: as for `text_source`.
      tokenizer: `BYTES`, which are read when they are needed, or one from `read_tokenizer`.
      length: as for `text_source`.

    Returns:
      As `text_source`.
    """
    return text_source(paths, None if tokenizer is BYTES else tokenizer.encode, length)
