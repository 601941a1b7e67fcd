"""AlexNet, and its pretrained weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax._extras import needs_extra
from lifelong_jax.importance.layers import layer_output
from lifelong_jax.models._weights import check_fit, misfits, read_weights
from lifelong_jax.models.images import Conv
from lifelong_jax.types import Params

with needs_extra("models"):
    import flax.linen as nn
    import flax.traverse_util


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
    file, weights = read_weights(path)
    ours = flax.traverse_util.flatten_dict(params["params"])
    names = {(layer, leaf): f"{_TORCHVISION[layer]}.{_LEAVES[leaf]}" for layer, leaf in ours}
    shapes = {name: _torchvision_shape(ours[place]) for place, name in names.items()}
    wrong = misfits(weights, shapes, "AlexNet")
    head = {place: name for place, name in names.items() if place[0] == _HEAD}
    kept = set(head) if wrong.keys() & set(head.values()) else set()
    check_fit(file, {name: reason for name, reason in wrong.items() if not (kept and name in head.values())})
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
