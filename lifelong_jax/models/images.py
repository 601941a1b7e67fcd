"""Small flax networks: a multilayer perceptron and a convolutional network; convolutions that train fast on CPUs."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lifelong_jax._batch_axis import BATCH_AXIS
from lifelong_jax._extras import needs_extra
from lifelong_jax.importance.layers import layer_output
from lifelong_jax.platforms import is_for_cpu

with needs_extra("models"):
    import flax.linen as nn


class MLP(nn.Module):
    """A multilayer perceptron.

    Attributes:
      hidden_sizes: the widths of the hidden layers.
      num_outputs: the width of the output layer.
      activation: "relu" or "tanh", applied after each hidden layer.
      dropout: the share of each hidden layer's outputs that are set to 0 in training; see `train_functions`.

    Example:
      >>> model = MLP(hidden_sizes=(256, 256), num_outputs=10)
      >>> variables = model.init(jax.random.key(0), jax.numpy.zeros(64))
      >>> model.apply(variables, jax.numpy.zeros(64)).shape
      (10,)
    """

    hidden_sizes: tuple[int, ...]
    num_outputs: int
    activation: Literal["relu", "tanh"] = "relu"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes the outputs `[num_outputs]` of one example `x`. It may have any shape, and is flattened."""
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}.")
        activate = {"relu": nn.relu, "tanh": jnp.tanh}[self.activation]
        x = x.reshape(-1)
        for size in self.hidden_sizes:
            x = layer_output(activate(nn.Dense(size)(x)))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_outputs)(x)


class CNN(nn.Module):
    """A small convolutional network: 3×3 convolutions, each followed by ReLU and 2×2 average pooling; a dense layer.

    Attributes:
      features: the number of output channels of each convolution.
      num_outputs: the width of the output layer.
      batch_norm: whether each convolution is followed by batch normalisation, before its ReLU; see `train_functions`.

    Example:
      >>> model = CNN(features=(16, 32), num_outputs=10)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((8, 8, 1)))
      >>> variables["params"]["Conv_1"]["kernel"].shape
      (3, 3, 16, 32)
    """

    features: tuple[int, ...]
    num_outputs: int
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes the outputs `[num_outputs]` of one image `x`, `[height, width, channels]`."""
        smallest = 2 ** len(self.features)
        if x.ndim != 3 or min(x.shape[:2]) < smallest:
            raise ValueError(
                f"{len(self.features)} convolutions need one image [height, width, channels] of at least {smallest} by "
                f"{smallest} pixels, not {x.shape}: use fewer features or a larger image_size."
            )
        for size in self.features:
            x = Conv(size, window=3, padding=1)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=BATCH_AXIS)(x)
            x = layer_output(nn.relu(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.num_outputs)(x.reshape(-1))


class Conv(nn.Module):
    """A convolution of one image, with a bias. It has the parameters of flax's `nn.Conv`.

    Attributes:
      features: the number of output channels.
      window: height and width of the kernel in pixels.
      stride: the distance in pixels between neighbouring positions of the kernel.
      padding: the number of rows and columns of zeros added on each side of the image.
    """

    features: int
    window: int
    stride: int = 1
    padding: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[height, width, channels]` to `[new_height, new_width, features]`."""
        shape = (self.window, self.window, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=None)
        return convolve(x, kernel, self.stride, self.padding) + bias


def convolve(image: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves one image with a kernel, by the implementation that trains fastest on the platform.

        out[i, j] = Σ_row,column image[stride · i + row − padding, stride · j + column − padding] @ kernel[row, column]

    This is `convolve_by_patches` on CPUs and `convolve_by_xla` elsewhere. On CPUs, XLA's convolutions are ten times
    slower inside a loop, and training is a loop (measured by `benchmarks/convolutions.py`).

    Args:
      image: `[height, width, channels]`.
      kernel: `[window_height, window_width, channels, features]`.
      stride: the distance in pixels between neighbouring positions of the kernel.
      padding: the number of rows and columns of zeros added on each side of the image.

    Returns:
      `[new_height, new_width, features]`, with `new_height = (height + 2 · padding − window_height) // stride + 1`.

    Example:
      >>> convolve(jnp.ones((3, 3, 1)), jnp.ones((3, 3, 1, 1)), padding=1)[..., 0]
      Array([[4., 6., 4.],
             [6., 9., 6.],
             [4., 6., 4.]], dtype=float32)
    """
    implementation = convolve_by_patches if is_for_cpu() else convolve_by_xla
    return implementation(image, kernel, stride, padding)


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def convolve_by_patches(image: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves one image with a kernel: gathers the image's patches and multiplies them by the kernel as a matrix.

    Args:
      image: as for `convolve`.
      kernel: as for `convolve`.
      stride: as for `convolve`.
      padding: as for `convolve`.

    Returns:
      As `convolve`.
    """
    height, width, channels, features = kernel.shape
    image = jnp.pad(image, [(padding, padding), (padding, padding), (0, 0)])
    rows, columns = (image.shape[0] - height) // stride + 1, (image.shape[1] - width) // stride + 1
    # One axis after the other, which takes height + width slices instead of height · width.
    image = jnp.concatenate([image[:, c : c + (columns - 1) * stride + 1 : stride] for c in range(width)], axis=-1)
    image = jnp.concatenate([image[r : r + (rows - 1) * stride + 1 : stride] for r in range(height)], axis=-1)
    patches = image.reshape(rows * columns, height * width * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(rows, columns, features)


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def convolve_by_xla(image: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves one image with a kernel by XLA's convolution.

    Args:
      image: as for `convolve`.
      kernel: as for `convolve`.
      stride: as for `convolve`.
      padding: as for `convolve`.

    Returns:
      As `convolve`.
    """
    return jax.lax.conv_general_dilated(
        image[None],
        kernel,
        window_strides=(stride, stride),
        padding=[(padding, padding), (padding, padding)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
