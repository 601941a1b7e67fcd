"""Two small classifiers with their data, and what tests compute from single examples of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 7, 3, 4


def linear(params, x):
    return x @ params["w"] + params["b"]


def mlp(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def cross_entropy(logits_fn, params, example):
    x, label = example
    return -jax.nn.log_softmax(logits_fn(params, x))[label]


@functools.cache
def loss_of(logits_fn):
    return functools.partial(cross_entropy, logits_fn)


def make_data(dtype=jnp.float32, num_examples=NUM_EXAMPLES):
    """Inputs and labels, drawn by NumPy; nothing is compiled."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(num_examples, NUM_FEATURES))
    return jax.device_put((inputs.astype(dtype), random.integers(0, NUM_CLASSES, num_examples).astype(np.int32)))


def make_mlp(dtype=jnp.float32):
    random = np.random.default_rng(1)
    shapes = {"w1": (NUM_FEATURES, 5), "b1": (5,), "w2": (5, NUM_CLASSES)}
    return jax.device_put({name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()})


def make_linear(dtype=jnp.float32):
    random = np.random.default_rng(2)
    shapes = {"w": (NUM_FEATURES, NUM_CLASSES), "b": (NUM_CLASSES,)}
    return jax.device_put({name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()})


def one_by_one(quantity, params, examples):
    """`quantity(params, example)` of one example after the other."""
    return jax.lax.map(lambda example: quantity(params, example), examples)


def squared(tree):
    return jax.tree.map(lambda g: g**2, tree)


def weighted_sum(weights, trees):
    """Of trees whose leaves have a leading axis."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), trees)


def relative_distance(ours, theirs):
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
