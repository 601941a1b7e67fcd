"""Tokenizers: a file of the package tokenizers, made here, and bytes."""

import pytest
import tokenizers

from experiments.harness.texts import BYTES, open_texts, read_tokenizer


@pytest.fixture
def file(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the sea, the sea, the sea"], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", 0)])
    made.enable_truncation(2)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_file_is_read_and_adds_no_tokens_of_its_own(file):
    tokenizer = read_tokenizer(file)
    tokens = tokenizer.encode("the sea é")
    assert 2 < len(tokens) < len(BYTES.encode("the sea é"))
    assert 0 not in tokens
    assert tokenizer.decode(tokens) == "the sea é"
    assert tokenizer.decode([0]) == "<|end|>"
    assert max(tokens) < tokenizer.vocab_size <= 270


def test_bytes_are_tokens_and_halves_of_characters_are_shown():
    assert BYTES.encode("aé") == [97, 195, 169]
    assert BYTES.decode([97, 195, 169, 195]) == "aé\ufffd"


def test_texts_are_opened_with_either(file, tmp_path):
    (tmp_path / "text.txt").write_text("the sea, the sea")
    tokenizer = read_tokenizer(file)
    for of in (BYTES, tokenizer):
        example = open_texts([tmp_path / "text.txt"], of, 40)[0]
        tokens = of.encode("the sea, the sea")
        assert example.inputs[: len(tokens)].tolist() == tokens
        assert example.label_weights.sum() == len(tokens) - 1


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        read_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is not a tokenizer\.json"):
        read_tokenizer(tmp_path / "other.json")
