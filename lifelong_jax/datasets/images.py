"""Image files: reads them as a viewer shows them, resizes and converts them, with Pillow."""

import contextlib
import pathlib

import numpy as np

from lifelong_jax._extras import needs_extra

with needs_extra("data"):
    from PIL import Image, ImageOps

_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow names them, but leaves them to other software


class UnreadableImageError(ValueError):
    """A file that cannot be read as an image.

    Attributes:
      path: the file.
    """

    def __init__(self, path: pathlib.Path, reason: object) -> None:
        """Makes the message."""
        super().__init__(f"cannot read the image {path}: {reason}")
        self.path = path


def image_endings() -> set[str]:
    """Returns the endings of the formats that Pillow reads, in lower case: ".jpg", ".png", ".webp" and so on."""
    return {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_DECODED
    }


def fit_image(image: np.ndarray, image_size: int | None, channels: int | None) -> np.ndarray:
    """Resizes one image and converts it to grey or colour.

    The whole image is resized, whatever its shape, by bilinear interpolation with antialiasing. A colour image becomes
    grey by the luma of ITU-R 601. A grey image becomes a colour image of three equal channels. An image of 4 channels,
    the last of which is its opacity, is put on white before it is converted.

    Args:
      image: `[height, width, channels]`, unsigned bytes, or `[height, width, 1]`, float32.
      image_size: height and width of the result in pixels, or None to keep them.
      channels: 1 for grey, 3 for red, green and blue, or None to keep them.

    Returns:
      `[height, width, channels]`, in the dtype of `image`.

    Raises:
      ValueError: if the image has to be changed, but does not have 1, 3 or 4 channels.

    Example:
      >>> fit_image(np.full((4, 6, 1), 7, np.uint8), image_size=2, channels=3).shape
      (2, 2, 3)
    """
    size = image.shape[:2] if image_size is None else (image_size, image_size)
    if image.shape == (*size, channels or image.shape[-1]):
        return image
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"only images of 1, 3 or 4 channels can be resized or converted, not {image.shape[-1]}.")
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    if channels is not None and not grey:
        picture = _on_white(picture).convert("L" if channels == 1 else "RGB")
    array = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    if array.ndim == 2:
        array = array[..., None]
    return np.repeat(array, 3, axis=-1) if grey and channels == 3 else array


def read_image(path: pathlib.Path) -> np.ndarray:
    """Reads an image file in colour: the pixels that a viewer shows.

    The image is turned as its EXIF orientation says. What is transparent is put on white. Palettes, CMYK, grey and
    black-and-white become red, green and blue. 16 bits per channel become 8. Of several frames, the first is read.
    Colour profiles are not applied.

    Args:
      path: a file in any format that Pillow reads.

    Returns:
      `[height, width, 3]`, unsigned bytes.

    Raises:
      UnreadableImageError: naming the file, if it is damaged, not an image, not a regular file, or if its pixels are
        32-bit numbers.
    """
    try:
        if path.exists() and not path.is_file():  # to open a named pipe would wait for ever
            raise ValueError("it is not a regular file")
        with Image.open(path) as picture:
            _turn_upright(picture)
            return np.asarray(_on_white(_eight_bits(picture)).convert("RGB"))
    except Exception as error:  # a damaged file can raise any
        raise UnreadableImageError(path, error) from error


def _turn_upright(picture: Image.Image) -> None:
    picture.load()  # here, so that an error below is one of its EXIF data alone
    with contextlib.suppress(Exception):  # damaged EXIF data can raise any; viewers then show the image as it is stored
        ImageOps.exif_transpose(picture, in_place=True)


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return picture.point(lambda value: value / 257).convert("L")  # without it, Pillow clips the values at 255
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, which have no known white")
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
