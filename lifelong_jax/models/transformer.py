"""A causal transformer in flax nnx: predicts each token of a text from those before it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax._checks import check_positive_integer
from lifelong_jax._extras import needs_extra
from lifelong_jax.types import Params

with needs_extra("models"):
    from flax import nnx

_ROTARY_BASE = 10_000.0
_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes and the variant of a `Transformer`. The defaults are GPT-2's variant.

    Attributes:
      vocab_size: the number of tokens.
      max_length: the most tokens of an example.
      num_layers: the number of layers, each of attention and a perceptron of one hidden layer.
      num_heads: the number of heads of attention.
      width: the size of the vector at each position, a multiple of `num_heads`.
      num_kv_heads: the number of heads of keys and values, each shared by `num_heads / num_kv_heads` heads
        (grouped-query attention); None for `num_heads`.
      hidden_size: the width of the perceptrons' hidden layers, whose activation is GELU by its tanh approximation; None
        for 4 · `width`.
      norm: "layer" for LayerNorm or "rms" for RMSNorm, before attention, before the perceptron and after the last
        layer.
      positions: "learned" for an embedding of each position, which is added to the token's, or "rotary" for queries and
        keys that are rotated by their positions.
      tied: whether the output layer's kernel is the embedding of tokens.
      bias: whether dense layers and LayerNorm have biases. The output layer has none.
      dtype: "float32" or "bfloat16", to compute in. Parameters and logits are float32.
      remat: whether a layer's activations are computed again in the backward pass, which holds the inputs of layers
        alone.

    Raises:
      ValueError: if sizes are not positive integers, or do not divide.

    Example:
      >>> small = TransformerConfig(vocab_size=50_257, max_length=1024, num_layers=12, num_heads=12, width=768)
      >>> init_fn, _ = transformer_functions(small)
      >>> sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init_fn, jax.random.key(0))))  # GPT-2 small
      124439808
    """

    vocab_size: int
    max_length: int
    num_layers: int
    num_heads: int
    width: int
    num_kv_heads: int | None = None
    hidden_size: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    positions: Literal["learned", "rotary"] = "learned"
    tied: bool = True
    bias: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        """Validates before computing."""
        for name in ("vocab_size", "max_length", "num_layers", "num_heads", "width", "num_kv_heads", "hidden_size"):
            check_positive_integer(name, getattr(self, name), optional=name in ("num_kv_heads", "hidden_size"))
        choices = {"norm": ("layer", "rms"), "positions": ("learned", "rotary"), "dtype": ("float32", "bfloat16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads, {self.num_heads}, not {self.width}.")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, {self.num_heads}; {self.num_kv_heads} does not.")
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise ValueError(
                f"rotary positions rotate pairs of features, so width / num_heads must be even, not "
                f"{self.width // self.num_heads}."
            )


class Transformer(nnx.Module):
    """A causal transformer. Its layers are stacked in arrays, and run by a scan: they are compiled once.

        x₀ = embedding[tokens] (+ positions),    logits = norm(x_L) @ output
        y = x + attention(norm(x)),    x' = y + down(gelu(up(norm(y))))    in each layer

    `transformer_functions` makes the functions of parameters that the rest of the library takes.

    Args:
      config: its sizes and its variant.
      rngs: the source of random keys for initial parameters, as in GPT-2: kernels and embeddings are normal with
        deviation 0.02, divided by √(2 · num_layers) for the two kernels of a layer whose outputs are added.

    Example:
      >>> config = TransformerConfig(vocab_size=256, max_length=32, num_layers=2, num_heads=2, width=8)
      >>> Transformer(config, rngs=nnx.Rngs(0))(jnp.arange(5)).shape
      (5, 256)

    Radford et al. 2019, "Language models are unsupervised multitask learners" (GPT-2). Grouped-query attention is from
    Ainslie et al. 2023, arXiv 2305.13245; rotary positions are from Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        self.config = config
        self.tokens = _embedding(config, config.vocab_size, rngs)
        self.positions = _embedding(config, config.max_length, rngs) if config.positions == "learned" else None

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> _Layer:
            return _Layer(config, rngs)

        self.layers = stack(rngs)
        self.norm = _norm(config, rngs)
        if not config.tied:
            self.output = nnx.Linear(
                config.width,
                config.vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(0.02),
                dtype=config.dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Computes the logits of the next token at each position.

        Args:
          tokens: `[length]`, integers from 0 to `vocab_size - 1`, with `length` of at most `max_length`.

        Returns:
          `[length, vocab_size]`, float32. Those at a position depend on the tokens up to it.

        Raises:
          ValueError: if tokens are not one example of at most `max_length` tokens.
          TypeError: if tokens are not integers.
        """
        self._check(tokens)
        x = self.tokens(tokens)
        if self.positions is not None:
            x += self.positions(jnp.arange(len(tokens)))
        graph, layers = nnx.split(self.layers)

        def step(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x), None

        if self.config.remat:
            step = jax.checkpoint(step, prevent_cse=False)
        x, _ = jax.lax.scan(step, x, layers)
        x = _normalize(self.norm, x)
        if not self.config.tied:
            return self.output(x)
        kernel = self.tokens.embedding[...].astype(x.dtype).T
        return jnp.dot(x, kernel, preferred_element_type=jnp.float32)

    def _check(self, tokens: jax.Array) -> None:
        if jnp.ndim(tokens) != 1 or len(tokens) > self.config.max_length:
            raise ValueError(
                f"tokens must be one example [length] of at most {self.config.max_length} tokens (max_length), not of "
                f"shape {jnp.shape(tokens)}: take jax.vmap of the network for several."
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, not {tokens.dtype}.")


class _Layer(nnx.Module):
    """Attention and a perceptron, each of normalised inputs and added to them."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, kv_width = config.width, config.width // config.num_heads * (config.num_kv_heads or config.num_heads)
        hidden_size = config.hidden_size or 4 * width
        added = 0.02 / np.sqrt(2 * config.num_layers)
        self.attention_norm = _norm(config, rngs)
        self.query = _dense(config, width, width, rngs)
        self.key = _dense(config, width, kv_width, rngs)
        self.value = _dense(config, width, kv_width, rngs)
        self.attended = _dense(config, width, width, rngs, added)
        self.perceptron_norm = _norm(config, rngs)
        self.up = _dense(config, width, hidden_size, rngs)
        self.down = _dense(config, hidden_size, width, rngs, added)

    def __call__(self, x: jax.Array) -> jax.Array:
        normal = _normalize(self.attention_norm, x)
        head_size = self.config.width // self.config.num_heads
        query, key, value = (
            dense(normal).reshape(len(x), -1, head_size) for dense in (self.query, self.key, self.value)
        )
        if self.config.positions == "rotary":
            query, key = rotate(query), rotate(key)
        with jax.numpy_dtype_promotion("standard"):  # of bfloat16, for its softmax in float32
            heads = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += self.attended(heads.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(_normalize(self.perceptron_norm, x)), approximate=True))


def rotate(x: jax.Array) -> jax.Array:
    """Rotates pairs of features by angles proportional to the position (rotary positions).

        (x_i, x_{i+h}) → (x_i cos a − x_{i+h} sin a, x_i sin a + x_{i+h} cos a),    a = position · 10000^(−i/h)

    The inner product of a rotated query and a rotated key depends on the distance between their positions alone.

    Args:
      x: `[length, heads, 2h]`, queries or keys.

    Returns:
      An array of the same shape and dtype.

    Example:
      >>> round(float(rotate(jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]]))[1, 0, 1]), 3)  # sin(1)
      0.841

    Su et al. 2021, arXiv 2104.09864, section 3.2; which features are paired is as in Llama.
    """
    length, _, size = x.shape
    angles = np.arange(length)[:, None] * _ROTARY_BASE ** (-np.arange(size // 2) / (size // 2))
    cosine, sine = (jnp.asarray(f(angles)[:, None], jnp.float32) for f in (np.cos, np.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1).astype(x.dtype)


def _embedding(config: TransformerConfig, num_rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    initializer = nnx.initializers.normal(0.02)
    return nnx.Embed(num_rows, config.width, embedding_init=initializer, dtype=config.dtype, rngs=rngs)


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    if config.norm == "rms":
        return nnx.RMSNorm(config.width, epsilon=_EPSILON, rngs=rngs)
    return nnx.LayerNorm(config.width, epsilon=_EPSILON, use_bias=config.bias, rngs=rngs)


def _normalize(norm: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return norm(x.astype(jnp.float32)).astype(x.dtype)  # statistics of bfloat16 would be too coarse


def _dense(config: TransformerConfig, inputs: int, outputs: int, rngs: nnx.Rngs, deviation: float = 0.02) -> nnx.Linear:
    initializer = nnx.initializers.normal(deviation)
    return nnx.Linear(inputs, outputs, use_bias=config.bias, kernel_init=initializer, dtype=config.dtype, rngs=rngs)


@functools.cache  # one pair for each config, so that jit compiles once
def transformer_functions(
    config: TransformerConfig,
) -> tuple[Callable[[jax.Array], Params], Callable[[Params, jax.Array], jax.Array]]:
    """Makes the functions of a `Transformer` that the rest of the library takes.

    Args:
      config: its sizes and its variant.

    Returns:
      `init_fn(key) -> params`, nested dicts of float32 arrays, whose layers have a leading axis `num_layers`; and
      `apply_fn(params, tokens) -> logits`, `[length] -> [length, vocab_size]`, as `Transformer` computes them. The same
      config gives the same functions.

    Example:
      >>> config = TransformerConfig(vocab_size=256, max_length=32, num_layers=2, num_heads=2, width=8)
      >>> init_fn, apply_fn = transformer_functions(config)
      >>> params = init_fn(jax.random.key(0))
      >>> params["layers"]["up"]["kernel"].shape
      (2, 8, 32)
      >>> apply_fn(params, jnp.arange(5)).shape
      (5, 256)
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def init_fn(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))

    def apply_fn(params: Params, tokens: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, params)
        return model(tokens)

    return init_fn, apply_fn


def generate(
    apply_fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    prompt: jax.Array,
    num_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """Continues a text by tokens that are drawn one after the other, each from the network's distribution of the next.

        token ~ softmax(logits / temperature)

    The network is evaluated on the whole text for each token, without a cache of keys and values: this is meant for
    samples of small networks. One program is compiled for each length of prompt and continuation together.

    Args:
      apply_fn: `apply_fn(params, tokens) -> logits`, causal, from `transformer_functions`; hashable.
      params: its parameters.
      prompt: `[prompt_length]`, at least 1 token.
      num_tokens: the number of tokens to draw.
      key: a random key.
      temperature: 1 for the network's distribution, less for likelier tokens; 0 for the likeliest.

    Returns:
      `[num_tokens]`, int32: the continuation, without the prompt.

    Raises:
      ValueError: if the prompt is empty or no list of tokens, `num_tokens` no positive integer, or `temperature`
        negative; by the network, if prompt and continuation together are too long.

    Example:
      >>> config = TransformerConfig(vocab_size=256, max_length=32, num_layers=2, num_heads=2, width=8)
      >>> init_fn, apply_fn = transformer_functions(config)
      >>> generate(apply_fn, init_fn(jax.random.key(0)), jnp.arange(5), 3, jax.random.key(1)).shape
      (3,)
    """
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size:
        raise ValueError(f"prompt must be at least 1 token, [prompt_length], not of shape {prompt.shape}.")
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt must be integers, not {prompt.dtype}.")
    check_positive_integer("num_tokens", num_tokens)
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, not {temperature}.")
    text = jnp.pad(prompt.astype(jnp.int32), (0, num_tokens))
    return _continue(apply_fn, params, text, jnp.int32(len(prompt)), key, jnp.float32(temperature))[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _continue(
    apply_fn: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    text: jax.Array,
    start: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    def draw(position: jax.Array, text: jax.Array) -> jax.Array:
        logits = apply_fn(params, text)[position - 1]
        # The largest of logits / temperature + Gumbel noise is a draw from the softmax; so it is at temperature 0.
        noise = jax.random.gumbel(jax.random.fold_in(key, position), logits.shape, logits.dtype)
        return text.at[position].set(jnp.argmax(logits + temperature * noise).astype(text.dtype))

    return jax.lax.fori_loop(start, len(text), draw, text)
