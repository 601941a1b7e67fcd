"""What a published protocol on MNIST consists of: its data, initialisation, pipeline and methods."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import (
    Task,
    add_quadratic_penalty,
    methods,
    permuted_tasks,
    proximal_quadratic_penalty,
    split_tasks,
)
from lifelong_jax.datasets import Dataset
from lifelong_jax.methods import Method
from lifelong_jax.models import MLP
from lifelong_jax.types import Example, Params, Scenario


class Published(NamedTuple):
    """A published accuracy, in percent.

    Attributes:
      mean: the mean over the source's runs.
      deviation: the number after ±, of the kind that `Protocol.deviation` names; NaN for a single run.
    """

    mean: float
    deviation: float = math.nan


class PublishedRange(NamedTuple):
    """A range of published accuracies, in percent.

    Attributes:
      low: the lowest.
      high: the highest.
    """

    low: float
    high: float


class Entry(NamedTuple):
    """A method in a protocol.

    Attributes:
      name: the name in tables.
      method: the method, with the source's importance and its treatment of the optimiser's state; None for joint
        training.
      strengths: our λ: the source's, or several to choose from on validation data, where the source tuned it.
      published: the published accuracy, or None for an entry that explains another one.
      learning_rate: the method's own step size, or None for the protocol's.
      every: the number of steps after which a proximal penalty pulls; None for the pipeline's own penalty.
      num_choosing_seeds: the number of seeds from which the strength is chosen.
      so_far: for joint training, whether each task's steps are on the data of all tasks so far, as if none had to be
        forgotten, and not on those of all tasks.
    """

    name: str
    method: Method | None
    strengths: tuple[float, ...]
    published: Published | PublishedRange | None
    learning_rate: float | None = None
    every: int | None = None
    num_choosing_seeds: int = 3
    so_far: bool = False


Pipeline: TypeAlias = Callable[[optax.ScalarOrSchedule, float, int | None], optax.GradientTransformation]


def constant(learning_rate: float, num_steps: int) -> float:
    """Returns the learning rate."""
    return learning_rate


class Protocol(NamedTuple):
    """How a source trains and tests.

    Attributes:
      title: a title of a few words.
      source: the paper, and where else the settings are from.
      remark: a remark for readers of the table.
      deviation: the meaning of ±, for the source's runs and ours.
      published_runs: the number of the source's runs.
      num_seeds: the default number of our runs.
      scenario: "task", "domain" or "class".
      transform: `transform(images) -> inputs`.
      make_tasks: `make_tasks(dataset, key) -> tasks`.
      init_params: `init_params(hidden_sizes, key, x) -> params`.
      hidden_sizes: the widths of the multilayer perceptron's hidden layers.
      pipeline: `pipeline(step_size, strength, every)`, the optimiser with its penalty; see `Entry.every`.
      learning_rate: the step size, or the largest one of a schedule.
      batch_size: examples per step.
      num_epochs: passes over each task's training data.
      max_steps: the largest number of steps on each task, or None for no limit.
      entries: the methods.
      schedule: `schedule(learning_rate, num_steps)`, the step size in a task of so many steps.
      dropout: the share of each hidden layer's outputs that are set to 0 in training.
      choosing_steps: like `max_steps`, where a strength is chosen; None for `max_steps`.
    """

    title: str
    source: str
    remark: str
    deviation: Literal["standard deviation", "standard error"]
    published_runs: int
    num_seeds: int
    scenario: Scenario
    transform: Callable[[jax.Array], jax.Array]
    make_tasks: Callable[[Dataset, jax.Array], Sequence[Task]]
    init_params: Callable[[tuple[int, ...], jax.Array, Example], Params]
    hidden_sizes: tuple[int, ...]
    pipeline: Pipeline
    learning_rate: float
    batch_size: int
    num_epochs: int
    max_steps: int | None
    entries: tuple[Entry, ...]
    schedule: Callable[[float, int], optax.ScalarOrSchedule] = constant
    dropout: float = 0.0
    choosing_steps: int | None = None


# --- pipelines --------------------------------------------------------------------------------------------------------


def with_penalty(optimizer: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]) -> Pipeline:
    """Makes a pipeline, by default as all sources do: the penalty is part of the loss."""

    def pipeline(step_size: optax.ScalarOrSchedule, strength: float, every: int | None) -> optax.GradientTransformation:
        if every is None:
            return optax.chain(add_quadratic_penalty(strength), optimizer(step_size))
        return optax.chain(optimizer(step_size), proximal_quadratic_penalty(step_size, strength, every))

    return pipeline


# --- data and initialisations -----------------------------------------------------------------------------------------


def pad(images: jax.Array) -> jax.Array:
    """Pads 28×28 pixels to 32×32 with zeros."""
    return jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def normalize(images: jax.Array) -> jax.Array:
    """Normalises by the mean and the standard deviation of MNIST."""
    return (images - 0.1307) / 0.3081


def pad_and_normalize(images: jax.Array) -> jax.Array:
    """Pads, and normalises by the mean and the standard deviation of Hsu et al. for padded MNIST."""
    return (pad(images) - 0.1) / 0.2752


def in_pairs(dataset: Dataset, key: jax.Array) -> Sequence[Task]:
    """Splits the digits into pairs: 0 and 1, 2 and 3, and so on."""
    return split_tasks(dataset.train, dataset.test, np.arange(10).reshape(5, 2).tolist(), 10)


def in_random_pairs(dataset: Dataset, key: jax.Array) -> Sequence[Task]:
    """Splits the digits into five pairs in random order."""
    groups = jax.random.permutation(key, 10).reshape(5, 2).tolist()
    return split_tasks(dataset.train, dataset.test, groups, 10)


def permuted(num_tasks: int) -> Callable[[Dataset, jax.Array], Sequence[Task]]:
    """Makes a `make_tasks` of permuted tasks."""
    return lambda dataset, key: permuted_tasks(dataset.train, dataset.test, num_tasks, key)


def uniform_init(hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    """Draws weights and biases uniformly in ±1/√(number of inputs), PyTorch's default for linear layers."""

    def draw(layer: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        bound = 1 / math.sqrt(layer["kernel"].shape[0])
        keys = jax.random.split(key)
        return {
            name: jax.random.uniform(key, layer[name].shape, minval=-bound, maxval=bound)
            for name, key in zip(("kernel", "bias"), keys, strict=True)
        }

    return _of_layers(draw, hidden_sizes, key, x)


def glorot_init(hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    """Draws weights uniformly in ±√(6 / (inputs + outputs)), the default of Keras; biases are 0."""

    def draw(layer: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        kernel = jax.nn.initializers.glorot_uniform()(key, layer["kernel"].shape)
        return {"kernel": kernel, "bias": jnp.zeros(layer["bias"].shape)}

    return _of_layers(draw, hidden_sizes, key, x)


def truncated_init(hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    """Draws weights from a normal distribution of deviation 0.1, truncated at two deviations; biases are 0.1."""

    def draw(layer: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        kernel = 0.1 * jax.random.truncated_normal(key, -2, 2, layer["kernel"].shape)
        return {"kernel": kernel, "bias": jnp.full(layer["bias"].shape, 0.1)}

    return _of_layers(draw, hidden_sizes, key, x)


def _of_layers(draw: Callable, hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    layers = jax.eval_shape(MLP(hidden_sizes, 10).init, key, x)["params"]
    keys = jax.random.split(key, len(layers))
    return {"params": {name: draw(layer, key) for (name, layer), key in zip(layers.items(), keys, strict=True)}}


# --- methods ----------------------------------------------------------------------------------------------------------


def keeping_optimizer(method: Method) -> Method:
    """Makes a method that keeps the optimiser's state from task to task."""
    if method.wrap_optimizer is None:
        return method._replace(carry=lambda fresh, last: last)
    carry = method.carry or (lambda fresh, last: fresh)
    return method._replace(carry=lambda fresh, last: carry(fresh, last)._replace(inner_state=last.inner_state))


def with_importance(importance_fn: Callable, rule: Literal["separate", "latest"], decay: float = 1.0) -> Method:
    """Makes EWC with another importance, which keeps the optimiser's state from task to task."""
    return keeping_optimizer(methods.ewc(rule=rule, decay=decay)._replace(importance_fn=importance_fn))


class MeanImportanceState(NamedTuple):
    """The state of `of_mean_importance`.

    Attributes:
      num_tasks: the number of tasks learned.
      inner_state: the wrapped optimiser's state.
    """

    num_tasks: jax.Array
    inner_state: optax.OptState


def of_mean_importance(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser whose penalty is to have the mean of the tasks' importances, where it gets their sum."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update_fn(
        updates: optax.Updates, state: MeanImportanceState, params: Params, *, importance: Params, **others: Any
    ) -> tuple[optax.Updates, MeanImportanceState]:
        mean = jax.tree.map(lambda total: total / jnp.maximum(state.num_tasks, 1), importance)
        updates, inner = optimizer.update(updates, state.inner_state, params, importance=mean, **others)
        return updates, state._replace(inner_state=inner)

    return optax.GradientTransformationExtraArgs(
        lambda params: MeanImportanceState(jnp.zeros((), jnp.int32), optimizer.init(params)), update_fn
    )


def averaging_importance(method: Method) -> Method:
    """Makes a method around the latest parameters whose importance is the mean over tasks, not the sum."""
    return method._replace(
        wrap_optimizer=of_mean_importance, carry=lambda fresh, last: fresh._replace(num_tasks=last.num_tasks + 1)
    )


FINETUNE = keeping_optimizer(methods.finetune())
