"""Reads files of pretrained weights."""

import pathlib

import numpy as np

from lifelong_jax._extras import needs_extra

with needs_extra("models"):
    import safetensors
    import safetensors.numpy


def read_weights(path: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """Reads a safetensors file; an error names it."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of pretrained weights {file.absolute()}.")
    try:
        return file, safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}.") from error
