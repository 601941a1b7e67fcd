"""Small flax networks, and AlexNet with pretrained weights. Each takes one example, without batch axis.

Nothing in the library depends on them: any function of parameters and an example will do. They mark the ends of their
layers, for `local_mas_importance`.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lifelong_jax import _checks
from lifelong_jax.tapping import layer_output
from lifelong_jax.types import Example, Params


class MLP(nn.Module):
    """A multilayer perceptron.

    Attributes:
      hidden_sizes: the widths of the hidden layers.
      num_outputs: the width of the output layer.
      activation: "relu" or "tanh", after each hidden layer.

    Example:
      >>> model = MLP(hidden_sizes=(256, 256), num_outputs=10)
      >>> variables = model.init(jax.random.key(0), jax.numpy.zeros(64))
      >>> model.apply(variables, jax.numpy.zeros(64)).shape
      (10,)
    """

    hidden_sizes: tuple[int, ...]
    num_outputs: int
    activation: Literal["relu", "tanh"] = "relu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the outputs `[num_outputs]` of one example `x` of any shape, which is flattened."""
        activate = {"relu": nn.relu, "tanh": jnp.tanh}[self.activation]
        x = x.reshape(-1)
        for size in self.hidden_sizes:
            x = layer_output(activate(nn.Dense(size)(x)))
        return nn.Dense(self.num_outputs)(x)


class CNN(nn.Module):
    """A small convolutional network: 3×3 convolutions, ReLU, and the mean over 2×2 pixels, then one dense layer.

    Attributes:
      features: the channels of each convolution; each but the last is followed by the next at half the resolution.
      num_outputs: the width of the output layer.

    Example:
      >>> model = CNN(features=(16, 32), num_outputs=10)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((8, 8, 1)))
      >>> variables["params"]["Conv_1"]["kernel"].shape
      (3, 3, 16, 32)
    """

    features: tuple[int, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the outputs `[num_outputs]` of one image `x`, `[height, width, channels]`."""
        smallest = 2 ** len(self.features)
        if x.ndim != 3 or min(x.shape[:2]) < smallest:
            raise ValueError(
                f"{len(self.features)} convolutions need one image [height, width, channels] of at least {smallest} by "
                f"{smallest} pixels, not {x.shape}: have fewer features, or a larger image_size."
            )
        for size in self.features:
            x = layer_output(nn.relu(Conv(size, window=3, padding=1)(x)))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.num_outputs)(x.reshape(-1))


class Conv(nn.Module):
    """A convolution of one image, with a bias; the parameters are those of flax's `nn.Conv`.

    Attributes:
      features: the channels of the result.
      window: height and width of the kernel.
      stride: pixels from one place of the kernel to the next.
      padding: rows and columns of zeros on each side of the image.
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
    """Convolves one image with a kernel, in the way that trains fastest on the backend.

        out[i, j] = Σ_row,column image[stride · i + row − padding, stride · j + column − padding] @ kernel[row, column]

    On a CPU it is `convolve_by_patches`, elsewhere `convolve_by_xla`: on a CPU, XLA's convolutions are ten times slower
    inside of a loop, and training is a loop (`benchmarks/convolutions.py`).

    Args:
      image: `[height, width, channels]`.
      kernel: `[window_height, window_width, channels, features]`.
      stride: pixels from one place of the kernel to the next.
      padding: rows and columns of zeros on each side of the image.

    Returns:
      `[new_height, new_width, features]`, with `new_height = (height + 2 · padding − window_height) // stride + 1`.

    Example:
      >>> convolve(jnp.ones((3, 3, 1)), jnp.ones((3, 3, 1, 1)), padding=1)[..., 0]
      Array([[4., 6., 4.],
             [6., 9., 6.],
             [4., 6., 4.]], dtype=float32)
    """
    way = convolve_by_patches if jax.default_backend() == "cpu" else convolve_by_xla
    return way(image, kernel, stride, padding)


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def convolve_by_patches(image: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves one image with a kernel: gathers the image's patches, and makes one product of matrices.

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
    # One axis after the other: height + width slices, and not height · width.
    image = jnp.concatenate([image[:, c : c + (columns - 1) * stride + 1 : stride] for c in range(width)], axis=-1)
    image = jnp.concatenate([image[r : r + (rows - 1) * stride + 1 : stride] for r in range(height)], axis=-1)
    patches = image.reshape(rows * columns, height * width * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(rows, columns, features)


@functools.partial(jax.jit, static_argnames=("stride", "padding"))
def convolve_by_xla(image: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves one image with a kernel: XLA's own convolution.

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


class AlexNet(nn.Module):
    """AlexNet, as torchvision has it: five convolutions and three dense layers, 61 million parameters at 1,000 outputs.

    The input is a colour image in [0, 1]; it is normalised by ImageNet's mean and standard deviation here, as the
    pretrained weights want it (`load_pretrained`). The last convolution's features are averaged to 6×6, so that images
    of any size from 63×63 on will do; the weights were trained on 224×224. There is no dropout: the network is a
    function of its parameters and one example alone, and in continual learning it would blur the importances.

    Attributes:
      num_outputs: the width of the output layer, the head `fc8`.
      features: the channels of the five convolutions, `conv1` to `conv5`.
      hidden_sizes: the widths of `fc6` and `fc7`.

    Example:
      >>> model = AlexNet(num_outputs=200)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((224, 224, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
      57823240

    Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks"; the variant is that of
    Krizhevsky 2014, arXiv 1404.5997, and https://pytorch.org/vision/stable/models/alexnet.html
    """

    num_outputs: int
    features: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)
    hidden_sizes: tuple[int, int] = (4096, 4096)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the outputs `[num_outputs]` of one image `x`, `[height, width, 3]`, in [0, 1]."""
        if x.ndim != 3 or x.shape[-1] != 3 or min(x.shape[:2]) < 63:
            raise ValueError(
                f"AlexNet needs one image [height, width, 3] of at least 63 by 63 pixels, not {x.shape}: load the data "
                f"with image_size=224 and channels=3, say."
            )
        mean, deviation = (jnp.asarray(values, x.dtype) for values in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
        x = (x - mean) / deviation
        sizes = self.features
        x = layer_output(nn.relu(Conv(sizes[0], window=11, stride=4, padding=2, name="conv1")(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = layer_output(nn.relu(Conv(sizes[1], window=5, padding=2, name="conv2")(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for number in (3, 4, 5):
            x = layer_output(nn.relu(Conv(sizes[number - 1], window=3, padding=1, name=f"conv{number}")(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = _average_to(x, 6).reshape(-1)
        for number, size in zip((6, 7), self.hidden_sizes, strict=True):
            x = layer_output(nn.relu(nn.Dense(size, name=f"fc{number}")(x)))
        return nn.Dense(self.num_outputs, name=_HEAD)(x)


_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
_HEAD = "fc8"
_LEAVES = {"kernel": "weight", "bias": "bias"}
_TORCHVISION = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    _HEAD: "classifier.6",
}


def init_network(model: nn.Module, key: jax.Array, x: Example) -> Params:
    """Draws a network's first parameters: what `model.init` does, as one program.

    Args:
      model: a flax module of one example, hashable, as modules of plain attributes are.
      key: a random key.
      x: an input, without batch axis.

    Returns:
      The parameters.

    Example:
      >>> jax.tree.map(jnp.shape, init_network(MLP((5,), 10), jax.random.key(0), jnp.zeros(64))["params"]["Dense_0"])
      {'bias': (5,), 'kernel': (64, 5)}
    """
    return _init_program()(model, key, x) if _checks.is_concrete(key) else model.init(key, x)


@functools.cache
def _init_program() -> Callable[[nn.Module, jax.Array, Example], Params]:
    # It runs once: on a CPU, optimised in full, it is four times as long in compilation, and draws the same numbers.
    # What is compiled with options of its own cannot be part of another program.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda model, key, x: model.init(key, x), static_argnums=0, compiler_options=options)


def load_pretrained(params: Params, path: str | pathlib.Path) -> Params:
    """Puts pretrained weights in the place of AlexNet's parameters.

    The file has torchvision's names and shapes. Where torch is installed, this writes it:

        weights = torchvision.models.alexnet(weights="DEFAULT").state_dict()
        safetensors.torch.save_file(weights, "alexnet.safetensors")

    The head stays as it was initialised, unless it has the file's shape, which is 1,000 classes of ImageNet.

    Args:
      params: what `AlexNet.init` returns.
      path: a safetensors file.

    Returns:
      A tree like `params`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no safetensors file, or if weights lack, are left over or differ in shape: all are named.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file.absolute()} of pretrained weights.")
    try:
        weights = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}.") from error
    ours = flax.traverse_util.flatten_dict(params["params"])
    names = {(layer, leaf): f"{_TORCHVISION[layer]}.{_LEAVES[leaf]}" for layer, leaf in ours}
    wrong = {}
    for path, name in names.items():
        shape = _torchvision_shape(ours[path])
        if name not in weights:
            wrong[path] = f"{name} {shape} lacks"
        elif weights[name].shape != shape:
            wrong[path] = f"{name} has shape {weights[name].shape}, not {shape}"
    kept = {path for path in ours if path[0] == _HEAD} if any(path[0] == _HEAD for path in wrong) else set()
    reasons = [reason for path, reason in wrong.items() if path not in kept]
    reasons += [f"{name} is no parameter of AlexNet" for name in sorted(weights.keys() - set(names.values()))]
    if reasons:
        raise ValueError(f"{file} does not fit the network: {'; '.join(reasons)}.")
    channels = ours["conv5", "bias"].size
    loaded = {
        path: leaf if path in kept else jnp.asarray(_from_torchvision(path, weights[names[path]], channels), leaf.dtype)
        for path, leaf in ours.items()
    }
    return {"params": flax.traverse_util.unflatten_dict(loaded)}


def _torchvision_shape(leaf: jax.Array) -> tuple[int, ...]:
    # [outputs, inputs, height, width], where ours are [height, width, inputs, outputs].
    return leaf.shape if leaf.ndim == 1 else (*leaf.shape[:-3:-1], *leaf.shape[:-2])


def _from_torchvision(path: tuple[str, str], weight: np.ndarray, channels: int) -> np.ndarray:
    if path == ("fc6", "kernel"):  # theirs takes [channels, 6, 6] flattened, ours [6, 6, channels]
        weight = weight.reshape(-1, channels, 6, 6)
        return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
    return weight if weight.ndim == 1 else np.moveaxis(weight, (0, 1), (-1, -2))


def _average_to(x: jax.Array, size: int) -> jax.Array:
    """Averages `[height, width, channels]` to `[size, size, channels]`, over windows as equal as they can be."""
    for axis in (0, 1):
        length = x.shape[axis]
        window = np.zeros((size, length), x.dtype)
        for index in range(size):
            first, last = index * length // size, -(-(index + 1) * length // size)
            window[index, first:last] = 1 / (last - first)
        x = jnp.moveaxis(jnp.tensordot(window, x, (1, axis), precision="highest"), 0, axis)
    return x
