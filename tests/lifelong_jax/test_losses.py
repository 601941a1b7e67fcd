"""The divergence from a frozen network: its closed form, its curvature, padding, masks, extremes and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lifelong_jax import fisher_diagonal
from lifelong_jax.losses import kl_divergence

divergence_and_gradients = jax.jit(jax.value_and_grad(kl_divergence, argnums=(0, 1)))
divergence = jax.jit(kl_divergence)


def draw(seed, shape=(2, 3, 4), dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def closed_form(logits, frozen_logits):
    """For each label, in NumPy."""
    p, frozen = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (logits, frozen_logits))
    return (frozen * np.log(frozen / p)).sum(axis=-1), (p - frozen)


def test_the_closed_form_and_its_gradient():
    with jax.enable_x64(True):
        logits, frozen = draw(0), draw(1)
        found, (gradient, of_frozen) = divergence_and_gradients(logits, frozen)
        expected, by_logits = closed_form(logits, frozen)
        np.testing.assert_allclose(found, expected.mean(), rtol=1e-12)
        np.testing.assert_allclose(gradient, by_logits / 6, rtol=1e-12, atol=1e-14)
        assert not np.any(of_frozen)
        assert not np.isclose(expected.mean(), closed_form(frozen, logits)[0].mean())  # the direction matters


@pytest.mark.parametrize("shape", [(2, 3), (2,)])
def test_labels_of_weight_0_count_nothing_and_may_be_nan(shape):
    with jax.enable_x64(True):
        weights = draw(2, shape) ** 2
        weights[0, ...] = 0
        logits, frozen = draw(0), draw(1)
        each = np.broadcast_to(weights.reshape(shape + (1,) * (2 - len(shape))), (2, 3))
        expected = (each * closed_form(logits, frozen)[0]).sum() / each.sum()
        logits[0], frozen[0] = np.nan, np.inf
        found, (gradient, _) = divergence_and_gradients(logits, frozen, label_weights=weights)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert not np.any(gradient[0])
        assert np.all(gradient[1])
        assert divergence(logits, frozen, label_weights=np.zeros(shape)) == 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64, bool, jnp.bfloat16])
def test_the_weights_of_labels_may_be_a_mask_of_any_dtype(dtype):
    logits, frozen = (draw(seed).astype(np.float32) for seed in (0, 1))
    mask = np.array([0, 1])
    expected = divergence(logits, frozen, label_weights=mask.astype(np.float32))
    assert divergence(logits, frozen, label_weights=mask.astype(dtype)) == expected


def test_a_class_mask_divides_the_probabilities_between_its_classes():
    with jax.enable_x64(True):
        logits, frozen, mask = draw(0), draw(1), np.array([True, False, True, True])
        logits[..., 1], frozen[..., 1] = 900.0, np.nan
        found, (gradient, _) = divergence_and_gradients(logits, frozen, class_mask=mask)
        expected, by_logits = closed_form(logits[..., mask], frozen[..., mask])
        np.testing.assert_allclose(found, expected.mean(), rtol=1e-12)
        np.testing.assert_allclose(gradient[..., mask], by_logits / 6, rtol=1e-10, atol=1e-14)
        assert not np.any(gradient[..., 1])


def test_extreme_logits():
    minus_infinity = np.array([0.0, 1.0, -np.inf], np.float32)
    found, (gradient, _) = divergence_and_gradients(minus_infinity, minus_infinity)
    assert found == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    found, (gradient, _) = divergence_and_gradients(np.float32([1e4, -1e4, 0]), np.float32([-1e4, 1e4, 0]))
    np.testing.assert_allclose(found, 2e4)
    np.testing.assert_allclose(gradient, [1, -1, 0])


def test_bfloat16_is_computed_in_float32():
    logits, frozen = (jnp.asarray(draw(seed), jnp.bfloat16) for seed in (0, 1))
    found, (gradient, _) = divergence_and_gradients(logits, frozen)
    wide, (expected, _) = divergence_and_gradients(np.float32(logits), np.float32(frozen))
    assert (found.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(found, wide, rtol=1e-6)
    np.testing.assert_allclose(np.float32(gradient), expected, rtol=1e-2, atol=1e-4)


def test_under_vmap_and_for_one_label():
    logits, frozen, weights = draw(0, dtype=np.float32), draw(1, dtype=np.float32), np.float32([[1, 0, 2], [3, 1, 1]])
    found = jax.vmap(lambda a, b, w: kl_divergence(a, b, label_weights=w))(logits, frozen, weights)
    each = closed_form(logits, frozen)[0]
    np.testing.assert_allclose(found, (weights * each).sum(axis=1) / weights.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(divergence(logits[0, 0], frozen[0, 0]), each[0, 0], rtol=1e-5)


def test_close_to_the_frozen_parameters_it_is_half_the_quadratic_form_of_the_fisher():
    with jax.enable_x64(True):
        inputs, params, change = draw(3, (5, 2)), draw(4, (2, 3)), draw(5, (2, 3))

        def output_fn(params, x):
            return jnp.tanh(x @ params) * jnp.arange(1.0, 4.0)

        @jax.jit
        def along(change):
            outputs = [jax.vmap(output_fn, (None, 0))(moved, inputs) for moved in (params + change, params)]
            return kl_divergence(*outputs)

        def quadratic(x):
            jacobian = jax.jacobian(output_fn)(params, x).reshape(3, -1)
            p = jax.nn.softmax(output_fn(params, x))
            direction = jacobian @ change.ravel()
            return direction @ (jnp.diag(p) - jnp.outer(p, p)) @ direction / 2

        found = along(1e-5 * change) / 1e-10
        np.testing.assert_allclose(found, jax.jit(jax.vmap(quadratic))(inputs).mean(), rtol=1e-3)
        diagonal = fisher_diagonal(output_fn, params, inputs)
        alone = np.zeros((2, 3))
        alone[1, 2] = 1e-5
        np.testing.assert_allclose(along(alone) / 1e-10, diagonal[1, 2] / 2, rtol=1e-3)


def test_errors_say_which_shapes_differ():
    with pytest.raises(ValueError, match=r"frozen_logits have shape \(3, 4\), but logits have \(2, 3, 4\)"):
        kl_divergence(draw(0), draw(0)[0])
    with pytest.raises(ValueError, match=r"label_weights have shape \(3,\)"):
        kl_divergence(draw(0), draw(0), label_weights=np.ones(3))
    with pytest.raises(ValueError, match=r"label_weights have shape \(2, 3, 4\)"):
        kl_divergence(draw(0), draw(0), label_weights=np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="two classes or more"):
        kl_divergence(draw(0, (3, 1)), draw(0, (3, 1)))
