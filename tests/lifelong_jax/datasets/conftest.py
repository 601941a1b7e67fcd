"""What the tests of data sets share: a cache folder of their own, and a small folder of images."""

import platformdirs
import pytest

from tests.pictures import write_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "animals"
    write_image(root / "train" / "cat" / "b.png", (6, 9), 250)
    write_image(root / "train" / "cat" / "a.jpg", (9, 6), 200, "L")
    write_image(root / "train" / "ant" / "c.JPEG", (5, 5), 100)
    write_image(root / "test" / "cat" / "d.png", (7, 7), 51, "P")
    write_image(root / "test" / "ant" / "e.png", (40, 3), 20, "RGBA")
    return root
