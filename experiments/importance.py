"""What importances look like: as images, against each other, and how much those of two tasks overlap.

A network learns task A, the digits, and with EWC task B, the same digits with the pixels of a central square permuted;
the larger the square, the more the tasks differ. Shown are the first layer's importances by pixel; MAS's against EWC's
importance of the same parameters; and how much A's and B's Fishers overlap, layer by layer, in the network that has
learned both: both are taken at the same parameters, so that only the inputs differ.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import rich.console

from lifelong_jax import (
    Batch,
    Consolidation,
    init_consolidation,
)
from lifelong_jax.datasets import Dataset, load_dataset
from lifelong_jax.geometry import importance_overlap
from lifelong_jax.models import MLP, init_network
from lifelong_jax.plotting import COLORS, draw_image, draw_over_seeds, make_figure
from lifelong_jax.resuming import open_run, parse_settings
from lifelong_jax.runs import (
    Run,
    RunSettings,
    Seeds,
    check_settings,
    estimate,
    format_estimate,
    markdown_table,
    print_table,
)
from lifelong_jax.studies import both_importances, is_correct, learn_permuted, measure_seeds
from lifelong_jax.types import Params

SIDE = 8  # pixels to a side of the bundled digits
POWERS = np.arange(0.1, 1.55, 0.05)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Show what importances look like, EWC's against MAS's, and how much two tasks' overlap the more they differ."""

    squares: tuple[int, ...] = (0, 2, 4, 6, 8)
    """The widths in pixels of the central square that task B permutes; even, ascending, at most 8."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of SGD with momentum 0.9."""

    strength: float = 100.0
    """λ of EWC, which keeps task A while B is learned."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """One initialisation, one order of examples and one set of permutations for each."""

    def __post_init__(self) -> None:
        """Refuses what would fail only after much has run."""
        check_settings(
            positive={
                name: getattr(self, name) for name in ("hidden_sizes", "num_epochs", "batch_size", "learning_rate")
            },
            not_negative={"strength": self.strength},
            distinct={"seeds": self.seeds, "squares": self.squares},
        )
        if list(self.squares) != sorted(self.squares) or any(
            width not in range(0, SIDE + 1, 2) for width in self.squares
        ):
            raise ValueError(f"squares must be even, ascending and from 0 to {SIDE}, not {self.squares}.")


class Measured(NamedTuple):
    """What one seed gives.

    Attributes:
      overlap: `[num_squares, num_layers]`, of A's and B's Fishers.
      accuracy: `[num_squares, 2]`, on A's and B's test data after B, fractions.
      correlations: `[len(POWERS)]`, of MAS with these powers of the Fisher, over all parameters, after A.
      log_slope: of MAS against the Fisher in logarithms, by total least squares.
      ink_correlation: of the first layer's Fisher by pixel with the pixel's mean square, after A.
      images: `[1 + num_squares, 3, 8, 8]`: of A, and of B with each square, the mean input, and the first layer's
        Fisher and MAS.
      fisher: `[num_params]`, after A.
      mas: `[num_params]`, after A.
    """

    overlap: np.ndarray
    accuracy: np.ndarray
    correlations: np.ndarray
    log_slope: float
    ink_correlation: float
    images: np.ndarray
    fisher: np.ndarray
    mas: np.ndarray


def main(config: Config) -> None:
    """Runs the study.

    Args:
      config: the whole configuration.
    """
    console = rich.console.Console()
    with open_run(config, "importance", console) as run:
        dataset = load_dataset("digits")
        function = functools.partial(measure, config, dataset)
        values = measure_seeds(function, config.seeds, run, console, logged=Measured._fields[:5])
        report(config, values, run, console)
        draw(config, values, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def measure(config: Config, dataset: Dataset, key: jax.Array) -> Measured:
    """Learns A and then B with each square, and compares their importances."""
    init_key, a_key, b_key, square_key = jax.random.split(key, 4)
    model = MLP(config.hidden_sizes, dataset.num_classes)
    learn = functools.partial(
        learn_permuted,
        model,
        batch=dataset.train,
        strength=config.strength,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )
    start = init_network(model, init_key, dataset.train.inputs[0])
    plain = np.arange(SIDE * SIDE)
    params = learn(start, init_consolidation(start), permutation=plain, key=a_key)
    fisher, mas = both_importances(model, params, dataset.train, plain)
    images = [images_of(dataset.train, plain, fisher, mas)]
    overlaps, accuracies = [], []
    for width in config.squares:
        permutation = permute_square(width, square_key)
        after = learn(params, Consolidation(params, fisher), permutation=permutation, key=b_key)
        fisher_a, _ = both_importances(model, after, dataset.train, plain)
        fisher_b, mas_b = both_importances(model, after, dataset.train, permutation)
        layers = sorted(fisher_a["params"])
        overlaps.append([importance_overlap(fisher_a["params"][name], fisher_b["params"][name]) for name in layers])
        accuracies.append([np.mean(is_correct(model, after, dataset.test, shown)) for shown in (plain, permutation)])
        images.append(images_of(dataset.train, permutation, fisher_b, mas_b))
    flat_fisher, flat_mas = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (fisher, mas)
    )
    positive = (flat_fisher > 0) & (flat_mas > 0)
    logs = np.log([flat_fisher[positive], flat_mas[positive]])
    direction = np.linalg.eigh(np.cov(logs))[1][:, -1]
    squares = np.square(np.asarray(dataset.train.inputs)).mean(axis=0)
    return Measured(
        overlap=np.array(overlaps),
        accuracy=np.array(accuracies),
        correlations=np.array([np.corrcoef(flat_fisher**power, flat_mas)[0, 1] for power in POWERS]),
        log_slope=direction[1] / direction[0],
        ink_correlation=np.corrcoef(np.ravel(squares), np.ravel(images[0][1]))[0, 1],
        images=np.array(images),
        fisher=flat_fisher,
        mas=flat_mas,
    )


def permute_square(width: int, key: jax.Array) -> np.ndarray:
    """Draws a permutation of the pixels of a central square; the others stay."""
    pixels = np.arange(SIDE * SIDE)
    margin = (SIDE - width) // 2
    square = pixels.reshape(SIDE, SIDE)[margin : SIDE - margin, margin : SIDE - margin].reshape(-1)
    shuffled = pixels.copy()
    shuffled[square] = square[np.argsort(jax.random.uniform(key, pixels.shape)[: square.size])]
    return shuffled


def images_of(batch: Batch, permutation: np.ndarray, *importances: Params) -> np.ndarray:
    """Makes the images of one task, as the network sees it: the mean input, and the first layer's importances."""
    mean = np.asarray(batch.inputs).mean(axis=0).reshape(-1)[permutation]
    first_layer = [np.sum(importance["params"]["Dense_0"]["kernel"], axis=1) for importance in importances]
    return np.stack([np.reshape(image, (SIDE, SIDE)) for image in (mean, *first_layer)])


def report(config: Config, values: Mapping[str, np.ndarray], run: Run, console: rich.console.Console) -> None:
    """Prints the tables; writes `summary.json` and `table.md`."""
    overlaps = [[estimate(column) for column in square.T] for square in values["overlap"].transpose(1, 0, 2)]
    accuracies = [[estimate(column) for column in square.T] for square in values["accuracy"].transpose(1, 0, 2)]
    one, half = (int(np.abs(POWERS - power).argmin()) for power in (1.0, 0.5))
    relation = {
        "MAS with the Fisher": estimate(values["correlations"][:, one]),
        "MAS with its square root": estimate(values["correlations"][:, half]),
        "power of the Fisher that correlates best": estimate(POWERS[values["correlations"].argmax(axis=1)]),
        "slope in logarithms": estimate(values["log_slope"]),
        "Fisher by pixel with mean square ink": estimate(values["ink_correlation"]),
    }
    run.write_summary(
        {"squares": config.squares, "overlap": overlaps, "accuracy": accuracies, "relation": relation, "powers": POWERS}
    )
    layers = [f"layer {index + 1}" for index in range(len(overlaps[0]))]
    header = ["square permuted", *(f"overlap, {layer}" for layer in layers), "accuracy A, %", "accuracy B, %"]
    rows = [
        [
            f"{width}×{width}",
            *(format_estimate(overlap, digits=3) for overlap in overlaps[index]),
            *(format_estimate(value, 100) for value in accuracies[index]),
        ]
        for index, width in enumerate(config.squares)
    ]
    print_table(console, "Overlap of the two tasks' Fishers, in the network that has learned both", header, rows)
    markdown = markdown_table(header, rows)
    header = ["over the parameters, after task A", "correlation or power"]
    rows = [[name, format_estimate(value, digits=2)] for name, value in relation.items()]
    print_table(console, "The importances of EWC and MAS", header, rows)
    (run.folder / "table.md").write_text(markdown + "\n" + markdown_table(header, rows))


def draw(config: Config, values: Mapping[str, np.ndarray], run: Run) -> None:
    """Draws `importance.png`."""
    mean = values["overlap"].mean(axis=0)
    falling = int((np.diff(mean, axis=0) < 0).all(axis=0).sum())
    where = "" if falling == mean.shape[1] else f" in {falling} of {mean.shape[1]} layers"
    figure = make_figure(
        8.6,
        3.5,
        f"The more two tasks differ, the less their Fishers overlap{where}: "
        f"{mean[-1, 0]:.2f} in the first layer, {mean[-1, -1]:.2f} in the last",
    )
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.05, 1, 1))
    middle_width = config.squares[len(config.squares) // 2]
    shown = [
        ("task A", 0),
        (f"B, {middle_width}×{middle_width}", config.squares.index(middle_width) + 1),
        (f"B, {config.squares[-1]}×{config.squares[-1]}", -1),
    ]
    rows = left.subplots(3, 3)
    for column, (name, index) in zip(rows.T, shown, strict=True):
        for axis, image, label in zip(column, values["images"][0, index], ("mean input", "EWC", "MAS"), strict=True):
            draw_image(axis, image, name if label == "mean input" else "")
            if index == 0:
                axis.set_ylabel(label)
    left.suptitle("first layer, Ω by pixel", fontsize=10)
    axis = middle.subplots()
    fisher, mas = values["fisher"][0], values["mas"][0]
    positive = (fisher > 1e-10) & (mas > 0)
    axis.hexbin(
        fisher[positive], mas[positive], xscale="log", yscale="log", gridsize=45, mincnt=1, bins="log", cmap="cividis"
    )
    middle_point = np.exp([np.log(fisher[positive]).mean(), np.log(mas[positive]).mean()])
    ends = np.quantile(fisher[positive], [0.02, 0.999])
    for power, style in ((0.5, "-"), (1.0, ":")):
        axis.plot(
            ends,
            middle_point[1] * (ends / middle_point[0]) ** power,
            style,
            color=COLORS[1],
            label=f"∝ F$^{{{power:g}}}$",
        )
    axis.set(xlabel="EWC: Fisher diagonal F", ylabel="MAS")
    correlations = values["correlations"].mean(axis=0)
    one, half = (int(np.abs(POWERS - power).argmin()) for power in (1.0, 0.5))
    axis.set_title(f"correlation: {correlations[half]:.2f} with √F, {correlations[one]:.2f} with F", fontsize=10)
    axis.legend(frameon=False, fontsize=9)
    axis = right.subplots()
    for layer in range(mean.shape[1]):
        draw_over_seeds(
            axis,
            config.squares,
            values["overlap"][..., layer],
            COLORS[layer % len(COLORS)],
            f"layer {layer + 1}",
            marker="o",
            markersize=4,
        )
    axis.set(xlabel="permuted square, pixels wide", ylabel="overlap of the Fishers", ylim=(0, 1.02))
    axis.set_xticks(config.squares)
    axis.set_title("both tasks learned", fontsize=10)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(run.folder / "importance.png")


if __name__ == "__main__":
    main(parse_settings(Config, "importance"))
