"""Small networks: both implementations of convolutions against each other and against flax's."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import explain, mas_importance, models
from lifelong_jax._batch_axis import weigh_means

pytestmark = pytest.mark.usefixtures("standard_promotion")


def assert_equal(tree, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), tree, expected)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "padding"),
    [((5, 7, 2), 3, 1, 1), ((13, 12, 3), 5, 4, 2), ((1, 1, 2), 1, 1, 0)],
)
def test_both_ways_to_convolve_agree_in_values_and_gradients(shape, window, stride, padding):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        images = jnp.asarray(rng.normal(size=(2, *shape)))
        kernel = jnp.asarray(rng.normal(size=(window, window, shape[-1], 3)))

        def value_and_gradients(convolve):
            def summed(images, kernel):
                outputs = jax.vmap(convolve, (0, None, None, None))(images, kernel, stride, padding)
                return jnp.sum(jnp.sin(outputs)), outputs

            return jax.jit(jax.value_and_grad(summed, argnums=(0, 1), has_aux=True))(images, kernel)

        patches, xla = map(value_and_gradients, (models.convolve_by_patches, models.convolve_by_xla))
        assert_equal(patches, xla)
        assert patches[0][1].dtype == jnp.float64


class FlaxCnn(nn.Module):
    """What `CNN(features=(2, 3), num_outputs=4)` must compute, by flax's own convolutions."""

    @nn.compact
    def __call__(self, x):
        for index, size in enumerate((2, 3)):
            x = nn.avg_pool(nn.relu(nn.Conv(size, (3, 3), name=f"Conv_{index}")(x)), (2, 2), strides=(2, 2))
        return nn.Dense(4, name="Dense_0")(x.reshape(-1))


def test_a_cnn_is_the_same_network_by_either_way(monkeypatch):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        images = jnp.asarray(rng.normal(size=(3, 5, 7, 2)))
        weights = jnp.array([1.0, 0.0, 2.0])
        model = models.CNN(features=(2, 3), num_outputs=4)
        shapes = jax.eval_shape(FlaxCnn().init, jax.random.key(0), images[0])
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)

        def measure(apply, method):
            def value_gradient_and_importance(params):
                value_and_gradient = jax.value_and_grad(
                    lambda params: jnp.sum(jnp.sin(jax.vmap(apply, (None, 0))(params, images)))
                )
                importance = mas_importance(apply, params, images, weights=weights, method=method)
                return value_and_gradient(params), importance

            return jax.jit(value_gradient_and_importance)(params)

        expected = measure(FlaxCnn().apply, "reference")
        for backend, reason in (("cpu", "dense"), ("gpu", "convolution")):
            monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
            apply = functools.partial(model.apply)  # another function object, which jit has not seen
            assert jax.eval_shape(model.init, jax.random.key(0), images[0]) == shapes
            assert_equal(measure(apply, "structured"), expected)
            rules = {rule.leaf: (rule.rule, rule.reason) for rule in explain(apply, params, images[0])}
            assert rules["['params']['Conv_0']['kernel']"] == ("product", reason)
            assert rules["['params']['Conv_1']['kernel']"] == ("product", reason)
            assert rules["['params']['Dense_0']['kernel']"] == ("outer", "dense")


def test_dropout_sets_hidden_outputs_to_0_and_scales_the_others_in_training_only():
    model, plain = models.MLP((200, 30), 4, dropout=0.25), models.MLP((200, 30), 4)
    x, keys = jnp.linspace(-1, 1, 6), jax.random.split(jax.random.key(0))
    variables = model.init(keys[0], x)
    chex.assert_trees_all_equal(variables, plain.init(keys[0], x))
    without = plain.apply(variables, x)
    for predicted in (model.apply(variables, x), plain.apply(variables, x, train=True)):
        np.testing.assert_array_equal(predicted, without)

    layers = [variables["params"][f"Dense_{number}"] for number in range(3)]
    rngs, options = {"dropout": keys[1]}, {"capture_intermediates": True, "mutable": ["intermediates"]}
    trained, seen = model.apply(variables, x, train=True, rngs=rngs, **options)
    value = x
    for number in range(2):
        value = jax.nn.relu(value @ layers[number]["kernel"] + layers[number]["bias"])
        (dropped,) = seen["intermediates"][f"Dropout_{number}"]["__call__"]
        kept = np.asarray(dropped != 0)
        np.testing.assert_allclose(dropped, np.where(kept, value / 0.75, 0), rtol=1e-5)
        assert 0.6 < kept[value > 0].mean() < 0.9
        value = dropped
    np.testing.assert_allclose(trained, value @ layers[2]["kernel"] + layers[2]["bias"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and below 1, not 1\.0"):
        models.MLP((3,), 2, dropout=1.0).init(keys[0], x)


def normalised_cnn(params, batch_stats, images, weights):
    """What `CNN((2, 3), 4, batch_norm=True)` computes in training, written out, and its next running averages."""
    shares, after = weights / weights.sum(), {}
    for index in range(2):
        layer, norm = params[f"Conv_{index}"], params[f"BatchNorm_{index}"]
        images = jax.vmap(lambda x, kernel=layer["kernel"]: models.convolve_by_xla(x, kernel, 1, 1))(images)
        images = images + layer["bias"]
        mean = jnp.einsum("n,nhwc->c", shares, images) / images[0, ..., 0].size
        var = jnp.einsum("n,nhwc->c", shares, (images - mean) ** 2) / images[0, ..., 0].size
        images = jax.nn.relu((images - mean) / jnp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"])
        images = nn.avg_pool(images, (2, 2), strides=(2, 2))
        old, new = batch_stats[f"BatchNorm_{index}"], {"mean": mean, "var": var}
        after[f"BatchNorm_{index}"] = {name: 0.9 * old[name] + 0.1 * new[name] for name in new}
    return images.reshape(len(images), -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], after


def test_batch_normalisation_has_the_statistics_of_the_batch_in_training_and_running_averages_in_predictions():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        images, weights = jnp.asarray(rng.normal(size=(4, 4, 5, 2))), jnp.array([1.0, 0.5, 0, 2])
        model = models.CNN((2, 3), 4, batch_norm=True)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images[0])
        variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, size=leaf.shape)), shapes)
        params, model_state = models.split_variables(variables)
        apply_fn, train_fn = models.train_functions(model)
        assert models.train_functions(models.CNN((2, 3), 4, batch_norm=True)) == (apply_fn, train_fn)

        def train(x, weight):
            return weigh_means(train_fn, weight, params, model_state, x, jax.random.key(0))

        outputs, after = jax.vmap(train, out_axes=(0, None), axis_name="batch")(images, weights)
        expected, expected_after = normalised_cnn(params["params"], model_state["batch_stats"], images, weights)
        assert_equal(outputs, expected)
        assert_equal(after, {"batch_stats": expected_after})
        # A batch of one image has the averages of this image, so that predictions are those of training.
        outputs, alone = normalised_cnn(params["params"], model_state["batch_stats"], images[:1], weights[:1])
        moments = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, alone, model_state["batch_stats"])
        assert_equal(apply_fn(params, {"batch_stats": moments}, images[0]), outputs[0])


def test_images_that_are_too_small():
    with pytest.raises(ValueError, match=r"3 convolutions need one image .* at least 8 by 8 pixels, not \(8, 7, 1\)"):
        jax.eval_shape(models.CNN((1, 1, 1), 2).init, jax.random.key(0), jnp.zeros((8, 7, 1)))


@pytest.mark.parametrize("model", [models.MLP((20,), 10), models.CNN((4,), 3)], ids=["mlp", "cnn"])
def test_init_network_draws_what_init_draws(model):
    key, x = jax.random.key(3), jnp.ones((8, 8, 1))
    drawn = models.init_network(model, key, x)
    chex.assert_trees_all_close(drawn, model.init(key, x), rtol=1e-6, atol=1e-7)
    assert jax.eval_shape(functools.partial(models.init_network, model), key, x) == jax.eval_shape(lambda: drawn)
