"""Folders of images: lists the files of each class, and finds those that cannot be read."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from lifelong_jax._extras import needs_extra
from lifelong_jax.datasets.images import UnreadableImageError, image_endings, read_image

with needs_extra("data"):
    import tqdm

_MOST_NAMES = 10  # in a message


class LabelledFiles(NamedTuple):
    """Image files and their classes.

    Attributes:
      paths: `[num_files]`.
      labels: `[num_files]`, the number of each file's class, from 0; classes are numbered in alphabetical order.
    """

    paths: list[pathlib.Path]
    labels: list[int]


class Listing(NamedTuple):
    """The images of a folder.

    Attributes:
      train: the training files.
      test: the test files.
      names: the names of the classes in alphabetical order.
      notes: which files of the folder are left out, in words; empty if there are none.
    """

    train: LabelledFiles
    test: LabelledFiles
    names: list[str]
    notes: list[str]


def files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all files in a folder, at any depth, in alphabetical order. Links to folders are followed."""
    walk = os.walk(folder, followlinks=True)
    return sorted(pathlib.Path(parent, file) for parent, _, files in walk for file in files)


def name_some(names: Sequence[str], separator: str) -> str:
    """Joins at most ten names, and counts the others."""
    more = [f"and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return separator.join([*names[:_MOST_NAMES], *more])


def list_folder(root: pathlib.Path) -> Listing:
    """Lists the images of a folder in the layout of TFDS's ImageFolder: `root/split/class/...`, at any depth.

    Args:
      root: the folder, with subfolders "train" and "test". Files of all formats that Pillow reads are images. Others,
        and those whose names or folders begin with a dot, are left out.

    Returns:
      The images.

    Raises:
      FileNotFoundError: if the folder, or the subfolder of a split, does not exist.
      ValueError: if a class has no images, or the splits have different classes.
    """
    splits: dict[str, dict[str, list[pathlib.Path]]] = {}
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"no folder {(root / split).absolute()}: images must be in {root}/train/<class>/ and "
                f"{root}/test/<class>/."
            )
        classes = [path.name for path in (root / split).iterdir() if path.is_dir() and path.name[0] != "."]
        splits[split] = {name: [] for name in sorted(classes)}
    left_out, endings = [], image_endings()
    for file in files_below(root):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        is_image = file.suffix.lower() in endings
        if len(parts) > 2 and parts[0] in splits and is_image and not hidden:
            splits[parts[0]][parts[1]].append(file)
        elif parts[0] in splits or is_image:  # a licence beside the splits is no part of the data
            left_out.append("/".join(parts))
    for split, listed in splits.items():
        for name, files in listed.items():
            if not files:
                raise ValueError(
                    f"the folder of the class {root / split / name} has no images: none of its files has the ending of "
                    f"a format that Pillow reads, such as .jpg, .png or .webp."
                )
    names = _common_classes(f"{root}/train", splits["train"], f"{root}/test", splits["test"])
    train, test = (
        LabelledFiles(
            [file for name in names for file in split[name]],
            [label for label, name in enumerate(names) for _ in split[name]],
        )
        for split in splits.values()
    )
    note = (
        f"{len(left_out)} of {len(left_out) + len(train.paths) + len(test.paths)} files are left out (hidden, in no "
        f"class's folder, or of no format that Pillow reads): {name_some(left_out, ', ')}."
    )
    return Listing(train, test, names, [note] if left_out else [])


def list_mit_scenes(root: pathlib.Path) -> Listing:
    """Lists the images of MIT Indoor Scenes in the layout in which its authors publish it.

    The images are in `root/Images/<class>/*.jpg`. The lists `root/TrainImages.txt` and `root/TestImages.txt` select 80
    and 20 images of each of the 67 classes. Each line of a list is `<class>/<file>`.

    Args:
      root: the folder.

    Returns:
      The images on the lists.

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
    return Listing(train, test, names, [])


def find_unreadable(files: Sequence[pathlib.Path], description: str) -> dict[str, str]:
    """Reads all images once, in threads, and shows the progress on standard error.

    Args:
      files: the images.
      description: what is read, for the progress.

    Returns:
      For the path of each file that cannot be read, a message that says why.
    """
    with ThreadPool() as pool:
        messages = tqdm.tqdm(pool.imap(_why_unreadable, files, chunksize=16), description, len(files), disable=None)
        return {str(file): message for file, message in zip(files, messages, strict=True) if message}


def without_unreadable(listing: Listing, unreadable: Mapping[str, str], *, skip: bool) -> Listing:
    """Leaves out images that cannot be read.

    Args:
      listing: the images.
      unreadable: from `find_unreadable`.
      skip: whether they may be left out.

    Returns:
      The listing of the other images, with a note that says which ones are left out.

    Raises:
      ValueError: naming them, if there are any and `skip` is False; or naming the classes that have no others.
    """
    if not unreadable:
        return listing
    counted = f"{len(unreadable)} of {len(listing.train.paths) + len(listing.test.paths)} images"
    some = name_some([*unreadable.values()], "\n")
    if not skip:
        raise ValueError(
            f"{counted} cannot be read:\n{some}\nRepair or remove them, or leave them out with skip_unreadable."
        )
    kept = []
    for split, files in (("train", listing.train), ("test", listing.test)):
        pairs = [pair for pair in zip(*files, strict=True) if str(pair[0]) not in unreadable]
        kept.append(LabelledFiles([path for path, _ in pairs], [label for _, label in pairs]))
        without = [name for label, name in enumerate(listing.names) if label not in set(kept[-1].labels)]
        if without:
            raise ValueError(f"no {split} image of the classes {name_some(without, ', ')} can be read:\n{some}")
    return listing._replace(train=kept[0], test=kept[1], notes=[*listing.notes, f"{counted} are left out:\n{some}"])


def _why_unreadable(file: pathlib.Path) -> str:
    try:
        read_image(file)
    except UnreadableImageError as error:
        return str(error)
    return ""


def _common_classes(train_name: str, train: dict | set, test_name: str, test: dict | set) -> list[str]:
    if not train:
        raise ValueError(f"{train_name} has no classes.")
    for name, classes, others in ((train_name, train, test), (test_name, test, train)):
        missing = sorted(set(others) - set(classes))
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{name} is missing {len(missing)} classes of the other split: {shown}.")
    return sorted(train)
