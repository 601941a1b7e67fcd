"""The protocols of published tables on MNIST, which `reproduce` runs, and the published accuracies.

Importances that differ from this library's (MAS on batches, the Fisher at the predicted label, ...) are in
`published_importances.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.published_importances import (
    fisher_at_prediction,
    fisher_of_500,
    mas_of_batches,
    mean_of_active,
    scaled_mas,
    squared_batch_gradient,
    sum_of_all,
    unclipped_si,
)
from lifelong_jax import Task, methods, permuted_tasks, split_tasks
from lifelong_jax.datasets import Dataset
from lifelong_jax.methods import Method
from lifelong_jax.models import MLP
from lifelong_jax.types import Example, Params, Scenario


def decades(last: int, first: int = 1, step: int = 1) -> tuple[float, ...]:
    """Makes strengths `step` decades apart, from 10^first to 10^last."""
    return tuple(10.0**decade for decade in range(first, last + 1, step))


class Published(NamedTuple):
    """A published accuracy, in percent.

    Attributes:
      mean: the mean over the source's runs.
      deviation: the number after ±, of the kind that `Protocol.deviation` names.
    """

    mean: float
    deviation: float


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
      every: the number of steps after which a proximal penalty pulls, or None for a coupled penalty.
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
      optimizer: `optimizer(learning_rate)`, which comes after the coupled penalty.
      learning_rate: the step size.
      batch_size: examples per step.
      num_epochs: passes over each task's training data.
      max_steps: the largest number of steps on each task, or None for no limit.
      entries: the methods.
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
    optimizer: Callable[[float], optax.GradientTransformation]
    learning_rate: float
    batch_size: int
    num_epochs: int
    max_steps: int | None
    entries: tuple[Entry, ...]


# --- data and initialisations -----------------------------------------------------------------------------------------


def pad(images: jax.Array) -> jax.Array:
    """Pads 28×28 pixels to 32×32 with zeros."""
    return jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


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
    if method.wrap_optimizer is methods.si().wrap_optimizer:
        return method._replace(carry=lambda fresh, last: fresh._replace(inner_state=last.inner_state))
    return method._replace(carry=lambda fresh, last: last)


def with_importance(importance_fn: Callable, rule: Literal["separate", "latest"], decay: float = 1.0) -> Method:
    """Makes EWC with another importance, which keeps the optimiser's state from task to task."""
    return keeping_optimizer(methods.ewc(rule=rule, decay=decay)._replace(importance_fn=importance_fn))


FINETUNE = keeping_optimizer(methods.finetune())


# --- the rows of the table --------------------------------------------------------------------------------------------

# The source's penalties have no ½, so our strength is twice its coefficient.
HSU = Protocol(
    title="Split MNIST, task-incremental",
    source="Hsu et al. 2018, arXiv 1810.12488, table 2; settings from its code, GT-RIPL/Continual-Learning-Benchmark",
    remark="Images of 32×32, normalised; Adam keeps its state from task to task; penalties without ½.",
    deviation="standard deviation",
    published_runs=10,
    num_seeds=10,
    scenario="task",
    transform=pad_and_normalize,
    make_tasks=in_pairs,
    init_params=uniform_init,
    hidden_sizes=(400, 400),
    optimizer=optax.adam,
    learning_rate=1e-3,
    batch_size=128,
    num_epochs=4,
    max_steps=None,
    entries=(
        Entry("MAS", with_importance(mas_of_batches(128, mean_of_active), "latest"), (2.0,), Published(99.22, 0.21)),
        Entry("Adam alone", FINETUNE, (0.0,), Published(93.46, 2.01)),
    ),
)

ROWS = {
    1: HSU,
    2: HSU._replace(
        title="Split MNIST, task-incremental, others",
        entries=(
            Entry("EWC", with_importance(fisher_at_prediction, "separate"), (200.0,), Published(97.70, 0.81)),
            Entry("online EWC", with_importance(fisher_at_prediction, "latest"), (800.0,), Published(98.04, 1.10)),
            Entry(
                "SI",
                keeping_optimizer(methods.si()._replace(importance_fn=unclipped_si)),
                (600.0,),
                Published(98.56, 0.49),
            ),
            Entry("L2", keeping_optimizer(methods.l2("latest", 0.0)), (0.02,), Published(98.18, 0.96)),
        ),
    ),
    3: Protocol(
        title="Split MNIST, by estimator of the Fisher",
        source="van de Ven 2025, arXiv 2502.11756; settings from its code, GMvandeVen/continual-learning",
        remark="Task-incremental; pairs of classes in random order; 2,000 steps per task; Adam keeps its state; online "
        "EWC. The source chose the best λ of fourteen decades on test data. We chose the best of the powers of ten in "
        "the picture on validation data, from three seeds.",
        deviation="standard error",
        published_runs=30,
        num_seeds=10,
        scenario="task",
        transform=lambda images: images,
        make_tasks=in_random_pairs,
        init_params=uniform_init,
        hidden_sizes=(400, 400),
        optimizer=optax.adam,
        learning_rate=1e-3,
        batch_size=128,
        num_epochs=30,
        max_steps=2000,
        entries=(
            Entry("exact", keeping_optimizer(methods.ewc("exact", "latest")), decades(7), Published(99.12, 0.16)),
            Entry("exact, 500 examples", with_importance(fisher_of_500, "latest"), decades(8), Published(98.93, 0.15)),
            Entry(
                "sampled",
                keeping_optimizer(methods.ewc("sampled", "latest")),
                decades(10) + decades(12, first=12),
                Published(99.12, 0.12),
            ),
            Entry(
                "empirical",
                keeping_optimizer(methods.ewc("empirical", "latest")),
                decades(6) + decades(12, first=8, step=2),
                Published(99.12, 0.12),
            ),
            Entry(
                "batch-squared",
                with_importance(squared_batch_gradient, "latest"),
                decades(14, first=2, step=2),
                Published(99.11, 0.16),
            ),
            Entry("none", FINETUNE, (0.0,), Published(85.41, 0.88)),
        ),
    ),
    4: Protocol(
        title="Permuted MNIST, 10 tasks",
        source="van de Ven and Tolias 2018, arXiv 1809.10635; settings from its code, GMvandeVen/continual-learning",
        remark="Images of 32×32; 5,000 steps per task; Adam keeps its state; the Fisher at the predicted label; online "
        "EWC with γ = 0.9. The source multiplies the importance by γ once more in the penalty; our λ includes that. "
        "kfac is not the source's: EWC with Kronecker factors, exact over all 60,000 examples, with a proximal step "
        "after every 50 steps; we chose its λ on validation data, from one seed. The source's joint training takes "
        "each task's steps on the data of all tasks so far.",
        deviation="standard error",
        published_runs=20,
        num_seeds=3,
        scenario="domain",
        transform=pad,
        make_tasks=permuted(10),
        init_params=uniform_init,
        hidden_sizes=(1000, 1000),
        optimizer=optax.adam,
        learning_rate=1e-4,
        batch_size=128,
        num_epochs=11,
        max_steps=5000,
        entries=(
            Entry("EWC", with_importance(fisher_at_prediction, "separate"), (500.0,), Published(94.31, 0.11)),
            Entry(
                "online EWC",
                with_importance(fisher_at_prediction, "latest", 0.9),
                (900.0,),  # γ · 1000
                Published(94.42, 0.13),
            ),
            Entry("none", FINETUNE, (0.0,), Published(78.51, 0.24)),
            Entry("kfac", keeping_optimizer(methods.kfac()), (3e4, 1e5, 3e5), None, every=50, num_choosing_seeds=1),
            Entry("joint, of the tasks so far", None, (0.0,), Published(97.59, 0.01), so_far=True),
            Entry("joint, of all tasks", None, (0.0,), None),
        ),
    ),
    5: Protocol(
        title="Permuted MNIST, 17 tasks, one pass",
        source="Chaudhry et al. 2019, arXiv 1812.00420; settings from its code, facebookresearch/agem",
        remark="The source's code keeps only the last task's importance, computed on batches of 10 and not scaled. If "
        "it is scaled to [0, 1] and summed over the tasks, MAS forgets far less at the same λ. The source computes the "
        "importance on the 55,000 images that it trains on, we compute it on all 60,000.",
        deviation="standard deviation",
        published_runs=5,
        num_seeds=5,
        scenario="domain",
        transform=lambda images: images,
        make_tasks=permuted(17),
        init_params=truncated_init,
        hidden_sizes=(256, 256),
        optimizer=optax.sgd,
        learning_rate=0.1,
        batch_size=10,
        num_epochs=1,
        max_steps=5500,  # the source trains on 55,000 of the 60,000 examples
        entries=(
            Entry(
                "MAS, of the last task",
                methods.mas("latest", 0.0)._replace(importance_fn=mas_of_batches(10, sum_of_all)),
                (0.2,),
                Published(69.85, 0.93),
            ),
            Entry("none", methods.finetune(), (0.0,), Published(47.95, 1.32), learning_rate=0.03),
            Entry("MAS, scaled and summed", methods.mas()._replace(importance_fn=scaled_mas), (0.2,), None),
        ),
    ),
    6: HSU._replace(
        title="Split MNIST, class-incremental",
        remark="As row 1, but with one output layer: all classes seen so far are candidates.",
        scenario="class",
        entries=(
            Entry(
                "EWC",
                with_importance(fisher_at_prediction, "separate"),
                (1200.0,),
                PublishedRange(19.0, 20.5),
            ),
            Entry(
                "MAS",
                with_importance(mas_of_batches(128, mean_of_active), "latest"),
                (2.0,),
                PublishedRange(19.0, 20.5),
            ),
        ),
    ),
}
