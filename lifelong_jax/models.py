"""Small flax networks, and AlexNet with pretrained weights. Each maps one example, without a batch axis.

The rest of the library works with any function of parameters and an example. These networks mark the outputs of their
layers for `local_mas_importance`.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import _checks
from lifelong_jax._batch_axis import BATCH_AXIS
from lifelong_jax._extras import needs_extra
from lifelong_jax.importance.layers import layer_output
from lifelong_jax.types import Example, ModelState, Params, TrainFn

with needs_extra("models"):
    import flax.linen as nn
    import flax.traverse_util
    import safetensors
    import safetensors.numpy


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
    """Convolves one image with a kernel, by the implementation that trains fastest on the current backend.

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
    implementation = convolve_by_patches if jax.default_backend() == "cpu" else convolve_by_xla
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


class AlexNet(nn.Module):
    """AlexNet in torchvision's variant: five convolutions and three dense layers.

    With 1,000 outputs it has 61 million parameters. The input is a colour image in [0, 1]. The network normalises it by
    ImageNet's mean and standard deviation, as the pretrained weights require (see `load_pretrained`). The features of
    the last convolution are averaged to 6×6, so that images may have any size of at least 63×63; the pretrained weights
    were trained on 224×224. There is no dropout.

    Attributes:
      num_outputs: the width of the output layer, `fc8`, called the head.
      features: the number of output channels of the five convolutions, `conv1` to `conv5`.
      hidden_sizes: the widths of the layers `fc6` and `fc7`.

    Example:
      >>> model = AlexNet(num_outputs=200)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((224, 224, 3)))
      >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
      57823240

    Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks". The variant is from
    Krizhevsky 2014, arXiv 1404.5997; see https://pytorch.org/vision/stable/models/alexnet.html
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
                f"with, for example, image_size=224 and channels=3."
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
    """Initialises a network's parameters. It draws what `model.init` draws, but in one compiled program.

    Args:
      model: a flax module of one example. It must be hashable, as modules are whose attributes are hashable.
      key: a random key.
      x: an input, without a batch axis.

    Returns:
      The parameters.

    Example:
      >>> jax.tree.map(jnp.shape, init_network(MLP((5,), 10), jax.random.key(0), jnp.zeros(64))["params"]["Dense_0"])
      {'bias': (5,), 'kernel': (64, 5)}
    """
    return _init_program()(model, key, x) if _checks.is_concrete(key) else model.init(key, x)


@functools.cache
def _init_program() -> Callable[[nn.Module, jax.Array, Example], Params]:
    # The program runs once. On a CPU, full optimisation would make its compilation four times as long, for the same
    # numbers. A program with compiler options cannot be part of another one, so init_network calls it only outside jit.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda model, key, x: model.init(key, x), static_argnums=0, compiler_options=options)


@functools.cache  # one pair for each network, so that jit compiles once
def train_functions(model: nn.Module) -> tuple[Callable[[Params, ModelState, Example], jax.Array], TrainFn]:
    """Makes a `Recipe`'s two functions of a flax module with dropout or batch normalisation.

    Args:
      model: a module of one example, hashable, whose call takes `train`: whether it is being trained. Its random keys
        are called "dropout", and the axis of its batch normalisation "batch".

    Returns:
      `apply_fn(params, model_state, x) -> outputs`, the module as it predicts, and
      `train_fn(params, model_state, x, key) -> (outputs, model_state)`, as it is trained.

    Example:
      >>> model = MLP((5,), 10, dropout=0.5)
      >>> apply_fn, train_fn = train_functions(model)
      >>> params, model_state = split_variables(init_network(model, jax.random.key(0), jnp.ones(64)))
      >>> train_fn(params, model_state, jnp.ones(64), jax.random.key(1))[0].shape
      (10,)
    """

    def apply_fn(params: Params, model_state: ModelState, x: Example) -> jax.Array:
        outputs: Any = model.apply({**params, **model_state}, x)
        return outputs

    def train_fn(params: Params, model_state: ModelState, x: Example, key: jax.Array) -> tuple[jax.Array, ModelState]:
        variables, names = {**params, **model_state}, list(model_state)
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=names)

    return apply_fn, train_fn


def split_variables(variables: Params) -> tuple[Params, ModelState]:
    """Splits a flax module's variables, for the functions of `train_functions`.

    Args:
      variables: from `init_network`.

    Returns:
      The parameters, `{"params": ...}`, and the model state: the module's other collections, such as "batch_stats".

    Example:
      >>> variables = init_network(CNN((2,), 10, batch_norm=True), jax.random.key(0), jnp.ones((8, 8, 1)))
      >>> [list(part) for part in split_variables(variables)]
      [['params'], ['batch_stats']]
    """
    model_state = {name: collection for name, collection in variables.items() if name != "params"}
    return {"params": variables["params"]}, model_state


def load_pretrained(params: Params, path: str | pathlib.Path) -> Params:
    """Replaces AlexNet's parameters by pretrained weights.

    The file must have torchvision's names and shapes. With torch and torchvision installed, this code writes it:

        weights = torchvision.models.alexnet(weights="DEFAULT").state_dict()
        safetensors.torch.save_file(weights, "alexnet.safetensors")

    The head is replaced only if its shape is that in the file: 1,000 outputs for ImageNet. Otherwise it is kept.

    Args:
      params: from `AlexNet.init`.
      path: path of a safetensors file.

    Returns:
      A tree like `params`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not a safetensors file, or if weights are missing, unknown or of another shape; the message
        names them all.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of pretrained weights {file.absolute()}.")
    try:
        weights = safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}.") from error
    ours = flax.traverse_util.flatten_dict(params["params"])
    names = {(layer, leaf): f"{_TORCHVISION[layer]}.{_LEAVES[leaf]}" for layer, leaf in ours}
    wrong = {}
    for place, name in names.items():
        shape = _torchvision_shape(ours[place])
        if name not in weights:
            wrong[place] = f"{name} {shape} is missing"
        elif weights[name].shape != shape:
            wrong[place] = f"{name} has shape {weights[name].shape}, not {shape}"
    kept = {place for place in ours if place[0] == _HEAD} if any(place[0] == _HEAD for place in wrong) else set()
    reasons = [reason for place, reason in wrong.items() if place not in kept]
    reasons += [f"{name} is not a parameter of AlexNet" for name in sorted(weights.keys() - set(names.values()))]
    if reasons:
        raise ValueError(f"{file} does not fit the network: {'; '.join(reasons)}.")
    channels = ours["conv5", "bias"].size
    loaded = {
        place: leaf
        if place in kept
        else jnp.asarray(_from_torchvision(place, weights[names[place]], channels), leaf.dtype)
        for place, leaf in ours.items()
    }
    return {"params": flax.traverse_util.unflatten_dict(loaded)}


def _torchvision_shape(leaf: jax.Array) -> tuple[int, ...]:
    # Torchvision has [outputs, inputs, height, width], this network [height, width, inputs, outputs].
    return leaf.shape if leaf.ndim == 1 else (*leaf.shape[:-3:-1], *leaf.shape[:-2])


def _from_torchvision(path: tuple[str, str], weight: np.ndarray, channels: int) -> np.ndarray:
    if path == ("fc6", "kernel"):  # torchvision flattens [channels, 6, 6], this network [6, 6, channels]
        weight = weight.reshape(-1, channels, 6, 6)
        return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
    return weight if weight.ndim == 1 else np.moveaxis(weight, (0, 1), (-1, -2))


def _average_to(x: jax.Array, size: int) -> jax.Array:
    """Averages `[height, width, channels]` to `[size, size, channels]`, over windows of about equal size."""
    for axis in (0, 1):
        length = x.shape[axis]
        window = np.zeros((size, length), x.dtype)
        for index in range(size):
            first, last = index * length // size, -(-(index + 1) * length // size)
            window[index, first:last] = 1 / (last - first)
        x = jnp.moveaxis(jnp.tensordot(window, x, (1, axis), precision="highest"), 0, axis)
    return x
