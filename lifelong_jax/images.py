"""Images from files and folders, by Pillow: reading, resizing, grey and colour, and how folders are laid out."""

import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

_ENDINGS = (".jpg", ".jpeg", ".png")
_READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class LabelledFiles(NamedTuple):
    """Image files and what they show.

    Attributes:
      paths: a path for each file.
      labels: a class for each file, a number from 0; classes are numbered in the order of their names.
    """

    paths: list[pathlib.Path]
    labels: list[int]


def fit_image(image: np.ndarray, image_size: int | None, channels: int | None) -> np.ndarray:
    """Brings one image to a size and a number of channels.

    The whole image is resized, whatever its shape was, bilinearly and, where it shrinks, with antialiasing. Grey is the
    luma of ITU-R 601; colour of a grey image is three equal channels; transparency is dropped.

    Args:
      image: `[height, width, channels]`, unsigned bytes; or `[height, width, 1]`, float32.
      image_size: height and width of the result in pixels, or None to leave them as they are.
      channels: 1 for grey, 3 for red, green and blue, or None to leave them as they are.

    Returns:
      `[height, width, channels]`, in the dtype of `image`.

    Raises:
      ValueError: if a change is asked for to an image that is neither grey nor colour.

    Example:
      >>> fit_image(np.full((4, 6, 1), 7, np.uint8), image_size=2, channels=3).shape
      (2, 2, 3)
    """
    size = image.shape[:2] if image_size is None else (image_size, image_size)
    if image.shape == (*size, channels or image.shape[-1]):
        return image
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image of {image.shape[-1]} channels has no other size or colours: 1, 3 or 4 are known.")
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
      path: a file of any format of 8 bits per channel that Pillow reads.

    Returns:
      `[height, width, 3]`, unsigned bytes.

    Raises:
      ValueError: naming the file, if it is broken, no image, or of more than 8 bits per channel.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # Pillow would cut the values off at 255
                raise ValueError("it has more than 8 bits per channel")
            return np.asarray(picture.convert("RGB"))
    except _READING_ERRORS as error:
        raise ValueError(f"cannot read the image {path}: {error}. Mend it, or take it out.") from error


def list_folder(root: pathlib.Path) -> tuple[LabelledFiles, LabelledFiles, list[str]]:
    """Lists the images of a folder in the layout of TFDS's ImageFolder: `root/split/class/*.jpg`, jpeg or png.

    Args:
      root: the folder; its splits are "train" and "test". Names that begin with a dot are passed over.

    Returns:
      The files for training, those for testing, and the classes' names in alphabetical order.

    Raises:
      FileNotFoundError: if there is no such folder, or none for a split.
      ValueError: if a class has no images, or the splits' classes differ.
    """
    splits = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"no folder {(root / split).absolute()}: images are looked for in {root}/train/<class>/ and "
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
                    f"the class folder {root / split / name} has no images: files that end in {', '.join(_ENDINGS)}."
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
    """Lists the images of MIT Indoor Scenes as its authors publish it.

    `root/Images/<class>/*.jpg` is what their archive holds; `root/TrainImages.txt` and `root/TestImages.txt` are their
    split of a part of it, 80 and 20 images of each of the 67 classes, a line for each image: `<class>/<file>`.

    Args:
      root: the folder.

    Returns:
      The files for training, those for testing, and the classes' names in alphabetical order.

    Raises:
      FileNotFoundError: if a list, or an image that it names, is not there.
      ValueError: if a list has a line of another form, or none, or the lists' classes differ.

    Quattoni and Torralba 2009, "Recognizing indoor scenes", CVPR, https://web.mit.edu/torralba/www/indoor.html
    """
    splits = []
    for file in (root / "TrainImages.txt", root / "TestImages.txt"):
        if not file.is_file():
            raise FileNotFoundError(f"no file {file.absolute()}: MIT Indoor Scenes has its lists beside Images/.")
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        for line in lines:
            if line.count("/") != 1:
                raise ValueError(f"{file} has the line {line!r}, but each line must be <class>/<file>.")
        missing = [line for line in lines if not (root / "Images" / line).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(lines)} images that {file} lists are not in {root / 'Images'}, the first "
                f"of them {missing[0]}."
            )
        splits.append(lines)
    train, test = ({line.split("/")[0] for line in lines} for lines in splits)
    names = _common_classes(f"{root}/TrainImages.txt", train, f"{root}/TestImages.txt", test)
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
        lacking = sorted(set(others) - set(classes))
        if lacking:
            raise ValueError(f"{name} lacks {len(lacking)} classes that the other split has: {', '.join(lacking[:5])}.")
    return sorted(train)
