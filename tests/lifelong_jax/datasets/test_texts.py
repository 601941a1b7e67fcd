"""Texts as examples: every token is a label once, from bytes on disk or through a tokenizer; what is no text."""

import numpy as np
import pytest

from lifelong_jax.datasets import next_token_example, text_source
from lifelong_jax.datasets.sources import Subset
from lifelong_jax.streaming import stream_batches

TEXTS = {"a.txt": "0123456789\n", "deep/b.py": "é", "deep/c": "x", "empty": "", ".hidden/d": "no"}


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return tmp_path


def labels_of(source):
    examples = [source[index] for index in range(len(source))]
    return [example.labels[example.label_weights > 0].tolist() for example in examples]


@pytest.mark.parametrize("length", [1, 3, 5, 10, 64])
def test_each_byte_of_a_file_but_the_first_is_a_label_once(folder, length):
    source = text_source([folder], None, length)
    text = TEXTS["a.txt"].encode()
    cut = [list(text[start : start + length]) for start in range(1, len(text), length)]
    assert labels_of(source) == [*cut, ["é".encode()[1]]]
    assert len(source) == len(cut) + 1
    for index in range(len(source)):
        inputs, labels, weights, mask, label_weights = source[index]
        assert weights is mask is None
        assert (inputs.dtype, labels.dtype, label_weights.dtype) == (np.int32, np.int32, np.float32)
        assert inputs.shape == labels.shape == label_weights.shape == (length,)
        np.testing.assert_array_equal(inputs[1:], labels[:-1])
    assert source[len(cut)].inputs[0] == "é".encode()[0]
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_tokenizer_gives_the_tokens_of_whole_files(folder):
    source = text_source([folder / "a.txt", str(folder / "deep" / "c")], lambda text: [60_000, *map(ord, text)], 6)
    assert labels_of(source) == [[*map(ord, "012345")], [*map(ord, "6789\n")], [ord("x")]]
    assert source[0].inputs[0] == source[2].inputs[0] == 60_000


def test_only_the_bytes_of_an_example_are_read_from_its_file(tmp_path):
    file = tmp_path / "large.txt"
    file.write_bytes(b"a" * 1000)
    source = text_source([file], None, 10)
    file.write_bytes(b"b" * 500)  # the rest is gone, and is not what was there
    assert set(source[3].labels) == {ord("b")}
    assert source[70].label_weights.sum() == 0


def test_texts_stream_in_batches_and_can_be_split(folder):
    source = text_source([folder / "a.txt"], None, 4)
    (batch,) = stream_batches(Subset(source, [2, 0]), 3)
    np.testing.assert_array_equal(batch.inputs[0], [*b"89\n", 0][:4])
    np.testing.assert_array_equal(batch.label_weights[:2], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.labels[1], [*b"1234"])
    np.testing.assert_array_equal(batch.weights, [1, 1, 0])


def test_files_that_are_not_text_are_refused_or_left_out_of_folders(folder):
    (folder / "image.png").write_bytes(b"\x89PNG")
    (folder / "cut.txt").write_bytes("é".encode()[:1])
    with pytest.warns(UserWarning, match=r"2 of 6 files in .* are left out, .*cut\.txt, .*image\.png\."):
        assert len(text_source([folder], None, 64)) == 2
    with pytest.raises(ValueError, match=r"image\.png is not text in UTF-8"):
        text_source([folder / "a.txt", folder / "image.png"], None, 64)


def test_nothing_to_read_is_refused(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing has no text files"):
        text_source([tmp_path / "nothing"], None, 4)
    with pytest.raises(ValueError, match="paths is empty"):
        text_source([], None, 4)
    with pytest.raises(FileNotFoundError, match=r"no text file or folder .*nowhere"):
        text_source([folder / "nowhere"], None, 4)
    with pytest.raises(ValueError, match="no file of paths has two tokens"):
        text_source([folder / "deep" / "c", folder / "empty"], None, 4)
    with pytest.raises(ValueError, match="length must be an integer of at least 1, not 0"):
        text_source([folder], None, 0)


def test_an_example_is_no_longer_than_its_length():
    with pytest.raises(ValueError, match=r"at most length \+ 1, 4, not 5"):
        next_token_example(range(5), 3)
    full = next_token_example(np.arange(1, 5, dtype=np.uint8), 3)
    np.testing.assert_array_equal(full.labels, [2, 3, 4])
    np.testing.assert_array_equal(full.label_weights, 1)
