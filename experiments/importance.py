"""What importances look like, how those of EWC and MAS are related, and how much those of two tasks overlap.

A network learns task A, the digits, and then task B with EWC: the same digits with the pixels of a central square
permuted. The larger the square, the more the tasks differ. The study draws the first layer's importances by pixel,
compares MAS's importance of each parameter with EWC's, and computes how much the Fishers of A and B overlap in each
layer. Both Fishers are computed at the parameters after both tasks, so that only the inputs differ.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
import rich.console
from jax.flatten_util import ravel_pytree

from experiments.harness.report import estimate, format_estimate, report_tables
from experiments.harness.runs import Run, open_run
from experiments.harness.settings import RunSettings, Seeds, check_settings, parse_settings
from experiments.harness.study import both_importances, is_correct, learn_permuted, measure_seeds
from lifelong_jax import Batch, Consolidation, init_consolidation
from lifelong_jax.datasets import Dataset, load_dataset
from lifelong_jax.geometry import importance_overlap
from lifelong_jax.models import MLP, init_network
from lifelong_jax.types import Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SIDE = 8  # pixels to a side of the bundled digits
POWERS = np.arange(0.1, 1.55, 0.05)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Draw importances, compare EWC's with MAS's, and compute how much those of two tasks overlap."""

    squares: tuple[int, ...] = (0, 2, 4, 6, 8)
    """Widths in pixels of the central square that task B permutes: even, at most 8, in ascending order."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of SGD with momentum 0.9."""

    strength: float = 100.0
    """λ of EWC, while task B is learned."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """Each seed sets the initial parameters, the order of the examples and the permutations."""

    def __post_init__(self) -> None:
        """Validates before computing."""
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
    """Measurements of one seed.

    Attributes:
      overlap: `[num_squares, num_layers]`, of the Fishers of A and B, after both tasks.
      accuracy: `[num_squares, 2]`, on the test data of A and B, after both tasks; fractions.
      correlations: `[len(POWERS)]`, of MAS's importance with these powers of the Fisher, over all parameters, after A.
      log_slope: the slope of log MAS against log Fisher, by total least squares, after A.
      ink_correlation: of the first layer's Fisher, summed by pixel, with the pixel's mean square, after A.
      images: `[1 + num_squares, 3, 8, 8]`: the mean input and the first layer's Fisher and MAS, for A, and for B with
        each square.
      fisher: `[num_params]`, the Fisher diagonal after A.
      mas: `[num_params]`, MAS's importance after A.
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
    """Runs the study."""
    console = rich.console.Console()
    dataset = load_dataset("digits")
    with open_run(config, "importance", console, [dataset]) as run:
        function = functools.partial(measure, config, dataset)
        values = measure_seeds(function, config.seeds, run, console, logged=Measured._fields[:5])
        report(config, values, run, console)
        draw(config, values, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def measure(config: Config, dataset: Dataset, key: jax.Array) -> Measured:
    """Learns A, then B once with each square, and compares their importances."""
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
        accuracies.append([np.mean(is_correct(model, after, dataset.test, order)) for order in (plain, permutation)])
        images.append(images_of(dataset.train, permutation, fisher_b, mas_b))
    flat_fisher, flat_mas = (np.asarray(ravel_pytree(tree)[0]) for tree in (fisher, mas))
    positive = (flat_fisher > 0) & (flat_mas > 0)
    logs = np.log([flat_fisher[positive], flat_mas[positive]])
    direction = np.linalg.eigh(np.cov(logs))[1][:, -1]
    mean_square_ink = np.square(np.asarray(dataset.train.inputs)).mean(axis=0)
    return Measured(
        overlap=np.array(overlaps),
        accuracy=np.array(accuracies),
        correlations=np.array([np.corrcoef(flat_fisher**power, flat_mas)[0, 1] for power in POWERS]),
        log_slope=direction[1] / direction[0],
        ink_correlation=np.corrcoef(np.ravel(mean_square_ink), np.ravel(images[0][1]))[0, 1],
        images=np.array(images),
        fisher=flat_fisher,
        mas=flat_mas,
    )


def permute_square(width: int, key: jax.Array) -> np.ndarray:
    """Draws a permutation of the pixels in a central square; the other pixels keep their places."""
    pixels = np.arange(SIDE * SIDE)
    margin = (SIDE - width) // 2
    square = pixels.reshape(SIDE, SIDE)[margin : SIDE - margin, margin : SIDE - margin].reshape(-1)
    shuffled = pixels.copy()
    shuffled[square] = square[np.argsort(jax.random.uniform(key, pixels.shape)[: square.size])]
    return shuffled


def images_of(batch: Batch, permutation: np.ndarray, *importances: Params) -> np.ndarray:
    """Returns images of one task: the mean input, and the first layer's importances summed by pixel."""
    mean = np.asarray(batch.inputs).mean(axis=0).reshape(-1)[permutation]
    first_layer = [np.sum(importance["params"]["Dense_0"]["kernel"], axis=1) for importance in importances]
    return np.stack([np.reshape(image, (SIDE, SIDE)) for image in (mean, *first_layer)])


def index_of_power(power: float) -> int:
    """Returns the index of a power in `POWERS`."""
    return int(np.abs(POWERS - power).argmin())


def report(config: Config, values: Mapping[str, np.ndarray], run: Run, console: rich.console.Console) -> None:
    """Prints the tables; writes `summary.json` and `table.md`."""
    overlaps = [[estimate(column) for column in square.T] for square in values["overlap"].transpose(1, 0, 2)]
    accuracies = [[estimate(column) for column in square.T] for square in values["accuracy"].transpose(1, 0, 2)]
    relation = {
        "MAS with the Fisher": estimate(values["correlations"][:, index_of_power(1.0)]),
        "MAS with its square root": estimate(values["correlations"][:, index_of_power(0.5)]),
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
    tables = {"Overlap of the two tasks' Fishers, in the network that has learned both": [header, *rows]}
    header = ["over the parameters, after task A", "correlation or power"]
    rows = [[name, format_estimate(value, digits=2)] for name, value in relation.items()]
    tables["The importances of EWC and MAS"] = [header, *rows]
    report_tables(tables, run, console)


def draw(config: Config, values: Mapping[str, np.ndarray], run: Run) -> None:
    """Draws `importance.png`."""
    from lifelong_jax.plotting import make_figure  # here, as matplotlib is slow to import

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
    draw_images(config, values["images"][0], left)
    draw_relation(values, middle.subplots())
    draw_overlap(config, values["overlap"], right.subplots())
    figure.savefig(run.folder / "importance.png")


def draw_images(config: Config, images: np.ndarray, figure: "SubFigure") -> None:
    """Draws the images of task A, and of B with a square of the middle and of the largest width."""
    from lifelong_jax.plotting import draw_image

    middle_width = config.squares[len(config.squares) // 2]
    columns = [
        ("task A", 0),
        (f"B, {middle_width}×{middle_width}", config.squares.index(middle_width) + 1),
        (f"B, {config.squares[-1]}×{config.squares[-1]}", -1),
    ]
    for axes, (name, index) in zip(figure.subplots(3, 3).T, columns, strict=True):
        for axis, image, label in zip(axes, images[index], ("mean input", "EWC", "MAS"), strict=True):
            draw_image(axis, image, name if label == "mean input" else "")
            if index == 0:
                axis.set_ylabel(label)
    figure.suptitle("first layer, Ω by pixel", fontsize=10)


def draw_relation(values: Mapping[str, np.ndarray], axis: "Axes") -> None:
    """Draws MAS's importances against the Fisher for the first seed, with lines ∝ F and ∝ √F."""
    from lifelong_jax.plotting import COLORS

    fisher, mas = values["fisher"][0], values["mas"][0]
    positive = (fisher > 1e-10) & (mas > 0)
    axis.hexbin(
        fisher[positive], mas[positive], xscale="log", yscale="log", gridsize=45, mincnt=1, bins="log", cmap="cividis"
    )
    centre = np.exp([np.log(fisher[positive]).mean(), np.log(mas[positive]).mean()])
    ends = np.quantile(fisher[positive], [0.02, 0.999])
    for power, style in ((0.5, "-"), (1.0, ":")):
        line = centre[1] * (ends / centre[0]) ** power
        axis.plot(ends, line, style, color=COLORS[1], label=f"∝ F$^{{{power:g}}}$")
    axis.set(xlabel="EWC: Fisher diagonal F", ylabel="MAS")
    half, one = (values["correlations"][:, index_of_power(power)].mean() for power in (0.5, 1.0))
    axis.set_title(f"correlation: {half:z.2f} with √F, {one:z.2f} with F", fontsize=10)
    axis.legend(frameon=False, fontsize=9)


def draw_overlap(config: Config, overlap: np.ndarray, axis: "Axes") -> None:
    """Draws the overlap of the Fishers against the size of the square, a line for each layer."""
    from lifelong_jax.plotting import COLORS, draw_over_seeds

    for layer in range(overlap.shape[-1]):
        style = {"marker": "o", "markersize": 4}
        color = COLORS[layer % len(COLORS)]
        draw_over_seeds(axis, config.squares, overlap[..., layer], color, f"layer {layer + 1}", **style)
    axis.set(xlabel="permuted square, pixels wide", ylabel="overlap of the Fishers", ylim=(0, 1.02))
    axis.set_xticks(config.squares)
    axis.set_title("both tasks learned", fontsize=10)
    axis.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    main(parse_settings(Config, "importance"))
