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


def misfits(weights: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], network: str) -> dict[str, str]:
    """Says of each weight that is missing, of another shape, or unknown what is wrong with it."""
    wrong = {}
    for name, shape in shapes.items():
        if name not in weights:
            wrong[name] = f"{name} {shape} is missing"
        elif weights[name].shape != shape:
            wrong[name] = f"{name} has shape {weights[name].shape}, not {shape}"
    unknown = sorted(weights.keys() - shapes.keys())
    return wrong | {name: f"{name} is not a parameter of {network}" for name in unknown}


def check_fit(file: pathlib.Path, wrong: dict[str, str]) -> None:
    """Raises ValueError with all that is wrong with a file's weights."""
    if wrong:
        raise ValueError(f"{file} does not fit the network: {'; '.join(wrong.values())}.")
