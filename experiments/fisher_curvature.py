"""Is the loss's curvature about N times the Fisher information? Exact matrices of a small network during training.

At several epochs, on training and on held-out data, this study computes three matrices, each divided by N:

- the Hessian H of −log p(D given θ),
- the true Fisher F, in expectation over the labels that the model predicts,
- the empirical Fisher E, at the labels of the data.

It measures how far F and E are from H, and how large E is compared with F. It also measures how much of F is left in
what a penalty can keep of it: the diagonal, as EWC does, or Kronecker factors of each leaf's block.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
from jax.flatten_util import ravel_pytree

from experiments.harness.report import estimate, format_estimate, progress_bar, report_tables
from experiments.harness.runs import Run, compute_once, open_run
from experiments.harness.settings import RunSettings, Seeds, check_settings, parse_settings
from lifelong_jax import Batch, TrainingState, forms, init_consolidation, init_training, kronecker_fisher, learn_task
from lifelong_jax.datasets import hold_out_validation, load_dataset
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import MLP, init_network
from lifelong_jax.tasks import with_permutation
from lifelong_jax.types import Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("training", "held-out")
KEPT = {"diagonal": "diagonal", "kronecker": "Kronecker factors", "leaves": "leaf blocks", "layers": "layer blocks"}
"""What is kept of F, and what it is called. The Kronecker factors of a leaf approximate its block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Compare the exact Hessian, the true Fisher and the empirical Fisher of a small network during training."""

    hidden_sizes: tuple[int, ...] = (16,)
    """Widths of the hidden layers. The inputs are digits of 4×4 pixels. Memory grows with the square of the number of
    parameters."""

    activations: tuple[Literal["relu", "tanh"], ...] = ("relu", "tanh")
    """Activation functions of the hidden layers. Each gives a network of its own."""

    epochs: tuple[int, ...] = (0, 1, 3, 10, 30, 100, 300, 1000)
    """The matrices are computed after these numbers of passes over the training data, in ascending order."""

    batch_size: int = 64
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of Adam."""

    seeds: Seeds = (0, 1, 2)
    """Each seed sets the initial parameters and the order of the examples."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        check_settings(
            positive={name: getattr(self, name) for name in ("hidden_sizes", "batch_size", "learning_rate")},
            not_negative={"epochs": self.epochs},
            distinct={name: getattr(self, name) for name in ("activations", "seeds", "epochs")},
        )
        if list(self.epochs) != sorted(self.epochs):
            raise ValueError(f"epochs must be ascending, not {self.epochs}.")


class Measured(NamedTuple):
    """Measurements at one epoch on one part of the data. Norms are Frobenius norms.

    Attributes:
      accuracy: a fraction.
      loss: the mean, in nats.
      true_error: ‖H − F‖ / ‖H‖.
      empirical_error: ‖H − E‖ / ‖H‖.
      true_diagonal_error: the same for the diagonals of H and F.
      empirical_diagonal_error: the same for the diagonals of H and E.
      true_size: tr F / tr H.
      empirical_size: tr E / tr F.
      error_of_diagonal: ‖F − X‖ / ‖F‖, with X the diagonal of F.
      error_of_kronecker: the same with X the Kronecker factors of each leaf.
      error_of_leaves: the same with X the blocks of F, one for each leaf: a layer's weights, or its biases.
      error_of_layers: the same with X the blocks of F, one for each layer: its weights with its biases.
      along_step_diagonal: dᵀ X d / dᵀ F d, with d the first step of another task: the same images, their pixels
        permuted.
      along_step_kronecker: the same.
      along_step_leaves: the same.
      along_step_layers: the same.
    """

    accuracy: float
    loss: float
    true_error: float
    empirical_error: float
    true_diagonal_error: float
    empirical_diagonal_error: float
    true_size: float
    empirical_size: float
    error_of_diagonal: float
    error_of_kronecker: float
    error_of_leaves: float
    error_of_layers: float
    along_step_diagonal: float
    along_step_kronecker: float
    along_step_leaves: float
    along_step_layers: float


class PerExample(NamedTuple):
    """How large the Fishers of single training examples are.

    Attributes:
      doubt: 1 − p(label), `[num_examples]`. Examples below 1e-6 are left out, because float32 is too coarse for them.
      ratio: tr E / tr F of each example, `[num_examples]`.
    """

    doubt: np.ndarray
    ratio: np.ndarray


def main(config: Config) -> None:
    """Runs the study."""
    console = rich.console.Console()
    data = load_small_digits()
    with open_run(config, "fisher_curvature", console, [data]) as run:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in config.activations}
        with progress_bar(console) as bar:
            line = bar.add_task("", total=len(config.activations) * len(config.seeds), status="")
            for activation in config.activations:
                for seed in config.seeds:
                    at = functools.partial(bar.update, line, description=activation)
                    function = functools.partial(measure_seed, config, activation, data, seed, at)
                    of_seed = compute_once(run, f"{activation}, seed {seed}", function)
                    for index, epoch in enumerate(config.epochs):
                        at_epoch = jax.tree.map(lambda values, index=index: values[index], of_seed["measured"])
                        run.log_once(activation=activation, seed=seed, epoch=epoch, **at_epoch)
                    measured[activation].append(of_seed)
                    bar.advance(line)
        values = {
            activation: jax.tree.map(lambda *seeds: np.stack(seeds), *(of_seed["measured"] for of_seed in seeds))
            for activation, seeds in measured.items()
        }
        each = [of_seed["examples"] for seeds in measured.values() for of_seed in seeds]
        examples = PerExample(*(np.concatenate([one[field] for one in each]) for field in PerExample._fields))
        report(config, values, examples, run, console)
        draw(config, values, examples, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def load_small_digits() -> dict[str, Batch]:
    """Loads the digits, averaged to 4×4 pixels, as training and held-out data of equal size."""
    dataset = hold_out_validation(load_dataset("digits"), 0.5, jax.random.key(0))
    size = dataset.test.labels.size

    def shrink(batch: Batch) -> Batch:
        inputs = np.asarray(batch.inputs).reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
        return Batch(*(jnp.asarray(np.asarray(leaf)[:size]) for leaf in (inputs, batch.labels, batch.weights)))

    return {"training": shrink(dataset.train), "held-out": shrink(dataset.test)}


def make_model(config: Config, activation: str) -> MLP:
    """Makes the network."""
    return MLP(config.hidden_sizes, num_outputs=10, activation=activation)


def train(config: Config, activation: str, data: Mapping[str, Batch], seed: int) -> Iterator[Params]:
    """Trains a network, and yields its parameters at each of the epochs."""
    params_key, key = jax.random.split(jax.random.key(seed))
    params = init_network(make_model(config, "relu"), params_key, data["training"].inputs[0])
    state = init_training(optax.adam(config.learning_rate), params, key)
    for earlier, later in itertools.pairwise((0, *config.epochs)):
        state = learn(config, activation, state, data["training"], later - earlier)
        yield state.params


@functools.partial(jax.jit, static_argnames=("config", "activation"))
def learn(config: Config, activation: str, state: TrainingState, batch: Batch, num_epochs: jax.Array) -> TrainingState:
    """Continues training for some epochs."""
    loss_fn = cross_entropy(make_model(config, activation).apply)
    optimizer = optax.adam(config.learning_rate)
    none = init_consolidation(state.params)

    def epoch(_: int, state: TrainingState) -> TrainingState:
        return learn_task(loss_fn, optimizer, state, none, batch, num_epochs=1, batch_size=config.batch_size)[0]

    return jax.lax.fori_loop(0, num_epochs, epoch, state)


def measure_seed(
    config: Config, activation: str, data: Mapping[str, Batch], seed: int, show: Callable[..., None]
) -> dict[str, Any]:
    """Trains a network and measures it at each epoch.

    Returns:
      `measured`: for each part of the data a `Measured` of arrays `[num_epochs]`; `examples`: a `PerExample` of the
      training data at all epochs.
    """
    measured, examples = [], []
    for epoch, params in zip(config.epochs, train(config, activation, data, seed), strict=True):
        show(status=f"seed {seed}, epoch {epoch}")
        of_parts = measure(make_model(config, activation), params, data, jax.random.key(seed))
        measured.append({part: numbers for part, (numbers, _) in of_parts.items()})
        examples.append(of_parts["training"][1])
    return {
        "measured": jax.tree.map(lambda *epochs: np.array(epochs), *measured),
        "examples": PerExample(*map(np.concatenate, zip(*examples, strict=True))),
    }


def measure(
    model: MLP, params: Params, data: Mapping[str, Batch], key: jax.Array
) -> dict[str, tuple[Measured, PerExample]]:
    """Compares the matrices on both parts of the data."""
    step = np.asarray(first_step(model, params, data["training"], key), np.float64)
    results = {}
    for part, batch in data.items():
        found = {name: np.asarray(value, np.float64) for name, value in matrices(model, params, batch).items()}
        hessian, true, empirical = found["hessian"], found["true"], found["empirical"]
        kept = kept_of(true, found["kronecker"], params)
        numbers = Measured(
            accuracy=float(found["correct"].mean()),
            loss=float(found["loss"]),
            true_error=relative_error(true, hessian),
            empirical_error=relative_error(empirical, hessian),
            true_diagonal_error=relative_error(np.diag(true), np.diag(hessian)),
            empirical_diagonal_error=relative_error(np.diag(empirical), np.diag(hessian)),
            true_size=float(np.trace(true) / np.trace(hessian)),
            empirical_size=float(np.trace(empirical) / np.trace(true)),
            **{f"error_of_{name}": relative_error(kept[name], true) for name in KEPT},
            **{f"along_step_{name}": float(step @ kept[name] @ step / (step @ true @ step)) for name in KEPT},
        )
        measurable = found["doubt"] > 1e-6  # below this, rounding errors dominate
        ratio = found["empirical_trace"][measurable] / found["true_trace"][measurable]
        results[part] = numbers, PerExample(found["doubt"][measurable], ratio)
    return results


@functools.partial(jax.jit, static_argnames=("model",))
def first_step(model: MLP, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """Computes the gradient of the loss on another task: the same images, their pixels permuted."""
    permutation = jax.random.permutation(key, batch.inputs[0].size)
    loss_fn = cross_entropy(with_permutation(model.apply, permutation))
    gradient = jax.grad(lambda params: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)))(params)
    return ravel_pytree(gradient)[0]


def relative_error(approximation: np.ndarray, exact: np.ndarray) -> float:
    """Computes ‖exact − approximation‖ / ‖exact‖."""
    return float(np.linalg.norm(exact - approximation) / np.linalg.norm(exact))


def kept_of(true: np.ndarray, kronecker: np.ndarray, params: Params) -> dict[str, np.ndarray]:
    """Returns the matrices of `KEPT`, `[num_params, num_params]`, from the true Fisher and its Kronecker factors."""
    leaves = jax.tree.leaves_with_path(params)

    def blocks(depth: int | None) -> np.ndarray:
        names = [jax.tree_util.keystr(path[:depth]) for path, leaf in leaves for _ in range(leaf.size)]
        _, block_of = np.unique(names, return_inverse=True)
        return np.where(block_of[:, None] == block_of, true, 0)

    diagonal = np.diag(np.diag(true))
    return {"diagonal": diagonal, "kronecker": kronecker, "leaves": blocks(None), "layers": blocks(-1)}


def dense(importance: Params) -> jax.Array:
    """Writes the forms of an importance into one matrix, `[num_params, num_params]`, in the order of its leaves."""

    def block(form: forms.Form) -> jax.Array:
        units = jnp.eye(math.prod(form.shape), dtype=form.dtype)
        return jax.vmap(lambda unit: forms.times(form, unit.reshape(form.shape)).ravel())(units)

    return jax.scipy.linalg.block_diag(*map(block, jax.tree.leaves(importance, is_leaf=forms.is_form)))


@functools.partial(jax.jit, static_argnames=("model",))
def matrices(model: MLP, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Computes the Hessian of the mean loss, both Fishers and F's Kronecker factors, `[num_params, num_params]`.

    With J_n the Jacobian of example n's logits, and s_nc = e_c − p_n the gradient of log p(c) at the logits:

        F = mean_n Σ_c p_nc (J_nᵀ s_nc) (J_nᵀ s_nc)ᵀ        E = mean_n (J_nᵀ s_ny) (J_nᵀ s_ny)ᵀ

    Returns:
      The matrices and the mean loss, and for each example whether it is classified correctly, the doubt 1 − p(label)
      and the traces of both Fishers.
    """
    flat, unravel = ravel_pytree(params)
    num_examples = batch.labels.size

    def logits_fn(flat: jax.Array, x: jax.Array) -> jax.Array:
        return model.apply(unravel(flat), x)

    def mean_loss(flat: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(cross_entropy(logits_fn), in_axes=(None, 0))(flat, batch))

    logits = jax.vmap(logits_fn, in_axes=(None, 0))(flat, batch.inputs)
    jacobians = jax.vmap(jax.jacrev(logits_fn), in_axes=(None, 0))(flat, batch.inputs)
    probabilities = jax.nn.softmax(logits)
    scores = jacobians - jnp.einsum("nc,ncp->np", probabilities, jacobians)[:, None]
    weighted = (jnp.sqrt(probabilities)[..., None] * scores).reshape(-1, flat.size)
    of_label = jacobians[jnp.arange(num_examples), batch.labels][:, None]
    # The gradient of log p(label). Unlike `scores` at the label, it has no cancellation where p(label) is nearly 1.
    label_scores = jnp.einsum("nc,ncp->np", probabilities, of_label - jacobians)
    is_other = jnp.arange(logits.shape[-1]) != batch.labels[:, None]
    return {
        "hessian": jax.hessian(mean_loss)(flat),
        "true": weighted.T @ weighted / num_examples,
        "empirical": label_scores.T @ label_scores / num_examples,
        "kronecker": dense(kronecker_fisher(model.apply, params, batch.inputs)),
        "loss": mean_loss(flat),
        "correct": jnp.argmax(logits, axis=-1) == batch.labels,
        "doubt": jnp.sum(jnp.where(is_other, probabilities, 0), axis=-1),
        "true_trace": jnp.sum(weighted.reshape(num_examples, -1) ** 2, axis=-1),
        "empirical_trace": jnp.sum(label_scores**2, axis=-1),
    }


def report(
    config: Config,
    values: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    examples: PerExample,
    run: Run,
    console: rich.console.Console,
) -> None:
    """Prints the table; writes `summary.json` and `table.md`."""
    summary = {
        activation: {
            part: {field: [estimate(column) for column in array.T] for field, array in fields.items()}
            for part, fields in parts.items()
        }
        for activation, parts in values.items()
    }
    # With S = Σ_c p_c ‖J_y − J_c‖², tr F = S − tr E exactly, and tr E ≤ doubt · S by Jensen's inequality.
    bound = examples.doubt / (1 - examples.doubt)
    sure = examples.doubt < 0.01
    of_examples = {
        "within_bound": float(np.mean(examples.ratio <= 1.001 * bound)),
        "sure": float(sure.mean()),
        "median_ratio_where_sure": float(np.median(examples.ratio[sure])) if sure.any() else math.nan,
    }
    run.write_summary({"epochs": config.epochs, "measured": summary, "examples": of_examples})
    tables = {
        "The Hessian H, the true Fisher F and the empirical Fisher E; errors relative to H, Frobenius norm": {
            "error of F, %": ("true_error", 100, 0),
            "error of E, %": ("empirical_error", 100, 0),
            "tr E / tr F": ("empirical_size", 1, 2),
            "diagonal error of F, %": ("true_diagonal_error", 100, 1),
        },
        "What is kept of F: errors relative to F, Frobenius norm, and how much of F along B's first step": {
            **{f"error of {name}, %": (f"error_of_{field}", 100, 0) for field, name in KEPT.items()},
            **{f"{KEPT[field]} along B, %": (f"along_step_{field}", 100, 0) for field in ("diagonal", "kronecker")},
        },
    }
    in_table = sorted({0, len(config.epochs) // 2, len(config.epochs) - 1})
    written = {}
    for title, columns in tables.items():
        written[title] = [["data", "epoch", *columns]]
        written[title] += [
            [
                f"{activation}, {part}",
                str(config.epochs[index]),
                *(format_estimate(summary[activation][part][field][index], *form) for field, *form in columns.values()),
            ]
            for activation in config.activations
            for part in PARTS
            for index in in_table
        ]
    report_tables(written, run, console)


def draw(
    config: Config, values: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], examples: PerExample, run: Run
) -> None:
    """Draws `fisher_curvature.png`."""
    from lifelong_jax.plotting import COLORS, draw_over_seeds, make_figure  # here, as matplotlib is slow to import

    epochs = np.array(config.epochs)

    def off(name: str) -> str:
        errors = {f"{100 * values[each]['training'][name][:, -1].mean():.0f}" for each in config.activations}
        return "–".join(sorted(errors, key=float))

    errors = f"the true Fisher is {off('true_error')} % off the Hessian, the empirical {off('empirical_error')} %"
    figure = make_figure(8.6, 6.8, f"After {epochs[-1]} epochs {errors}")
    axes = figure.subplot_mosaic([["error"] * 2 + ["size"] * 2 + ["ratio"] * 2, ["kept"] * 3 + ["step"] * 3])
    error, size, ratio, kept, step = (axes[name] for name in ("error", "size", "ratio", "kept", "step"))
    for axis in (error, size, kept, step):
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlabel("epochs")
    for activation, style in zip(config.activations, ("-", "--"), strict=False):
        training, held_out = (values[activation][part] for part in PARTS)
        options = {"linestyle": style, "marker": "o", "markersize": 3}
        draw_over_seeds(error, epochs, training["empirical_error"], COLORS[1], f"empirical, {activation}", **options)
        draw_over_seeds(error, epochs, training["true_error"], COLORS[0], f"true, {activation}", **options)
        draw_over_seeds(size, epochs, held_out["empirical_size"], COLORS[3], f"held-out data, {activation}", **options)
        draw_over_seeds(size, epochs, training["empirical_size"], COLORS[1], f"training data, {activation}", **options)
    draw_kept(config, values, kept, step)
    figure.legend(*kept.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for axis in (error, size):
        axis.legend(frameon=False, fontsize=9)
    error.set(yscale="log", ylabel="relative error to the Hessian", title="distance to the Hessian", ylim=(6e-4, 1.5))
    size.set(yscale="log", ylabel="trace, empirical / true", title="size of the empirical Fisher")
    size.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    drawn = np.random.default_rng(0).permutation(examples.doubt.size)[:3000]
    ratio.plot(examples.doubt[drawn], examples.ratio[drawn], ".", color=COLORS[4], markersize=2)
    doubt = 1 / (1 + np.geomspace(1e6, 1e-4))
    ratio.plot(doubt, doubt / (1 - doubt), color="black", linewidth=1, label="bound, ε / (1 − ε)")
    ratio.set(xscale="log", yscale="log", xlabel="doubt ε = 1 − p(label)", ylabel="trace, empirical / true")
    ratio.set(title="each example, all epochs", ylim=(1e-7, 1e3))
    ratio.legend(frameon=False, fontsize=9)
    for axis in axes.values():
        axis.title.set_fontsize(11)
    figure.savefig(run.folder / "fisher_curvature.png")


def draw_kept(
    config: Config, values: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], error: "Axes", step: "Axes"
) -> None:
    """Draws how far what is kept of F is from it, and how much of F it has along another task's first step."""
    from lifelong_jax.plotting import COLORS, draw_over_seeds

    for (field, name), color in zip(KEPT.items(), (COLORS[1], COLORS[0], COLORS[6], COLORS[2]), strict=True):
        for activation, style in zip(config.activations, ("-", "--"), strict=False):
            training = values[activation]["training"]
            options = {"label": f"{name}, {activation}", "linestyle": style, "marker": "o", "markersize": 3}
            draw_over_seeds(error, config.epochs, training[f"error_of_{field}"], color, **options)
            draw_over_seeds(step, config.epochs, training[f"along_step_{field}"], color, **options)
    error.set(ylim=(0, 1.02), ylabel="‖F − X‖ / ‖F‖", title="X, what is kept of F")
    step.set(ylim=(0, 1.02), ylabel="dᵀXd / dᵀFd", title="X along d, the first step of another task")


if __name__ == "__main__":
    main(parse_settings(Config, "fisher_curvature"))
