"""Image files: reads, resizes and converts images with Pillow, and lists the images of a folder."""

import pathlib
from typing import NamedTuple

import numpy as np

from lifelong_jax._extras import needs_extra

with needs_extra("data"):
    from PIL import Image

_ENDINGS = (".jpg", ".jpeg", ".png")
_READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class LabelledFiles(NamedTuple):
    """Image files and their classes.

    Attributes:
      paths: `[num_files]`.
      labels: `[num_files]`, the number of each file's class, from 0; classes are numbered in alphabetical order.
    """

    paths: list[pathlib.Path]
    labels: list[int]


def fit_image(image: np.ndarray, image_size: int | None, channels: int | None) -> np.ndarray:
    """Resizes one image and converts it to grey or colour.

    The whole image is resized, whatever its shape, by bilinear interpolation with antialiasing. A colour image becomes
    grey by the luma of ITU-R 601. A grey image becomes a colour image of three equal channels. Transparency is dropped.

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
        picture = picture.convert("L" if channels == 1 else "RGB")
    array = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    if array.ndim == 2:
        array = array[..., None]
    return np.repeat(array, 3, axis=-1) if grey and channels == 3 else array


def read_image(path: pathlib.Path) -> np.ndarray:
    """Reads an image file in colour.

    Args:
      path: a file in any format that Pillow can read, with 8 bits per channel.

    Returns:
      `[height, width, 3]`, unsigned bytes.

    Raises:
      ValueError: naming the file, if it is damaged, not an image, not a regular file, or has more than 8 bits per
        channel.
    """
    try:
        if path.exists() and not path.is_file():  # to open a named pipe would wait for ever
            raise ValueError("it is not a regular file")
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # Pillow would clip the values at 255
                raise ValueError("it has more than 8 bits per channel")
            return np.asarray(picture.convert("RGB"))
    except _READING_ERRORS as error:
        raise ValueError(f"cannot read the image {path}: {error}. Repair or remove the file.") from error


def list_folder(root: pathlib.Path) -> tuple[LabelledFiles, LabelledFiles, list[str]]:
    """Lists the images of a folder in the layout of TFDS's ImageFolder: `root/split/class/*.jpg`, or jpeg or png.

    Args:
      root: the folder, with subfolders "train" and "test". Names that begin with a dot are ignored.

    Returns:
      The training files, the test files, and the names of the classes in alphabetical order.

    Raises:
      FileNotFoundError: if the folder, or the subfolder of a split, does not exist.
      ValueError: if a class has no images, or the splits have different classes.
    """
    splits = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"no folder {(root / split).absolute()}: images must be in {root}/train/<class>/ and "
                f"{root}/test/<class>/."
            )
        splits[split] = {
            folder.name: [file for file in _visible(folder) if file.suffix.lower() in _ENDINGS]
            for folder in _visible(root / split)
            if folder.is_dir()
        }
        for name, files in splits[split].items():
            if not files:
                raise ValueError(
                    f"the folder of the class {root / split / name} has no images (files {', '.join(_ENDINGS)})."
                )
    names = _common_classes(f"{root}/train", splits["train"], f"{root}/test", splits["test"])
    train, test = (
        LabelledFiles(
            [file for name in names for file in split[name]],
            [label for label, name in enumerate(names) for _ in split[name]],
        )
        for split in splits.values()
    )
    return train, test, names


def list_mit_scenes(root: pathlib.Path) -> tuple[LabelledFiles, LabelledFiles, list[str]]:
    """Lists the images of MIT Indoor Scenes in the layout in which its authors publish it.

    The images are in `root/Images/<class>/*.jpg`. The lists `root/TrainImages.txt` and `root/TestImages.txt` select 80
    and 20 images of each of the 67 classes. Each line of a list is `<class>/<file>`.

    Args:
      root: the folder.

    Returns:
      The training files, the test files, and the names of the classes in alphabetical order.

    Raises:
      FileNotFoundError: if a list, or an image on it, does not exist.
      ValueError: if a list is empty or has a line of another form, or if the lists have different classes.

    Quattoni and Torralba 2009, "Recognizing indoor scenes", CVPR, https://web.mit.edu/torralba/www/indoor.html
    """
    splits = []
    for file in (root / "TrainImages.txt", root / "TestImages.txt"):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file.absolute()}: MIT Indoor Scenes needs its lists beside Images/.")
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        for line in lines:
            if line.count("/") != 1:
                raise ValueError(f"{file} has the line {line!r}, but each line must be <class>/<file>.")
        missing = [line for line in lines if not (root / "Images" / line).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(lines)} images listed in {file} are missing in {root / 'Images'}; the "
                f"first is {missing[0]}."
            )
        splits.append(lines)
    train_classes, test_classes = ({line.split("/")[0] for line in lines} for lines in splits)
    names = _common_classes(f"{root}/TrainImages.txt", train_classes, f"{root}/TestImages.txt", test_classes)
    train, test = (
        LabelledFiles([root / "Images" / line for line in lines], [names.index(line.split("/")[0]) for line in lines])
        for lines in splits
    )
    return train, test, names


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _common_classes(train_name: str, train: dict | set, test_name: str, test: dict | set) -> list[str]:
    if not train:
        raise ValueError(f"{train_name} has no classes.")
    for name, classes, others in ((train_name, train, test), (test_name, test, train)):
        missing = sorted(set(others) - set(classes))
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{name} is missing {len(missing)} classes of the other split: {shown}.")
    return sorted(train)
