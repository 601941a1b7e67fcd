"""The models of `solution_space`, and the two tasks of each."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import Batch, permuted_tasks
from lifelong_jax.datasets import load_dataset
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import MLP, init_network
from lifelong_jax.scenarios import joint_examples
from lifelong_jax.types import LogitsFn, LossFn, Params

NUM_IMAGES = 140  # drawn from the 280 or so images of two digits


class Case(NamedTuple):
    """A model and two tasks for it.

    Attributes:
      name: the model's name.
      is_plane: whether the model has two parameters, so that its whole space is a plane.
      axes: the names of the axes of its planes.
      init_params: `init_params(key) -> params`.
      make_tasks: `make_tasks(key) -> (task A, task B)`, training examples.
      loss_fn: `loss_fn(params, example) -> scalar`.
      output_fn: `output_fn(params, x) -> output`.
      likelihood: of the labels, given the output, for the Fisher.
      learning_rate: of plain SGD.
    """

    name: str
    is_plane: bool
    axes: tuple[str, str]
    init_params: Callable[[jax.Array], Params]
    make_tasks: Callable[[jax.Array], tuple[Batch, Batch]]
    loss_fn: LossFn
    output_fn: LogitsFn
    likelihood: Literal["categorical", "gaussian"]
    learning_rate: float


def two_parameters(learning_rate: float) -> Case:
    """Makes the linear model: two measurements of an image, two weights, and the squared error from a label of ±1."""
    train = load_dataset("digits").train
    images = np.asarray(train.inputs[..., 0])
    patch = functools.partial(np.mean, axis=(1, 2))
    slant = patch(images[:, 2:4, 4:6]) - patch(images[:, 4:6, 2:4])  # ink at the upper right minus lower left
    bottom = patch(images[:, 6:8])  # ink in the two bottom rows
    measured = jnp.asarray(np.stack([slant, bottom - bottom.mean()], axis=-1))

    def some_of(one: int, other: int, key: jax.Array) -> Batch:
        (both,) = np.nonzero(np.isin(train.labels, (one, other)))
        chosen = jax.random.permutation(key, jnp.asarray(both))[:NUM_IMAGES]
        return Batch(measured[chosen], (train.labels[chosen] == other).astype(jnp.int32), train.weights[chosen])

    def output_fn(params: Params, x: jax.Array) -> jax.Array:
        return x @ params

    def loss_fn(params: Params, example: Batch) -> jax.Array:
        return (output_fn(params, example.inputs) - jnp.where(example.labels == 1, 1.0, -1.0)) ** 2 / 2

    return Case(
        "two parameters",
        True,
        ("weight of the slant", "weight of the ink below"),
        lambda key: jax.random.normal(key, (2,)),
        lambda key: (some_of(6, 9, jax.random.fold_in(key, 0)), some_of(2, 7, jax.random.fold_in(key, 1))),
        loss_fn,
        output_fn,
        "gaussian",
        learning_rate,
    )


def network(hidden_sizes: tuple[int, ...], learning_rate: float) -> Case:
    """Makes the network that learns two permuted tasks of digits."""
    dataset = load_dataset("digits")
    model = MLP(hidden_sizes, dataset.num_classes)

    def make_tasks(key: jax.Array) -> tuple[Batch, Batch]:
        return tuple(joint_examples([task], "domain") for task in permuted_tasks(dataset.train, dataset.test, 2, key))

    return Case(
        "network",
        False,
        ("distance", "distance in the plane"),
        lambda key: init_network(model, key, dataset.train.inputs[0]),
        make_tasks,
        cross_entropy(model.apply),
        model.apply,
        "categorical",
        learning_rate,
    )
