"""The protocols of published tables on MNIST: what `reproduce` runs, and the accuracies that it sets beside ours.

Where a source's importance is not this library's (a batch-summed MAS, the Fisher at the predicted label, a squared mean
gradient), it is written out here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lifelong_jax import (
    Batch,
    Method,
    Task,
    TrainingState,
    empirical_fisher_diagonal,
    mask_logits,
    mask_outputs,
    methods,
    permuted_tasks,
    split_tasks,
)
from lifelong_jax.datasets import Dataset
from lifelong_jax.models import MLP
from lifelong_jax.tasks import Scenario
from lifelong_jax.types import Example, OutputFn, Params


def decades(last: int, first: int = 1, step: int = 1) -> tuple[float, ...]:
    """Makes strengths `step` decades apart, from 10^first to 10^last."""
    return tuple(10.0**decade for decade in range(first, last + 1, step))


class Published(NamedTuple):
    """An accuracy as a source gives it, in percent.

    Attributes:
      mean: over its runs.
      deviation: what it writes behind ±, of the kind that its protocol says.
    """

    mean: float
    deviation: float


class PublishedRange(NamedTuple):
    """Where sources put an accuracy, in percent.

    Attributes:
      low: at least.
      high: at most.
    """

    low: float
    high: float


class Entry(NamedTuple):
    """A method in a protocol.

    Attributes:
      name: as it stands in tables.
      method: with the source's importance, and the state of the optimiser that it carries over.
      strengths: our λ: one, the source's, or several to choose from on validation data, where the source tuned it.
      published: in percent; None for what is there to explain another entry.
      learning_rate: where the source has one for each method; else the protocol's.
    """

    name: str
    method: Method
    strengths: tuple[float, ...]
    published: Published | PublishedRange | None
    learning_rate: float | None = None


class Protocol(NamedTuple):
    """How a source trains and tests.

    Attributes:
      title: in a few words.
      source: the paper, and what else the settings are from.
      remark: what a reader of the row should know.
      deviation: what ± is, of its runs and so of ours.
      published_runs: how many runs its means are over.
      num_seeds: how many of ours, unless told otherwise.
      scenario: "task", "domain" or "class".
      transform: of the inputs.
      make_tasks: `make_tasks(dataset, key) -> tasks`.
      init_params: `init_params(hidden_sizes, key, x) -> params`.
      hidden_sizes: of the perceptron, with ReLU.
      optimizer: `optimizer(learning_rate)`, what comes behind the coupled penalty.
      learning_rate: its step size.
      batch_size: examples per step.
      num_epochs: passes over each task's training data.
      max_steps: steps of each task, within these epochs; None for all.
      entries: the methods.
      num_choosing_seeds: how many of our runs choose a strength, where an entry has several.
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
    num_choosing_seeds: int = 3


# --- importances that are not the library's ---------------------------------------------------------------------------


def fisher_at_prediction(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    """Computes mean_n g_n², g_n the gradient of −log p at the label that the model finds most likely."""

    def predict(x: jax.Array, class_mask: jax.Array | None) -> jax.Array:
        return jnp.argmax(mask_logits(apply_fn(state.params, x), class_mask), axis=-1)

    labels = jax.lax.map(lambda x: predict(*x), (batch.inputs, batch.class_mask), batch_size=512)
    predicted = batch._replace(labels=labels.astype(batch.labels.dtype))
    return empirical_fisher_diagonal(methods.cross_entropy(apply_fn), state.params, predicted, weights=batch.weights)


def fisher_of_500(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    """Computes the exact Fisher diagonal on 500 of the examples."""
    order = jax.random.permutation(key, len(batch.labels))
    chosen = order[jnp.argsort(batch.weights[order] == 0, stable=True)][:500]
    return methods.ewc("exact").importance_fn(apply_fn, state, jax.tree.map(lambda x: x[chosen], batch), key)


def sum_over_batches(
    of_gradient: Callable[[jax.Array], jax.Array],
    loss_fn: Callable[[Params, Batch], jax.Array],
    params: Params,
    batch: Batch,
    key: jax.Array,
    batch_size: int,
) -> tuple[Params, jax.Array]:
    """Sums `of_gradient(gradient of a batch's loss)` over shuffled batches; returns the sum, and how many there were.

    This is what per-example importances are mistaken for: it depends on the batch size.
    """
    num_batches = -(-len(batch.labels) // batch_size)
    order = jax.random.permutation(key, len(batch.labels))
    order = order[jnp.argsort(batch.weights[order] == 0, stable=True)]  # padding last
    order = jnp.pad(order, (0, num_batches * batch_size - len(order)), constant_values=len(order))

    def add(total: tuple[Params, jax.Array], chosen: jax.Array) -> tuple[tuple[Params, jax.Array], None]:
        part = jax.tree.map(lambda x: x[chosen], batch)
        part = part._replace(weights=jnp.where(chosen < len(batch.labels), part.weights, 0))
        gradient = jax.grad(loss_fn)(params, part)
        summed, count = total
        return (
            jax.tree.map(lambda a, g: a + of_gradient(g), summed, gradient),
            count + part.weights.any().astype(count.dtype),
        ), None

    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    return jax.lax.scan(add, start, order.reshape(num_batches, batch_size))[0]


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Computes a batch's mean over the examples that are no padding."""
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1)


def squared_batch_gradient(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    """Computes the mean, over batches of 128, of the squared gradient of the batch's mean loss: no Fisher diagonal."""

    def loss_fn(params: Params, part: Batch) -> jax.Array:
        losses = jax.vmap(methods.cross_entropy(apply_fn), in_axes=(None, 0))(params, part)
        return weighted_mean(losses, part.weights)

    total, count = sum_over_batches(jnp.square, loss_fn, state.params, batch, key, batch_size=128)
    return jax.tree.map(lambda x: x / count, total)


def mas_of_batches(batch_size: int, over_outputs: Callable[[jax.Array, jax.Array | None], jax.Array]) -> Callable:
    """Makes MAS with the absolute value of a batch's gradient; `over_outputs(squares, class_mask)` sums or averages."""

    def importance_fn(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
        def loss_fn(params: Params, part: Batch) -> jax.Array:
            def squares(x: jax.Array, class_mask: jax.Array | None) -> jax.Array:
                return over_outputs(jnp.square(mask_outputs(apply_fn(params, x), class_mask)), class_mask)

            return weighted_mean(jax.vmap(squares)(part.inputs, part.class_mask), part.weights)

        total, count = sum_over_batches(jnp.abs, loss_fn, state.params, batch, key, batch_size)
        return jax.tree.map(lambda x: x / count, total)

    return importance_fn


def mean_of_active(squares: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    """Averages over the active outputs."""
    return jnp.mean(squares) if class_mask is None else jnp.sum(squares) / jnp.sum(class_mask, dtype=squares.dtype)


def sum_of_all(squares: jax.Array, class_mask: jax.Array | None) -> jax.Array:
    """Sums over the outputs, the inactive ones being 0."""
    return jnp.sum(squares)


def scaled_mas(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    """Computes MAS over batches of 10, scaled so that the smallest importance is 0 and the largest 1."""
    importance = mas_of_batches(10, sum_of_all)(apply_fn, state, batch, key)
    leaves = jax.tree.leaves(importance)
    least, largest = (jnp.stack([f(leaf) for leaf in leaves]) for f in (jnp.min, jnp.max))
    least, largest = least.min(), largest.max()
    return jax.tree.map(lambda x: (x - least) / (largest - least), importance)


def unclipped_si(apply_fn: OutputFn, state: TrainingState, batch: Batch, key: jax.Array) -> Params:
    """Computes Synaptic Intelligence's importance without the maximum with 0: path / (distance² + 0.1)."""
    path = state.opt_state
    return jax.tree.map(lambda w, old, new: w / (jnp.square(new - old) + 0.1), path.path, path.start, state.params)


def keeping_optimizer(method: Method) -> Method:
    """Makes the method that begins each task with the optimiser's state in which the last one ended."""
    if method.wrap_optimizer is methods.si().wrap_optimizer:
        return method._replace(carry=lambda fresh, last: fresh._replace(inner_state=last.inner_state))
    return method._replace(carry=lambda fresh, last: last)


def with_importance(importance_fn: Callable, rule: Literal["separate", "latest"], decay: float = 1.0) -> Method:
    """Makes a method of an importance, for a source that keeps Adam's state from task to task."""
    return keeping_optimizer(methods.ewc(rule=rule, decay=decay)._replace(importance_fn=importance_fn))


# --- data and initialisations -----------------------------------------------------------------------------------------


def pad(images: jax.Array) -> jax.Array:
    """Pads 28×28 pixels to 32×32 with zeros."""
    return jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def pad_and_normalize(images: jax.Array) -> jax.Array:
    """Pads, and normalises by the mean and the deviation that the benchmark has for padded MNIST."""
    return (pad(images) - 0.1) / 0.2752


def in_pairs(dataset: Dataset, key: jax.Array) -> Sequence[Task]:
    """Splits the digits into 0 and 1, 2 and 3, and so on."""
    return split_tasks(dataset.train, dataset.test, np.arange(10).reshape(5, 2).tolist(), 10)


def in_random_pairs(dataset: Dataset, key: jax.Array) -> Sequence[Task]:
    """Splits the digits into five pairs in random order."""
    groups = jax.random.permutation(key, 10).reshape(5, 2).tolist()
    return split_tasks(dataset.train, dataset.test, groups, 10)


def permuted(num_tasks: int) -> Callable[[Dataset, jax.Array], Sequence[Task]]:
    """Makes what permutes pixels anew for each task."""
    return lambda dataset, key: permuted_tasks(dataset.train, dataset.test, num_tasks, key)


def uniform_init(hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    """Draws weights and biases uniformly in ±1/sqrt(inputs of the layer), PyTorch's default for linear layers."""

    def draw(layer: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        bound = 1 / math.sqrt(layer["kernel"].shape[0])
        keys = jax.random.split(key)
        return {
            name: jax.random.uniform(key, layer[name].shape, minval=-bound, maxval=bound)
            for name, key in zip(("kernel", "bias"), keys, strict=True)
        }

    return _of_layers(draw, hidden_sizes, key, x)


def truncated_init(hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    """Draws weights from a normal distribution of deviation 0.1, cut off at two deviations; biases are 0.1."""

    def draw(layer: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        kernel = 0.1 * jax.random.truncated_normal(key, -2, 2, layer["kernel"].shape)
        return {"kernel": kernel, "bias": jnp.full(layer["bias"].shape, 0.1)}

    return _of_layers(draw, hidden_sizes, key, x)


def _of_layers(draw: Callable, hidden_sizes: tuple[int, ...], key: jax.Array, x: Example) -> Params:
    layers = jax.eval_shape(MLP(hidden_sizes, 10).init, key, x)["params"]
    keys = jax.random.split(key, len(layers))
    return {"params": {name: draw(layer, key) for (name, layer), key in zip(layers.items(), keys, strict=True)}}


# --- the table --------------------------------------------------------------------------------------------------------

FINETUNE = keeping_optimizer(methods.finetune())

# Its penalties have no ½: our strength is twice its coefficient.
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
        remark="Task-incremental; pairs of classes in random order; 2,000 steps a task; Adam keeps its state; online "
        "EWC. The source has the best λ of fourteen decades on test data; ours is the best on validation data, of the "
        "powers of ten in the picture, from three seeds.",
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
        remark="Images of 32×32; 5,000 steps a task; Adam keeps its state; the Fisher at the predicted label; online "
        "EWC with γ = 0.9, which multiplies the importance once more where the source uses it.",
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
        ),
    ),
    5: Protocol(
        title="Permuted MNIST, 17 tasks, one pass",
        source="Chaudhry et al. 2019, arXiv 1812.00420; settings from its code, facebookresearch/agem",
        remark="The source's code keeps the last task's importance alone, of batches of 10, as it is. Scaled to [0, 1] "
        "and summed over the tasks, at the same λ, MAS remembers far more. The source's importance is of the 55,000 "
        "images that it trains on, ours of all 60,000.",
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
        max_steps=5500,  # it holds 5,000 of the 60,000 examples back
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
        remark="As row 1; one output layer, and all classes so far are candidates.",
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
