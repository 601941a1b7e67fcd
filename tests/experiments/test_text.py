"""The script on texts: its examples and their padding, its network, its table in losses, and how it goes on."""

import json

import jax
import numpy as np
import pytest

from experiments import text
from experiments.harness.runs import read_rows
from experiments.harness.settings import parse_settings
from lifelong_jax.models import init_network
from tests.experiments.files import read_table

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = ["--length", "6", "--num-examples", "8", "--width", "4", "--num-epochs", "1", "--batch-size", "4"]


def call(output_dir, *arguments):
    text.main(parse_settings(text.Config, "text", [*arguments, "--output-dir", str(output_dir)]))
    return max((output_dir / "text").iterdir())


def test_a_run_reports_losses_per_byte_and_takes_another_method(tmp_path):
    begun = call(tmp_path, *SMALL, "--seeds", "0", "1", "--methods", "finetune", "joint")
    before = read_rows(begun)
    folder = call(tmp_path, "--resume", str(begun), "--methods", "ewc")
    rows = read_rows(folder)
    assert rows[: len(before)] == before
    assert {row["method"] for row in rows[len(before) :]} == {"ewc"}
    summary = json.loads((folder / "summary.json").read_text())["methods"]
    assert summary.keys() == {"finetune", "ewc", "joint"}
    for of_method in summary.values():  # nothing is learned yet, and all bytes are about as likely
        assert abs(of_method["average_loss_per_byte"]["mean"] - np.log(256)) < 1
    assert "| method | average loss per byte |" in read_table(folder / "table.md")
    assert (folder / "loss_per_byte.png").exists()


@pytest.mark.slow
def test_the_strength_of_the_lowest_loss_is_chosen(tmp_path):
    arguments = [*SMALL, "--num-examples", "64", "--num-epochs", "20", "--texts", "prose", "names", "--seeds", "0"]
    folder = call(tmp_path, *arguments, "--methods", "ewc", "--strength", "1,1e9")
    swept = {row["method"]: row["accuracy_matrix"] for row in read_rows(folder) if row.get("split") == "validation"}
    losses = {name: np.mean(matrix[-1]) for name, matrix in swept.items()}
    assert losses["ewc 1"] < losses["ewc 1e+09"]  # at which the names are not learned
    assert json.loads((folder / "strength.json").read_text())["ewc"] == 1


def test_examples_are_the_bytes_of_the_text_and_padding_has_the_weight_0():
    pieces = [*text.cut("naïve".encode() + b"\n", 4), b"abcd"]
    assert pieces == [b"na\xc3\xaf", b"ve\n", b"abcd"]
    batch = text.make_batch(pieces, 4)
    np.testing.assert_array_equal(batch.labels[1], [*b"ve\n", 0])
    np.testing.assert_array_equal(batch.label_weights, [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch.inputs[:, 0], 0)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.labels[:, :-1])


@pytest.mark.parametrize("name", ["prose", "code", "names"])
def test_every_python_has_the_texts(name):
    train, test, _ = text.load_text(name, 64, 768)
    again, *_ = text.load_text(name, 64, 768)
    assert (len(train.labels), len(test.labels)) == (768, 192)
    np.testing.assert_array_equal(train.labels, again.labels)
    seen = {row.tobytes() for row in np.asarray(train.labels)}
    assert np.mean([row.tobytes() in seen for row in np.asarray(test.labels)]) < 0.05
    written = np.asarray(train.labels)[np.asarray(train.label_weights) > 0]
    letters = np.isin(written, list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")).mean()
    assert letters > 0.7 if name == "names" else letters < 0.2
    with pytest.raises(ValueError, match=rf"num_examples must be at most \d+ for {name}, not 100000000"):
        text.load_text(name, 64, 100_000_000)


def test_the_network_sees_no_byte_before_it_predicts_it():
    network = text.Network(4)
    x = np.arange(6)
    params = init_network(network, jax.random.key(0), x)
    logits, of_other = (network.apply(params, tokens) for tokens in (x, np.where(np.arange(6) == 3, 200, x)))
    assert logits.shape == (6, 256)
    np.testing.assert_array_equal(logits[:3], of_other[:3])
    assert (np.abs(logits - of_other)[3:] > 1e-4).any(axis=1).all()
