"""Folders of images: what is listed, and what is left out."""

import numpy as np
import pytest

from lifelong_jax import datasets
from lifelong_jax.datasets.folders import list_folder
from tests.pictures import write_image


def test_images_of_all_formats_are_listed_at_any_depth(folder):
    for file in ("ant/more/deep/a.webp", "ant/B.TIF", "cat/c.bmp", "cat/z.gif", "ant/a.jfif"):
        write_image(folder / "train" / file if "jfif" not in file else folder / "train" / "ant" / "a.jpg", (3, 3), 1)
    (folder / "train" / "ant" / "a.jpg").rename(folder / "train" / "ant" / "a.jfif")
    train, test, names, notes = list_folder(folder)
    assert names == ["ant", "cat"]
    listed = [str(path.relative_to(folder / "train")) for path in train.paths]
    assert listed == ["ant/B.TIF", "ant/a.jfif", "ant/c.JPEG", "ant/more/deep/a.webp"] + [
        f"cat/{name}" for name in ("a.jpg", "b.png", "c.bmp", "z.gif")
    ]
    assert train.labels == [0] * 4 + [1] * 4
    assert test.labels == [0, 1]
    assert notes == []


def test_links_to_folders_are_followed(folder, tmp_path):
    (folder / "train" / "ant").rename(tmp_path / "elsewhere")
    (folder / "train" / "ant").symlink_to(tmp_path / "elsewhere")
    write_image(tmp_path / "elsewhere too" / "f.png", (3, 3), 1)
    (folder / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere too")
    assert [path.name for path in list_folder(folder).train.paths] == ["c.JPEG", "a.jpg", "b.png", "f.png"]
    first = datasets.load_dataset(f"folder:{folder}", image_size=4)
    write_image(tmp_path / "elsewhere" / "g.png", (3, 3), 1)
    assert datasets.load_dataset(f"folder:{folder}", image_size=4).train.labels.size == first.train.labels.size + 1


def test_what_is_left_out_is_counted_and_some_of_it_is_named(folder):
    for name in ("train/cat/._a.jpg", "train/cat/notes.txt", "train/a.jpg", "val/cat/a.jpg", "license.txt"):
        write_image(folder / "some.png", (3, 3), 1)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "some.png").rename(folder / name)
    (folder / "train" / ".thumbnails").mkdir()
    for number in range(8):
        write_image(folder / "train" / ".thumbnails" / f"{number}.jpg", (3, 3), 1)
    train, test, names, notes = list_folder(folder)
    assert (len(train.paths), len(test.paths), names) == (3, 2, ["ant", "cat"])
    assert notes == [
        "12 of 17 files are left out (hidden, in no class's folder, or of no format that Pillow reads): "
        f"{', '.join(f'train/.thumbnails/{number}.jpg' for number in range(8))}, train/a.jpg, train/cat/._a.jpg, "
        "and 2 more."
    ]


def test_folders_that_cannot_be_read(folder):
    name = f"folder:{folder}"
    with pytest.raises(FileNotFoundError, match=r"no folder 'nowhere': a data set folder:PATH"):
        datasets.load_dataset("folder:nowhere")
    with pytest.raises(FileNotFoundError, match=r"a data set folder:PATH needs the path of a folder"):
        datasets.open_dataset("folder:")
    (folder / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"the folder of the class .*/train/dog has no images"):
        datasets.open_dataset(name)
    write_image(folder / "train" / "dog" / "a.png", (3, 3), 5)
    with pytest.raises(ValueError, match=r"/test is missing 1 classes of the other split: dog\."):
        datasets.open_dataset(name)
    (folder / "test").rename(folder / "tests")
    with pytest.raises(FileNotFoundError, match=r"no folder .*/test: images must be in"):
        datasets.open_dataset(name)
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match=r"/test is missing 3 classes"):
        datasets.open_dataset(name)


def test_mit_scenes(tmp_path):
    root = tmp_path / "scenes"
    files = ("mall/shopping mall.jpg", "bar/bar_0026.jpg", "mall/m.jpg", "bar/b.jpg", "bar/unlisted.jpg")
    for number, file in enumerate(files):
        write_image(root / "Images" / file, (8, 6 + number), 10 * number)
    (root / "TrainImages.txt").write_text("mall/shopping mall.jpg\r\nbar/bar_0026.jpg\r\n")
    (root / "TestImages.txt").write_text("bar/b.jpg\nmall/m.jpg")
    scenes = datasets.load_dataset(f"mit_scenes:{root}", image_size=5)
    assert scenes.num_classes == 2
    assert scenes.train.labels.tolist() == [1, 0]
    assert scenes.test.labels.tolist() == [0, 1]
    np.testing.assert_allclose(255 * scenes.train.inputs[:, 2, 2, 0], [0, 10], atol=2)
    np.testing.assert_allclose(255 * scenes.test.inputs[:, 2, 2, 0], [30, 20], atol=2)

    for lines, error, message in (
        ("bar/b.jpg\nbar/x.jpg", FileNotFoundError, r"1 of the 2 images listed .* the first is bar/x\.jpg"),
        ("bar.jpg", ValueError, r"the line 'bar\.jpg', but each line must be <class>/<file>"),
        ("bar/b.jpg", ValueError, r"TestImages\.txt is missing 1 classes of the other split: mall"),
    ):
        (root / "TestImages.txt").write_text(lines)
        with pytest.raises(error, match=message):
            datasets.open_dataset(f"mit_scenes:{root}")
    (root / "TrainImages.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*TrainImages\.txt"):
        datasets.open_dataset(f"mit_scenes:{root}")
