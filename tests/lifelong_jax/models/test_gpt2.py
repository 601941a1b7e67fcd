"""GPT-2's weights: the logits of a random checkpoint against the reference implementation, which made both once.

files/gpt2 was written in its folder by torch 2.14.1 and transformers 5.24.0:

    import numpy as np, torch, transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.arange(14) ** 2 % 97
    logits = model(tokens[None]).logits[0]
    model.save_pretrained(".")
    np.save("logits.npy", logits.detach().numpy())
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lifelong_jax import models

FOLDER = pathlib.Path(__file__).parent.parent / "files" / "gpt2"
CONFIG = models.TransformerConfig(vocab_size=97, max_length=16, num_layers=2, num_heads=4, width=16, hidden_size=64)
TOKENS = jnp.arange(14) ** 2 % 97


@pytest.fixture
def weights():
    return safetensors.numpy.load_file(FOLDER / "model.safetensors")


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint and its config.json, and returns the path."""

    def write(weights, **settings):
        (tmp_path / "config.json").write_text(json.dumps({"n_head": 4} | settings))
        safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def test_the_logits_are_those_of_the_reference_implementation():
    config, params = models.load_gpt2(FOLDER / "model.safetensors")
    assert config == CONFIG
    init_fn, apply_fn = models.transformer_functions(config)
    drawn = jax.eval_shape(init_fn, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), drawn
    )
    expected = np.load(FOLDER / "logits.npy")
    np.testing.assert_allclose(jax.jit(apply_fn)(params, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_names_without_prefix_buffers_a_shared_output_layer_and_half_precision_are_read(weights, save):
    weights = {name.removeprefix("transformer."): weight.astype(np.float16) for name, weight in weights.items()}
    weights |= {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float16), "h.1.attn.masked_bias": np.float16(-1e4)[None]}
    config, params = models.load_gpt2(save(weights | {"lm_head.weight": weights["wte.weight"].copy()}))
    assert config == CONFIG
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = models.load_gpt2(FOLDER / "model.safetensors")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), params, expected)


def test_every_mismatch_is_named(weights, save):
    del weights["transformer.h.1.attn.c_proj.bias"]
    weights["transformer.h.0.attn.c_attn.weight"] = weights["transformer.h.0.attn.c_attn.weight"][:, :5].copy()
    weights["lm_head.weight"] = np.zeros((97, 16), np.float32)  # is not the embedding
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the network") as error:
        models.load_gpt2(save(weights))
    for reason in (
        "h.1.attn.c_proj.bias (16,) is missing",
        "h.0.attn.c_attn.weight has shape (16, 5), not (16, 48)",
        "lm_head.weight is not a parameter of GPT-2",
    ):
        assert reason in str(error.value)


def test_files_that_are_no_checkpoints_are_refused(weights, save, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of pretrained weights"):
        models.load_gpt2(tmp_path / "nowhere.safetensors")
    with pytest.raises(
        ValueError, match=r"not a checkpoint of GPT-2: wte\.weight, wpe\.weight.*It has fc1, fc2 \.\.\."
    ):
        models.load_gpt2(save({"fc2": np.zeros(2), "fc1": np.zeros(2)}))


def test_the_number_of_heads_is_that_of_the_config_or_follows_from_their_published_size(weights, save, tmp_path):
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="width 16, which is no multiple of 64"):
        models.load_gpt2(tmp_path / "model.safetensors")
    wide = {name: np.tile(weight, [8] * weight.ndim) for name, weight in weights.items()}
    safetensors.numpy.save_file(wide, tmp_path / "wide.safetensors")
    assert models.load_gpt2(tmp_path / "wide.safetensors")[0].num_heads == 2
    with pytest.raises(ValueError, match="activation_function relu and not gelu_new"):
        models.load_gpt2(save(weights, activation_function="relu"))
