"""The letters A to Z, rendered from matplotlib's fonts: a data set without a download."""

import pathlib

import numpy as np

from lifelong_jax._extras import needs_extra

with needs_extra("data"):
    from PIL import Image, ImageFont

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DEJAVU = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif")
_TRAIN_FONTS = (
    *(f"{family}{style}" for family in _DEJAVU for style in ("", "-Bold")),
    *(f"{family}{style}" for family in _DEJAVU[:2] for style in ("-Oblique", "-BoldOblique")),
    *(f"{_DEJAVU[2]}{style}" for style in ("-Italic", "-BoldItalic")),
    *("cmr10", "cmb10", "cmti10", "cmmi10"),
)
_TEST_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmss10", "cmtt10")
_COPIES = 8


def render_letters(
    image_size: int | None = None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Renders the letters, light on dark like the bundled digits. Every call returns the same images.

    Each letter of each font is drawn eight times, at a random size (75 to 100 % of the image), rotation (up to 10
    degrees) and position (up to 6 % from the centre). Another image size shows the same drawings.

    Training and test images have different typefaces, so that the test accuracy measures how well a network reads
    letters in typefaces that it has not seen. Training images are in DejaVu Sans, Sans Mono and Serif, and Computer
    Modern Roman (16 fonts, 3,328 images). Test images are in STIX, Computer Modern Sans and Computer Modern Typewriter
    (6 fonts, 1,248 images). All letters are capitals, because a third of the small letters differ from their capitals
    only in size.

    Args:
      image_size: height and width in pixels; 8 by default, at which people can still read each letter.

    Returns:
      `(train_images, train_labels), (test_images, test_labels)`, with images `[num_examples, image_size, image_size,
      1]`, unsigned bytes, and labels `[num_examples]`.

    Example:
      >>> (train_images, train_labels), _ = render_letters()
      >>> train_images.shape
      (3328, 8, 8, 1)
    """
    size = 8 if image_size is None else image_size
    return _render(_TRAIN_FONTS, size, np.random.default_rng(0)), _render(_TEST_FONTS, size, np.random.default_rng(1))


def _render(fonts: tuple[str, ...], image_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    with needs_extra("data"):
        import matplotlib  # here, as it is slow to import

    canvas_size = max(64, 2 * image_size)
    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    images, labels = [], []
    for name in fonts:
        font = ImageFont.truetype(folder / f"{name}.ttf", canvas_size)
        for label, letter in enumerate(_LETTERS):
            mask = font.getmask(letter)
            outline = Image.frombytes("L", mask.size, bytes(mask))
            outline = outline.crop(outline.getbbox())
            for _ in range(_COPIES):
                images.append(_draw(outline, canvas_size, image_size, rng))
                labels.append(label)
    return np.stack(images)[..., None], np.array(labels)


def _draw(outline: Image.Image, canvas_size: int, image_size: int, rng: np.random.Generator) -> np.ndarray:
    scale = canvas_size * rng.uniform(0.75, 1) / max(outline.size)
    angle = rng.uniform(-10, 10)
    shift = canvas_size * rng.uniform(-0.06, 0.06, size=2)
    letter = outline.resize([max(1, round(scale * side)) for side in outline.size], Image.Resampling.BILINEAR)
    canvas = Image.new("L", (canvas_size, canvas_size))
    left, top = (round((canvas_size - side) / 2 + s) for side, s in zip(letter.size, shift, strict=True))
    canvas.paste(letter, (left, top))
    canvas = canvas.rotate(angle, Image.Resampling.BILINEAR)
    image = np.asarray(canvas.resize((image_size, image_size), Image.Resampling.BILINEAR), np.float32)
    return np.round(image * (255 / image.max())).astype(np.uint8)  # thin strokes are as bright as thick ones
