"""MAS needs no labels, so its importance can be computed on other data than the training data. Which data suffice?

A network learns task A and then task B: digits in two permutations of the pixels. MAS's importance for task A is
computed on its training examples, on all or a few held-out examples without their labels, or on the held-out examples
of a single class. The study measures the accuracy on A after B.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import rich.console
from jax.flatten_util import ravel_pytree

from experiments.harness.report import estimate, format_estimate, report_tables
from experiments.harness.runs import Run, open_run
from experiments.harness.settings import RunSettings, Seeds, check_settings, parse_settings
from experiments.harness.study import is_correct, learn_permuted, measure_seeds
from lifelong_jax import Consolidation, init_consolidation, mas_importance, permuted_tasks
from lifelong_jax.datasets import Dataset, hold_out_validation, load_dataset
from lifelong_jax.models import MLP, init_network
from lifelong_jax.tasks import with_permutation
from lifelong_jax.types import Params

NUM_CLASSES = 10
NUM_HELD_OUT = 718  # half of the bundled digits' training data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Compute MAS's importance on held-out examples without labels: all, a few, or those of one class."""

    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of the hidden layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of SGD with momentum 0.9."""

    strength: float = 0.03
    """λ of MAS."""

    num_unlabelled: tuple[int, ...] = (1, 3, 10, 30, 100, 300)
    """Numbers of held-out examples that the importance is computed on, in ascending order. There are 718, as many as
    training examples."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """Each seed sets the split of the data, the two tasks, the initial parameters and the order of the examples."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        names = ("hidden_sizes", "num_epochs", "batch_size", "learning_rate", "num_unlabelled")
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={"strength": self.strength},
            distinct={"seeds": self.seeds, "num_unlabelled": self.num_unlabelled},
        )
        numbers = self.num_unlabelled
        if numbers != tuple(sorted(numbers)) or numbers[-1] > NUM_HELD_OUT:
            raise ValueError(f"num_unlabelled must be ascending and at most {NUM_HELD_OUT}, not {numbers}.")


class Measured(NamedTuple):
    """Measurements of one seed. Accuracies are fractions; unless noted, on task A's test data after task B.

    Attributes:
      before: the accuracy after task A, before B.
      finetuned: without a penalty.
      training: with the importance computed on A's training data.
      held_out: with the importance computed on all held-out examples.
      few: `[num_numbers]`, with the importance computed on some of these.
      by_class: `[NUM_CLASSES, NUM_CLASSES]`: with the importance computed on class i, the accuracy on class j.
      on_b: `[3]`, the accuracies on B: finetuned, training, held_out.
      correlation: of the importance on all held-out examples with that on the training data, over the parameters.
      few_correlation: `[num_numbers]`, the same for some of the held-out examples.
    """

    before: float
    finetuned: float
    training: float
    held_out: float
    few: np.ndarray
    by_class: np.ndarray
    on_b: np.ndarray
    correlation: float
    few_correlation: np.ndarray


def main(config: Config) -> None:
    """Runs the study."""
    console = rich.console.Console()
    dataset = load_dataset("digits")
    with open_run(config, "unlabelled", console, [dataset]) as run:
        function = functools.partial(measure, config, dataset)
        values = Measured(**measure_seeds(function, config.seeds, run, console))
        report(config, values, run, console)
        draw(config, values, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def measure(config: Config, dataset: Dataset, key: jax.Array) -> Measured:
    """Learns A, then B once for each data set that the importance is computed on."""
    split_key, tasks_key, init_key, a_key, b_key = jax.random.split(key, 5)
    halves = hold_out_validation(dataset, 0.5, split_key)
    size = NUM_HELD_OUT
    train, unlabelled = (jax.tree.map(lambda leaf: leaf[:size], half) for half in (halves.train, halves.test))
    permutation_a, permutation_b = (task.permutation for task in permuted_tasks(train, dataset.test, 2, tasks_key))
    model = MLP(config.hidden_sizes, NUM_CLASSES)
    learn = functools.partial(
        learn_permuted,
        model,
        batch=train,
        strength=config.strength,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )
    start = init_network(model, init_key, train.inputs[0])
    none = init_consolidation(start)
    params = learn(start, none, permutation=permutation_a, key=a_key)

    importance = functools.partial(importance_on, model, params, permutation=permutation_a)
    every = np.ones(size, np.float32)
    labels = np.asarray(unlabelled.labels)
    sources = {
        "finetuned": none.importance,
        "training": importance(train.inputs, every),
        "held_out": importance(unlabelled.inputs, every),
        **{f"{n}": importance(unlabelled.inputs, every * (np.arange(size) < n)) for n in config.num_unlabelled},
        **{f"class {c}": importance(unlabelled.inputs, every * (labels == c)) for c in range(NUM_CLASSES)},
    }
    correct, on_b = {}, {}
    for name, omega in sources.items():
        after = learn(params, Consolidation(params, omega), permutation=permutation_b, key=b_key)
        correct[name] = np.asarray(is_correct(model, after, dataset.test, permutation_a))
        on_b[name] = np.asarray(is_correct(model, after, dataset.test, permutation_b)).mean()
    flat = {name: np.asarray(ravel_pytree(omega)[0]) for name, omega in sources.items()}
    counts = [str(count) for count in config.num_unlabelled]
    correlations = [np.corrcoef(flat["training"], flat[name])[0, 1] for name in ("held_out", *counts)]
    labels = np.asarray(dataset.test.labels)
    return Measured(
        before=np.asarray(is_correct(model, params, dataset.test, permutation_a)).mean(),
        finetuned=correct["finetuned"].mean(),
        training=correct["training"].mean(),
        held_out=correct["held_out"].mean(),
        few=np.array([correct[name].mean() for name in counts]),
        by_class=np.array(
            [[correct[f"class {i}"][labels == j].mean() for j in range(NUM_CLASSES)] for i in range(NUM_CLASSES)]
        ),
        on_b=np.array([on_b[name] for name in ("finetuned", "training", "held_out")]),
        correlation=correlations[0],
        few_correlation=np.array(correlations[1:]),
    )


@functools.partial(jax.jit, static_argnames=("model",))
def importance_on(model: MLP, params: Params, inputs: jax.Array, weights: jax.Array, permutation: jax.Array) -> Params:
    """Computes MAS's importance, without labels."""
    return mas_importance(with_permutation(model.apply, permutation), params, inputs, weights=weights)


def own_class_advantage(by_class: np.ndarray) -> float:
    """Computes how much more accurate a class is with its own importance than with another class's, on average."""
    own = np.diag(by_class)
    others = (by_class.sum(axis=0) - own) / (len(own) - 1)
    return float((own - others).mean())


def report(config: Config, values: Measured, run: Run, console: rich.console.Console) -> None:
    """Prints the table; writes `summary.json` and `table.md`."""
    advantage = estimate([own_class_advantage(seed) for seed in values.by_class])
    single = estimate(values.by_class.mean(axis=(1, 2)))
    few = [estimate(column) for column in values.few.T]
    few_correlation = [estimate(column) for column in values.few_correlation.T]
    difference = estimate(values.held_out - values.training)
    run.write_summary(
        {
            "before": estimate(values.before),
            "finetuned": estimate(values.finetuned),
            "training": estimate(values.training),
            "held_out": estimate(values.held_out),
            "held_out_less_training": difference,
            "correlation": estimate(values.correlation),
            "num_unlabelled": config.num_unlabelled,
            "few": few,
            "few_correlation": few_correlation,
            "by_class": values.by_class.mean(axis=0),
            "single_class": single,
            "own_class_advantage": advantage,
            "on_b": [estimate(column) for column in values.on_b.T],
        }
    )
    header = ["importance computed on", "accuracy on A, %", "on B, %", "correlation with the training data's"]
    on_b = [format_estimate(estimate(column), 100) for column in values.on_b.T]
    rows = [
        ["(before B)", format_estimate(estimate(values.before), 100), "", ""],
        ["nothing", format_estimate(estimate(values.finetuned), 100), on_b[0], ""],
        ["training data", format_estimate(estimate(values.training), 100), on_b[1], ""],
        [
            "held-out data",
            format_estimate(estimate(values.held_out), 100),
            on_b[2],
            format_estimate(estimate(values.correlation), digits=3),
        ],
        *(
            [f"{count} held out", format_estimate(accuracy, 100), "", format_estimate(correlation, digits=3)]
            for count, accuracy, correlation in zip(config.num_unlabelled, few, few_correlation, strict=True)
        ),
        ["one class, held out", format_estimate(single, 100), "", ""],
        ["own class's advantage", format_estimate(advantage, 100), "", ""],
    ]
    title = "Accuracy after task B, by the data that the importance is computed on"
    report_tables({title: [header, *rows]}, run, console)


def draw(config: Config, values: Measured, run: Run) -> None:
    """Draws `unlabelled.png`."""
    from lifelong_jax.plotting import COLORS, draw_over_seeds, make_figure  # here, as matplotlib is slow to import

    kept = {name: 100 * getattr(values, name).mean() for name in ("finetuned", "training", "held_out")}
    advantage = 100 * np.mean([own_class_advantage(seed) for seed in values.by_class])
    figure = make_figure(
        8.6,
        3.8,
        f"On unlabelled held-out data MAS keeps task A at {kept['held_out']:.0f} %, on its training data at "
        f"{kept['training']:.0f} %; no penalty: {kept['finetuned']:.0f} %",
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    counts = np.array(config.num_unlabelled)
    draw_over_seeds(left, counts, 100 * values.few, COLORS[0], "n held-out examples", marker="o", markersize=4)
    ends = np.array([counts[0], counts[-1]])
    levels = {
        "(before task B)": (values.before, COLORS[6], ":"),
        "all training data": (values.training, COLORS[1], "--"),
        "nothing": (values.finetuned, COLORS[3], "-."),
    }
    for name, (level, color, style) in levels.items():
        draw_over_seeds(left, ends, 100 * np.stack([level, level], axis=1), color, name, linestyle=style)
    left.set(xscale="log", xlabel="unlabelled examples, n", ylabel="accuracy on task A after B, %", ylim=(None, 100))
    left.set_title("by the data that Ω is computed on", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="center right")
    mean = 100 * values.by_class.mean(axis=0)
    relative = mean - mean.mean(axis=0)
    limit = np.abs(relative).max()
    image = right.imshow(relative, cmap="PuOr", vmin=-limit, vmax=limit)
    right.set(xlabel="accuracy on class", ylabel="Ω computed on class", xticks=range(10), yticks=range(10))
    right.set_title(f"a class's own Ω keeps it {advantage:z.0f} points better", fontsize=10)
    figure.colorbar(image, ax=right, label="points above the column's mean", shrink=0.9)
    figure.savefig(run.folder / "unlabelled.png")


if __name__ == "__main__":
    main(parse_settings(Config, "unlabelled"))
