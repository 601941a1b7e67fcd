"""Does a parameter's importance predict how much the output changes when the parameter is perturbed?

MAS assumes that a small perturbation δ of the parameters changes the output by g · δ, with g the output's gradient. The
study first measures the error of this linear approximation by the length of δ. It then ranks the parameters by MAS, by
the Fisher diagonal and at random, splits them into groups by rank, and perturbs one group at a time, always by the same
length.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jax.flatten_util import ravel_pytree

from experiments.harness.report import estimate, format_estimate, report_tables
from experiments.harness.runs import Run, open_run
from experiments.harness.settings import RunSettings, Seeds, check_settings, parse_settings
from experiments.harness.study import both_importances, learn_permuted, measure_seeds
from lifelong_jax import Batch, init_consolidation
from lifelong_jax.datasets import Dataset, load_dataset
from lifelong_jax.models import MLP, init_network
from lifelong_jax.types import Params

ACTIVATIONS = ("tanh", "relu")
RANKINGS = ("MAS", "EWC", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Perturb a trained network: how far is its output linear, and do importances predict how much it changes?"""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""

    num_epochs: int = 30
    """Passes over the training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of SGD with momentum 0.9."""

    distances: tuple[float, ...] = tuple(float(f"{10 ** (quarter / 4 - 3):.3g}") for quarter in range(13))
    """Lengths ‖δ‖ / ‖θ‖ at which the output's change is compared with g · δ."""

    num_groups: int = 10
    """Number of groups of equal size into which the parameters are split by rank."""

    noise: float = 0.3
    """Length ‖δ‖ / ‖θ‖ of the perturbation of one group."""

    num_draws: int = 10
    """Number of random perturbations for each length, and for each group."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """Each seed sets the initial parameters and the order of the examples."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        names = ("hidden_sizes", "num_epochs", "batch_size", "learning_rate", "distances", "num_groups", "noise")
        check_settings(
            positive={name: getattr(self, name) for name in (*names, "num_draws")},
            distinct={"seeds": self.seeds, "distances": self.distances},
        )


def main(config: Config) -> None:
    """Runs the study."""
    console = rich.console.Console()
    dataset = load_dataset("digits")
    with open_run(config, "sensitivity", console, [dataset]) as run:
        measured = measure_seeds(functools.partial(measure, config, dataset), config.seeds, run, console)
        errors, changes = ({name: measured[name] for name in names} for names in (ACTIVATIONS, RANKINGS))
        report(config, errors, changes, run, console)
        draw(config, errors, changes, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def measure(config: Config, dataset: Dataset, key: jax.Array) -> dict[str, np.ndarray]:
    """Measures one seed: `linearity` for each activation, and `perturb_by_rank` for each ranking."""
    train_key, delta_key, random_key = jax.random.split(key, 3)
    trained = {activation: train(config, activation, dataset.train, train_key) for activation in ACTIVATIONS}
    measured = {
        activation: linearity(config, activation, params, dataset.test, delta_key)
        for activation, params in trained.items()
    }
    for name, importance in importances(config, trained["relu"], dataset.train, random_key).items():
        measured[name] = perturb_by_rank(config, trained["relu"], importance, dataset.test, delta_key)
    return {name: np.asarray(values, np.float64) for name, values in measured.items()}


def make_model(config: Config, activation: str) -> MLP:
    """Makes the network."""
    return MLP(config.hidden_sizes, num_outputs=10, activation=activation)


def train(config: Config, activation: str, batch: Batch, key: jax.Array) -> Params:
    """Trains a network."""
    init_key, key = jax.random.split(key)
    model = make_model(config, activation)
    start = init_network(make_model(config, "relu"), init_key, batch.inputs[0])  # the same for both activations
    return learn_permuted(
        model,
        start,
        init_consolidation(start),
        batch,
        np.arange(batch.inputs[0].size),
        key,
        strength=0.0,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )


def importances(config: Config, params: Params, batch: Batch, key: jax.Array) -> dict[str, Params]:
    """Computes the importances of MAS and EWC for a ReLU network, and draws random ones."""
    pixels = np.arange(batch.inputs[0].size)
    fisher, mas = both_importances(make_model(config, "relu"), params, batch, pixels)
    flat, unravel = ravel_pytree(params)
    return {"MAS": mas, "EWC": fisher, "random": unravel(jax.random.uniform(key, flat.shape))}


@functools.partial(jax.jit, static_argnames=("config", "activation"))
def linearity(config: Config, activation: str, params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """Computes the output's change at each distance, and the error of g · δ.

    Returns:
      `[num_distances, 2]`, root mean squares over examples, outputs and draws.
    """
    apply_fn = make_model(config, activation).apply
    flat, unravel = ravel_pytree(params)

    def outputs(flat: jax.Array) -> jax.Array:
        return jax.vmap(apply_fn, in_axes=(None, 0))(unravel(flat), batch.inputs)

    def at(distance: jax.Array, key: jax.Array) -> jax.Array:
        delta = jax.random.normal(key, flat.shape)
        delta *= distance * jnp.linalg.norm(flat) / jnp.linalg.norm(delta)
        here, linear = jax.jvp(outputs, (flat,), (delta,))
        change = outputs(flat + delta) - here
        return jnp.stack([jnp.mean(change**2), jnp.mean((change - linear) ** 2)])

    keys = jax.random.split(key, config.num_draws)
    squares = jax.vmap(jax.vmap(at, in_axes=(None, 0)), in_axes=(0, None))(jnp.array(config.distances), keys)
    return jnp.sqrt(squares.mean(axis=1))


@functools.partial(jax.jit, static_argnames=("config",))
def perturb_by_rank(config: Config, params: Params, importance: Params, batch: Batch, key: jax.Array) -> jax.Array:
    """Perturbs one group of parameters at a time, from the least important to the most important.

    Returns:
      `[num_groups, 2]`: the root mean square of the output's change, and the loss of accuracy, a fraction.
    """
    apply_fn = make_model(config, "relu").apply
    flat, unravel = ravel_pytree(params)
    order = jnp.argsort(ravel_pytree(importance)[0])
    group_of = jnp.zeros(flat.size, int).at[order].set(jnp.arange(flat.size) * config.num_groups // flat.size)

    def outputs(flat: jax.Array) -> jax.Array:
        return jax.vmap(apply_fn, in_axes=(None, 0))(unravel(flat), batch.inputs)

    def accuracy(outputs: jax.Array) -> jax.Array:
        return jnp.mean(jnp.argmax(outputs, axis=-1) == batch.labels)

    before = outputs(flat)

    def at(group: jax.Array, key: jax.Array) -> jax.Array:
        delta = jnp.where(group_of == group, jax.random.normal(key, flat.shape), 0)
        delta *= config.noise * jnp.linalg.norm(flat) / jnp.linalg.norm(delta)
        after = outputs(flat + delta)
        return jnp.stack([jnp.mean((after - before) ** 2), accuracy(before) - accuracy(after)])

    keys = jax.random.split(key, config.num_draws)
    of_draws = jax.vmap(jax.vmap(at, in_axes=(None, 0)), in_axes=(0, None))(jnp.arange(config.num_groups), keys)
    means = of_draws.mean(axis=1)
    return means.at[:, 0].set(jnp.sqrt(means[:, 0]))


def slopes_of(config: Config, errors: np.ndarray) -> list[float]:
    """Fits, for each seed, the power of ‖δ‖ with which the error of g · δ grows, over the smaller distances."""
    distances = np.array(config.distances)
    small = distances <= np.sqrt(distances.min() * distances.max())
    return [np.polyfit(np.log(distances[small]), np.log(seed[small, 1]), 1)[0] for seed in errors]


def rank_correlation(values: np.ndarray) -> float:
    """Computes Spearman's rank correlation of values with their position: 1 if they ascend."""
    return float(np.corrcoef(np.argsort(np.argsort(values)), np.arange(len(values)))[0, 1])


def report(
    config: Config,
    errors: Mapping[str, np.ndarray],
    changes: Mapping[str, np.ndarray],
    run: Run,
    console: rich.console.Console,
) -> None:
    """Prints the tables; writes `summary.json` and `table.md`."""
    linear = {
        name: {
            "slope": estimate(slopes_of(config, values)),
            "relative_error": [estimate(column) for column in (values[..., 1] / values[..., 0]).T],
        }
        for name, values in errors.items()
    }
    ranked = {
        name: {
            "output_change": [estimate(column) for column in values[..., 0].T],
            "accuracy_lost": [estimate(column) for column in values[..., 1].T],
            "rank_correlation": estimate([rank_correlation(seed[:, 0]) for seed in values]),
        }
        for name, values in changes.items()
    }
    run.write_summary({"distances": config.distances, "linear": linear, "ranked": ranked})
    header = ["activation", "power of the error", *(f"error at {config.distances[index]:g}, %" for index in (0, -1))]
    rows = [
        [
            name,
            format_estimate(numbers["slope"], digits=2),
            *(format_estimate(numbers["relative_error"][index], 100) for index in (0, -1)),
        ]
        for name, numbers in linear.items()
    ]
    tables = {"Error of g · δ relative to the output's change, by the length of δ": [header, *rows]}
    header = [
        "ranked by",
        "change, least",
        "change, most",
        "points lost, least",
        "points lost, most",
        "rank correlation",
    ]
    rows = [
        [
            name,
            *(format_estimate(numbers["output_change"][index], digits=2) for index in (0, -1)),
            *(format_estimate(numbers["accuracy_lost"][index], 100) for index in (0, -1)),
            format_estimate(numbers["rank_correlation"], digits=2),
        ]
        for name, numbers in ranked.items()
    ]
    tables["Perturbing the least and the most important parameters"] = [header, *rows]
    report_tables(tables, run, console)


def draw(config: Config, errors: Mapping[str, np.ndarray], changes: Mapping[str, np.ndarray], run: Run) -> None:
    """Draws `sensitivity.png`."""
    from lifelong_jax.plotting import COLORS, draw_over_seeds, make_figure  # here, as matplotlib is slow to import

    lost = {name: 100 * values[:, :, 1].mean(axis=0) for name, values in changes.items()}
    share = 100 // config.num_groups
    figure = make_figure(
        8.6,
        3.6,
        f"Noise costs {lost['MAS'][0]:z.1f} points of accuracy on the {share} % of parameters that matter least to "
        f"MAS, {lost['MAS'][-1]:z.0f} on the most",
    )
    linear, change, accuracy = figure.subplots(1, 3)
    distances = np.array(config.distances)
    for name, color in zip(ACTIVATIONS, COLORS, strict=False):
        power = np.mean(slopes_of(config, errors[name]))
        draw_over_seeds(linear, distances, errors[name][..., 1], color, f"{name}: error ∝ ‖δ‖$^{{{power:.1f}}}$")
        draw_over_seeds(linear, distances, errors[name][..., 0], color, f"{name}: change", linestyle="--")
    linear.set(xscale="log", yscale="log", xlabel="‖δ‖ / ‖θ‖", ylabel="logits, root mean square")
    linear.set_ylim(bottom=1e-4 * errors["tanh"][..., 1].min())
    linear.set_title("change, and error of g · δ", fontsize=10)
    middles = (np.arange(config.num_groups) + 0.5) * 100 / config.num_groups
    for name, color, marker in zip(RANKINGS, COLORS[2:], "os^", strict=False):
        options = {"marker": marker, "markersize": 4}
        draw_over_seeds(change, middles, changes[name][..., 0], color, name, **options)
        draw_over_seeds(accuracy, middles, 100 * changes[name][..., 1], color, name, **options)
    change.set(yscale="log", xlabel="rank of Ω, percent", ylabel="change of the logits, RMS")
    change.set_title("output by rank", fontsize=10)
    accuracy.set(xlabel="rank of Ω, percent", ylabel="accuracy lost, percentage points")
    accuracy.set_title("accuracy by rank", fontsize=10)
    for axis in (linear, change, accuracy):
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(run.folder / "sensitivity.png")


if __name__ == "__main__":
    main(parse_settings(Config, "sensitivity"))
