"""Image files: the pixels that a viewer shows; sizes and colours."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lifelong_jax.datasets.images import UnreadableImageError, fit_image, image_endings, read_image
from tests.pictures import break_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_images_are_resized_with_antialiasing_and_change_colours():
    stripes = np.tile(np.array([[0], [0], [0], [240]], np.uint8), (4, 16))[..., None]
    # Every fourth row alone would be 0 or 240.
    np.testing.assert_allclose(fit_image(stripes, 4, None)[1:-1], 60, atol=12)
    wide = np.repeat(stripes, 3, axis=1)
    assert fit_image(wide, 16, 3).shape == (16, 16, 3)
    assert fit_image(wide, None, None) is wide
    assert fit_image(wide, None, 3).shape == (16, 48, 3)
    colour = np.zeros((2, 2, 3), np.uint8) + np.array([255, 0, 100], np.uint8)
    np.testing.assert_array_equal(fit_image(colour, None, 1), round(0.299 * 255 + 0.114 * 100))
    np.testing.assert_array_equal(fit_image(colour, 5, None), np.broadcast_to(colour[:1, :1], (5, 5, 3)))
    with pytest.raises(ValueError, match="only images of 1, 3 or 4 channels can be resized or converted, not 2"):
        fit_image(colour[..., :2], 4, None)


def test_images_of_four_channels_are_put_on_white_before_they_are_converted():
    black = np.zeros((2, 2, 4), np.uint8)
    black[0, 0, 3], black[0, 1, 3] = 255, 51
    np.testing.assert_array_equal(fit_image(black, None, 3)[..., 0], [[0, 204], [255, 255]])
    np.testing.assert_array_equal(fit_image(black, None, 1)[..., 0], [[0, 204], [255, 255]])
    assert fit_image(black, 4, None).shape == (4, 4, 4)


@pytest.fixture
def save(tmp_path):
    def save(picture, ending, **options):
        file = tmp_path / f"image{ending}"
        picture.save(file, **options)
        return file

    return save


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif"])
def test_images_are_turned_as_their_orientation_says(save, ending):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right: what is on the left goes to the top
    read = read_image(save(Image.fromarray(pixels), ending, exif=exif, **({"lossless": True} if "w" in ending else {})))
    assert read.shape == (32, 16, 3)
    np.testing.assert_allclose(read[4, 8], RED, atol=6)
    np.testing.assert_allclose(read[28, 8], 0, atol=6)


def test_images_with_damaged_exif_data_are_read_as_they_are_stored(save):
    file = save(Image.new("RGB", (4, 2), RED), ".png", exif=b"Exif\0\0no TIFF")
    np.testing.assert_array_equal(read_image(file), np.broadcast_to(RED, (2, 4, 3)))


def test_what_is_transparent_is_put_on_white(save):
    ink = Image.new("RGBA", (3, 1), (*BLUE, 0))
    ink.putpixel((1, 0), (*BLUE, 255))
    ink.putpixel((2, 0), (*BLUE, 51))
    expected = [WHITE, BLUE, (204, 204, 255)]
    for ending in (".png", ".tif"):
        assert read_image(save(ink, ending))[0].tolist() == [list(colour) for colour in expected]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([*BLUE, *RED])
    for ending in (".png", ".gif"):
        assert read_image(save(palette, ending, transparency=0))[0].tolist() == [list(WHITE), list(RED)]
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (100, 255))
    assert read_image(save(grey, ".png"))[0, :, 0].tolist() == [255, 100]
    key = Image.fromarray(np.array([[0, 90]], np.uint8), "L")
    assert read_image(save(key, ".png", transparency=0))[0, :, 0].tolist() == [255, 90]


def png_of_16_bits(color_type, samples):
    """A PNG file, which Pillow does not write of 16 bits but in grey."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bits_become_8(save, tmp_path):
    ramp = np.array([[0, 257, 25_700, 65_535]], np.uint16)
    for ending in (".png", ".tif", ".pgm"):
        assert read_image(save(Image.fromarray(ramp), ending))[0, :, 1].tolist() == [0, 1, 100, 255], ending
    with_opacity = np.stack([ramp, ramp, ramp, np.full_like(ramp, 65_535)], axis=-1)
    for color_type, samples in ((2, with_opacity[..., :3]), (4, with_opacity[..., 2:]), (6, with_opacity)):
        file = tmp_path / "deep.png"
        file.write_bytes(png_of_16_bits(color_type, samples))
        assert read_image(file)[0, :, 1].tolist() == [0, 1, 100, 255], color_type


def test_other_kinds_of_pixels_become_red_green_and_blue(save):
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for ending in (".jpg", ".tif"):
        np.testing.assert_allclose(read_image(save(ink, ending))[4, 4], RED, atol=4)
    bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    for ending in (".png", ".bmp", ".tif", ".pbm"):
        assert read_image(save(bits, ending)).tolist() == [[[0, 0, 0], list(WHITE)]]


def test_the_first_of_several_frames_is_read(save):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for ending in (".gif", ".tif", ".webp", ".png"):
        file = save(frames[0], ending, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(read_image(file)[4, 4], RED, atol=4)


def test_images_that_cannot_be_read_are_named(tmp_path, save):
    broken = tmp_path / "broken.png"
    break_image(broken)
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    for file, reason in (
        (broken, "truncated"),
        (pipe, "it is not a regular file"),
        (save(Image.new("F", (2, 2)), ".tif"), "its pixels are 32-bit numbers"),
        (tmp_path / "nowhere.png", "No such file"),
    ):
        with pytest.raises(
            UnreadableImageError, match=f"cannot read the image {re.escape(str(file))}: .*{reason}"
        ) as e:
            read_image(file)
        assert e.value.path == file


def test_what_pillow_leaves_to_other_software_is_no_image():
    endings = image_endings()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2"} <= endings
    assert not {".txt", ".pdf", ".h5", ".mpg", ".eps"} & endings
