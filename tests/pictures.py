"""Image files for tests."""

import numpy as np
from PIL import Image


def write_image(path, shape, value, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*shape, 3), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)


def break_image(path):
    """Leaves the first half of a file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:200])
