"""Small problems that several test files learn: a network, labelled examples, tasks, optimisers and a recipe.

The data are drawn by NumPy, and put on the device as they are: nothing is compiled.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import Batch, Recipe, Task, add_quadratic_penalty, proximal_quadratic_penalty
from lifelong_jax.continual import SequenceState

NUM_FEATURES, NUM_CLASSES = 6, 3
SGD = optax.sgd(0.1, momentum=0.9)


def apply_fn(params, x):
    """A network of two layers without biases; the logits of one example."""
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def make_params(num_classes=NUM_CLASSES, *, seed=0, dtype=None):
    """The parameters of `apply_fn`, with 8 hidden units."""
    random = np.random.default_rng(seed)
    w1, w2 = random.normal(size=(NUM_FEATURES, 8)), random.normal(size=(8, num_classes))
    return jax.device_put({"w1": np.asarray(w1, dtype), "w2": np.asarray(w2, dtype)})


def make_arrays(num_examples, num_classes=NUM_CLASSES, *, seed=0):
    """Inputs, and labels by a linear rule that is the same for every seed; each class has an example at least."""
    inputs = np.random.default_rng(seed).normal(size=(num_examples, NUM_FEATURES))
    labels = (inputs @ np.random.default_rng(100).normal(size=(NUM_FEATURES, num_classes))).argmax(axis=-1)
    labels[:num_classes] = np.arange(num_classes)
    return inputs, labels


def make_batch(num_examples, num_classes=NUM_CLASSES, *, seed=0):
    """A batch of `make_arrays`, every example with weight 1."""
    return as_batch(*make_arrays(num_examples, num_classes, seed=seed), np.ones(num_examples))


def as_batch(inputs, labels, weights):
    """A batch of NumPy arrays, in the default dtypes."""
    return jax.device_put(Batch(inputs, labels, weights))


def make_tasks(num_tasks=3, num_train=20, num_test=9, num_classes=NUM_CLASSES, *, seed=0):
    """Permuted tasks, which share their examples."""
    train, test = make_batch(num_train, num_classes, seed=1), make_batch(num_test, num_classes, seed=2)
    random = np.random.default_rng(seed)
    return [Task(train, test, jax.device_put(random.permutation(NUM_FEATURES))) for _ in range(num_tasks)]


def make_split_tasks(groups: Sequence[Sequence[int]], num_train=31, num_test=17, num_classes=5):
    """Split tasks, padded with weight 0 where a group has fewer examples than another."""
    parts = []
    for arrays in (make_arrays(num_train, num_classes, seed=1), make_arrays(num_test, num_classes, seed=2)):
        chosen = [np.flatnonzero(np.isin(arrays[1], group)) for group in groups]
        size = max(map(len, chosen))
        padded = [np.pad(indices, (0, size - len(indices)), mode="edge") for indices in chosen]
        weights = [(np.arange(size) < len(indices)).astype(np.float64) for indices in chosen]
        batches = zip(padded, weights, strict=True)
        parts.append([as_batch(arrays[0][indices], arrays[1][indices], weight) for indices, weight in batches])
    masks = [jax.device_put(np.isin(np.arange(num_classes), group)) for group in groups]
    return [Task(train, test, class_mask=mask) for train, test, mask in zip(*parts, masks, strict=True)]


def coupled_sgd(strength):
    """SGD with momentum on loss + penalty."""
    return optax.chain(add_quadratic_penalty(strength), SGD)


def proximal_sgd(strength):
    """SGD, followed by the penalty's proximal step."""
    return optax.chain(optax.sgd(0.1), proximal_quadratic_penalty(0.1, strength))


RECIPE = Recipe(apply_fn, coupled_sgd, num_epochs=2, batch_size=20)


def flat(tree):
    """All entries of a tree, `[num_entries]`, in float64."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def without_times(state: SequenceState) -> SequenceState:
    """A sequence's state without what differs from run to run."""
    return state._replace(training_seconds=0.0, importance_seconds=0.0)
