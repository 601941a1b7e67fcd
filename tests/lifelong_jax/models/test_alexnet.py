"""AlexNet against NumPy; the weights of torchvision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lifelong_jax import models

pytestmark = pytest.mark.usefixtures("standard_promotion")

SMALL = {"features": (2, 3, 4, 3, 2), "hidden_sizes": (6, 5)}
NAMES = [f"features.{number}" for number in (0, 3, 6, 8, 10)] + [f"classifier.{number}" for number in (1, 4, 6)]


def torchvision_weights(num_outputs):
    rng = np.random.default_rng(0)
    channels = (3, *SMALL["features"])
    windows = (11, 5, 3, 3, 3)
    shapes = [(channels[i + 1], channels[i], windows[i], windows[i]) for i in range(5)]
    sizes = (channels[-1] * 36, *SMALL["hidden_sizes"], num_outputs)
    shapes += [(sizes[i + 1], sizes[i]) for i in range(3)]
    weights = {}
    for name, shape in zip(NAMES, shapes, strict=True):
        weights[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32) * np.sqrt(2 / np.prod(shape[1:]))
        weights[f"{name}.bias"] = rng.normal(size=shape[0]).astype(np.float32)
    return weights


def numpy_alexnet(weights, image):
    def convolution(x, name, stride, padding):
        weight = weights[f"{name}.weight"]
        x = np.pad(x, [(0, 0), (padding, padding), (padding, padding)])
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
        outputs = np.einsum("chwij,ocij->ohw", windows, weight) + weights[f"{name}.bias"][:, None, None]
        return np.maximum(outputs, 0)

    def pool(x):
        return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(3, 4))

    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = (image - mean[:, None, None]) / deviation[:, None, None]
    x = pool(convolution(x, "features.0", 4, 2))
    x = pool(convolution(x, "features.3", 1, 2))
    x = convolution(convolution(x, "features.6", 1, 1), "features.8", 1, 1)
    x = pool(convolution(x, "features.10", 1, 1))
    bins = [[(i * n // 6, -(-(i + 1) * n // 6)) for i in range(6)] for n in x.shape[1:]]
    x = np.array([[x[:, top:bottom, left:right].mean((1, 2)) for left, right in bins[1]] for top, bottom in bins[0]])
    x = x.transpose(2, 0, 1).ravel()  # channels first
    for name in NAMES[5:7]:
        x = np.maximum(weights[f"{name}.weight"] @ x + weights[f"{name}.bias"], 0)
    return weights["classifier.6.weight"] @ x + weights["classifier.6.bias"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alexnet.safetensors"
    safetensors.numpy.save_file(torchvision_weights(7), path)
    return path


def zeros_like_init(model, shape=(63, 63, 3)):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def test_alexnet_with_torchvision_weights_computes_what_torchvision_does(file):
    shape = (303, 63)  # 8×1 features: to 6×6, rows are averaged and columns spread
    model = models.AlexNet(num_outputs=7, **SMALL)
    params = models.load_pretrained(zeros_like_init(model), file)
    image = np.random.default_rng(1).uniform(size=(*shape, 3)).astype(np.float32)
    expected = numpy_alexnet(torchvision_weights(7), image.transpose(2, 0, 1))
    np.testing.assert_allclose(jax.jit(model.apply)(params, image), expected, rtol=1e-4, atol=1e-5)


def test_the_head_stays_as_it_was_where_it_has_another_shape(file):
    params = zeros_like_init(models.AlexNet(num_outputs=9, **SMALL))
    params["params"]["fc8"] = jax.tree.map(lambda leaf: leaf + 3, params["params"]["fc8"])
    loaded = models.load_pretrained(params, file)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"]["fc8"], params["params"]["fc8"])
    np.testing.assert_array_equal(loaded["params"]["fc7"]["bias"], torchvision_weights(7)["classifier.4.bias"])
    assert jax.tree.structure(loaded) == jax.tree.structure(params)


def test_every_mismatch_is_named(file, tmp_path):
    weights = torchvision_weights(7)
    del weights["features.3.bias"]
    weights["features.0.weight"] = weights["features.0.weight"][:, :1]
    weights["features.1.running_mean"] = np.zeros(2, np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "other.safetensors")
    params = zeros_like_init(models.AlexNet(num_outputs=7, **SMALL))
    with pytest.raises(ValueError, match="does not fit") as error:
        models.load_pretrained(params, tmp_path / "other.safetensors")
    for reason in (
        "features.0.weight has shape (2, 1, 11, 11), not (2, 3, 11, 11)",
        "features.3.bias (3,) is missing",
        "features.1.running_mean is not a parameter",
    ):
        assert reason in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no file of pretrained weights .*nowhere\.safetensors"):
        models.load_pretrained(params, tmp_path / "nowhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a safetensors file"):
        models.load_pretrained(params, tmp_path / "broken.safetensors")


def test_alexnet_has_the_shapes_of_torchvision(tmp_path):
    # The weights that are missing in this file are all of torchvision's except the head.
    safetensors.numpy.save_file({"classifier.6.bias": np.zeros(1000, np.float32)}, tmp_path / "empty.safetensors")
    params = jax.eval_shape(models.AlexNet(1000).init, jax.random.key(0), jnp.zeros((224, 224, 3)))
    with pytest.raises(ValueError, match="is missing") as error:
        models.load_pretrained(params, tmp_path / "empty.safetensors")
    weights = [
        (64, 3, 11, 11),
        (192, 64, 5, 5),
        (384, 192, 3, 3),
        (256, 384, 3, 3),
        (256, 256, 3, 3),
        (4096, 9216),
        (4096, 4096),
    ]
    for name, shape in zip(NAMES, weights, strict=False):
        assert f"{name}.weight {shape} is missing" in str(error.value)
        assert f"{name}.bias {shape[:1]} is missing" in str(error.value)


def test_images_that_are_too_small():
    for shape in ((62, 99, 3), (64, 64, 1), (2, 64, 64, 3)):
        with pytest.raises(ValueError, match="AlexNet needs one image"):
            jax.eval_shape(models.AlexNet(2).init, jax.random.key(0), jnp.zeros(shape))
