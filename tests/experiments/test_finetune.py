"""The script that fine-tunes: its fronts, its texts, a checkpoint and a tokenizer, and how it goes on."""

import json
import pathlib
import signal

import jax
import numpy as np
import optax
import pytest
import tokenizers

from experiments import finetune
from experiments.harness.fronts import FINETUNE, FROZEN, JOINT, Trial, best_of, draw_fronts, fronts_of, rise_at_half
from experiments.harness.runs import read_rows
from experiments.harness.settings import parse_settings
from experiments.harness.texts import open_texts, read_tokenizer
from lifelong_jax import streaming
from lifelong_jax.models import transformer_functions
from lifelong_jax.models.gpt2 import load_gpt2
from tests.experiments.files import read_table

pytestmark = pytest.mark.usefixtures("standard_promotion")

CHECKPOINT = pathlib.Path(__file__).parent.parent / "lifelong_jax" / "files" / "gpt2" / "model.safetensors"
SIZES = ["--length", "16", "--num-layers", "1", "--width", "16", "--num-pretrain-epochs", "1", "--batch-size", "4"]
SMALL = [*SIZES, "--num-examples", "8", "--num-importance", "4", "--num-test", "3"]


@pytest.fixture
def texts(tmp_path):
    """Two files of text, and the arguments that name them."""
    for name, words in (("a", "the sea is wide and the sky is high. "), ("b", "for i in range(10): print(i)\n")):
        (tmp_path / f"{name}.txt").write_text(words * 12)
    return ["--text-a", str(tmp_path / "a.txt"), "--text-b", str(tmp_path / "b.txt")]


def call(output_dir, *arguments):
    finetune.main(parse_settings(finetune.Config, "finetune", [*arguments, "--output-dir", str(output_dir)]))
    return max((output_dir / "finetune").iterdir())


def test_every_method_has_a_row_and_a_stronger_penalty_keeps_more(tmp_path, texts, capsys):
    strengths = [f"--strengths.{name}" for name in ("l2", "ewc", "ewc_bytes", "adam", "mas", "kfac", "kl")]
    arguments = [argument for name in strengths for argument in (name.replace("_", "-"), "1e9")]
    methods = ["l2", "ewc", "ewc_bytes", "adam", "mas", "kfac", "kl", "joint"]
    folder = call(tmp_path, *SMALL, *texts, *arguments, "--methods", *methods)
    loss = json.loads((folder / "summary.json").read_text())["loss"]
    assert loss.keys() == {"frozen", "finetune", "joint", *(f"{name} 1e+09" for name in methods[:-1])}
    losses = {name: [of_text["mean"] for of_text in of_trial] for name, of_trial in loss.items()}
    assert losses["finetune"][1] < losses["frozen"][1] - 0.01
    for name in ("l2 1e+09", "ewc 1e+09", "adam 1e+09"):  # where every parameter has an importance
        np.testing.assert_allclose(losses[name], losses["frozen"], atol=0.02)
    table = read_table(folder / "table.md")
    assert all(f"| {name} |" in table for name in methods)
    assert (folder / "finetune.png").exists()
    assert "B: '" in capsys.readouterr().out


def test_a_run_takes_another_seed_and_computes_nothing_again(tmp_path, texts, monkeypatch):
    begun = call(tmp_path, *SMALL, *texts, "--methods", "ewc", "--strengths.ewc", "1", "--seeds", "0")
    before, learned = read_rows(begun), []
    learn = finetune.learn_resumably
    monkeypatch.setattr(
        finetune,
        "learn_resumably",
        lambda run, name, *rest, **kw: learned.append(name) or learn(run, name, *rest, **kw),
    )
    folder = call(tmp_path, "--resume", str(begun), "--seeds", "1")
    assert read_rows(folder)[: len(before)] == before
    assert {name[:6] for name in learned} == {"seed 1"}
    assert len(json.loads((folder / "summary.json").read_text())["rise_at_half"]["ewc"]["values"]) == 2


def test_a_training_that_is_stopped_goes_on_to_the_bit(tmp_path, texts, monkeypatch):
    arguments = [*SMALL, *texts, "--methods", "ewc", "--strengths.ewc", "1"]
    whole = call(tmp_path / "whole", *arguments)
    learn = streaming.learn_stream

    def stop_after_two_steps(*arguments, callback, **options):
        def stopping(state):
            if state.step == 2:
                signal.raise_signal(signal.SIGTERM)
            callback(state)

        return learn(*arguments, callback=stopping, **options)

    monkeypatch.setattr(streaming, "learn_stream", stop_after_two_steps)
    with pytest.raises(SystemExit):
        call(tmp_path / "parts", *arguments)
    monkeypatch.setattr(streaming, "learn_stream", learn)
    folder = max((tmp_path / "parts" / "finetune").iterdir())
    assert any((folder / "checkpoints").iterdir())
    assert call(tmp_path / "parts", "--resume", str(folder)) == folder
    assert read_rows(folder) == read_rows(whole)
    assert not list((folder / "checkpoints").iterdir())


def test_a_checkpoint_and_its_tokenizer_take_the_place_of_pretraining(tmp_path, texts):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "is": 2, "in": 3, "sea": 4}, "[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = ["--model", str(CHECKPOINT), "--tokenizer", str(tmp_path / "tokenizer.json"), "--length", "8"]
    sizes = ["--num-examples", "4", "--num-importance", "2", "--num-test", "2", "--batch-size", "2"]
    folder = call(tmp_path, *model, *sizes, *texts, "--methods", "adam", "ewc", "--strengths.ewc", "1")
    loss = json.loads((folder / "summary.json").read_text())["loss"]
    assert loss.keys() == {"frozen", "finetune", "ewc 1"}  # the checkpoint has no state of Adam
    config, params = load_gpt2(CHECKPOINT)
    source = open_texts(texts[1:2], read_tokenizer(tmp_path / "tokenizer.json"), 8)
    test = finetune.split(finetune.Config(num_test=2, length=8), "text_a", source).test
    logits = jax.vmap(transformer_functions(config)[1], in_axes=(None, 0))(params, test.inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
    mean = np.sum(test.label_weights * losses) / np.sum(test.label_weights)
    np.testing.assert_allclose(loss["frozen"][0]["mean"], mean, rtol=1e-5)


def test_bad_settings_and_texts_are_refused(tmp_path, texts, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            call(tmp_path, *arguments)
        return capsys.readouterr().err.replace("\n", " ")

    assert "text_a has" in refused(*SMALL, *texts, "--num-test", "30")
    assert "no text file or folder" in refused(*SMALL, "--text-a", str(tmp_path / "none.txt"))
    assert "must be a multiple of 16" in " ".join(refused(*SMALL, "--width", "20").split())
    assert "as --tokenizer" in " ".join(refused(*SMALL, "--model", "model.safetensors").split())
    assert "leave out --tokenizer" in " ".join(refused(*SMALL, "--tokenizer", "tokenizer.json").split())


def test_a_front_is_read_between_its_points():
    losses = {
        FROZEN: np.array([[1.0, 3.0], [1.0, 3.0]]),
        FINETUNE: np.array([[2.0, 1.0], [2.0, 1.0]]),
        Trial("ewc", 1.0): np.array([[1.5, 1.5], [1.4, 1.0]]),
        Trial("ewc", 9.0): np.array([[1.1, 2.5], [1.2, 2.0]]),
    }
    fronts = fronts_of([*losses, JOINT])
    assert [trial.name for trial in fronts["ewc"]] == ["ewc 1", "ewc 9"]
    np.testing.assert_allclose(rise_at_half(fronts["ewc"], losses), [0.3, 0.2])  # B's loss of 2
    assert best_of(fronts["ewc"], losses).strength == 1.0
    (axis,) = draw_fronts(losses, "").axes
    np.testing.assert_allclose(axis.lines[1].get_xydata(), [[1, 3], [1.15, 2.25], [1.45, 1.25], [2, 1]])
