"""GPT-2's published weights, for a `Transformer`."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from lifelong_jax.models._weights import check_fit, misfits, read_weights
from lifelong_jax.models.transformer import TransformerConfig
from lifelong_jax.types import Params

_HEAD_SIZE = 64  # of all published sizes
_PARTS = ("query", "key", "value")
_LAYER = {
    "attention_norm": "ln_1",
    "attended": "attn.c_proj",
    "perceptron_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
"""Settings of a config.json that a `Transformer` has no other values of."""


def load_gpt2(path: str | pathlib.Path) -> tuple[TransformerConfig, Params]:
    """Loads a checkpoint of GPT-2, of any size, as Hugging Face stores it.

    Sizes are read off the weights' shapes. The number of heads is not among them: it is `n_head` of a file
    "config.json" in the same folder, or, without such a file, width / 64, as in all published sizes.

    Args:
      path: path of a safetensors file, whose names are "transformer.h.0.attn.c_attn.weight" and so on, with or without
        "transformer." in front.

    Returns:
      The config and its parameters, in float32, for `transformer_functions`. They give the logits of GPT-2's own code.
      Change how they are computed by `dataclasses.replace(config, dtype="bfloat16", remat=True)`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a safetensors file; if weights are missing, unknown or of another shape, of which the
        message names all; if the number of heads cannot be told; or if config.json is of a variant that `Transformer`
        does not compute.

    Example:
      Load and sample, with the tokens of Hugging Face's package `tokenizers`:

          tokenizer = tokenizers.Tokenizer.from_file("gpt2/tokenizer.json")
          config, params = load_gpt2("gpt2/model.safetensors")
          _, apply_fn = transformer_functions(config)
          prompt = np.array(tokenizer.encode("The sea").ids)
          print(tokenizer.decode(generate(apply_fn, params, prompt, 50, jax.random.key(0))))

    Radford et al. 2019, "Language models are unsupervised multitask learners". The names and shapes are those of
    `GPT2LMHeadModel` in https://github.com/huggingface/transformers
    """
    file, found = read_weights(path)
    weights = {name.removeprefix("transformer."): weight for name, weight in found.items() if not _is_copy(name, found)}
    config = _infer_config(file, weights)
    check_fit(file, misfits(weights, _shapes(config), "GPT-2"))

    def stacked(name: str) -> np.ndarray:
        return np.stack([weights[f"h.{layer}.{name}"] for layer in range(config.num_layers)])

    layers = {
        ours: _layer_params({leaf: stacked(f"{name}.{leaf}") for leaf in ("weight", "bias")})
        for ours, name in _LAYER.items()
    }
    kernels, biases = (np.split(stacked(f"attn.c_attn.{leaf}"), 3, axis=-1) for leaf in ("weight", "bias"))
    for part, kernel, bias in zip(_PARTS, kernels, biases, strict=True):
        layers[part] = _layer_params({"weight": kernel, "bias": bias})
    return config, {
        "tokens": {"embedding": _array(weights["wte.weight"])},
        "positions": {"embedding": _array(weights["wpe.weight"])},
        "layers": layers,
        "norm": {"scale": _array(weights["ln_f.weight"]), "bias": _array(weights["ln_f.bias"])},
    }


def _is_copy(name: str, weights: dict[str, np.ndarray]) -> bool:
    """Returns whether a weight is a buffer (the causal mask), or the output layer that shares the embedding."""
    if name == "lm_head.weight":
        embedding = weights.get("transformer.wte.weight", weights.get("wte.weight"))
        return embedding is not None and np.array_equal(weights[name], embedding)
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _infer_config(file: pathlib.Path, weights: dict[str, np.ndarray]) -> TransformerConfig:
    needed = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")
    wrong = [name for name in needed if name not in weights or weights[name].ndim != 2]
    if wrong:
        raise ValueError(
            f"{file} is not a checkpoint of GPT-2: {', '.join(wrong)} must be there, with two axes. It has "
            f"{', '.join(sorted(weights)[:3]) or 'no weights'} ..."
        )
    (vocab_size, width), (max_length, _) = weights["wte.weight"].shape, weights["wpe.weight"].shape
    numbers = [int(match[1]) for match in (re.match(r"h\.(\d+)\.", name) for name in weights) if match]
    return TransformerConfig(
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=1 + max(numbers),
        num_heads=_num_heads(file, width),
        width=width,
        hidden_size=weights["h.0.mlp.c_fc.weight"].shape[1],
    )


def _num_heads(file: pathlib.Path, width: int) -> int:
    settings_file = file.parent / "config.json"
    settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    other = {name: settings[name] for name, value in _FIXED.items() if settings.get(name, value) != value}
    if other:
        listed = ", ".join(f"{name} {value} and not {_FIXED[name]}" for name, value in other.items())
        raise ValueError(f"{settings_file} is of a variant of GPT-2 that Transformer does not compute: {listed}.")
    if "n_head" not in settings and width % _HEAD_SIZE:
        raise ValueError(
            f"{file} has width {width}, which is no multiple of {_HEAD_SIZE}, the size of a head in GPT-2's published "
            f"sizes: put its config.json, with n_head, beside it."
        )
    return settings.get("n_head", width // _HEAD_SIZE)


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    width, hidden_size = config.width, config.hidden_size or 4 * config.width
    inputs_outputs = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, hidden_size),
        "mlp.c_proj": (hidden_size, width),
    }
    of_layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in inputs_outputs.items()}
    of_layer |= {f"{name}.bias": (outputs,) for name, (_, outputs) in inputs_outputs.items()}
    of_layer |= {f"{norm}.{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    return {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.max_length, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    } | {f"h.{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in of_layer.items()}


def _layer_params(leaves: dict[str, np.ndarray]) -> dict[str, jnp.ndarray]:
    kind = "scale" if leaves["weight"].ndim == 2 else "kernel"  # a norm's, stacked, has two axes
    return {kind: _array(leaves["weight"]), "bias": _array(leaves["bias"])}


def _array(weight: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(weight, jnp.float32)
