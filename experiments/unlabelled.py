"""MAS needs no labels: it protects by the data that it was computed on, which need not be the training data.

A network learns task A (digits through one permutation of the pixels), and then task B (through another), with MAS's
importance computed on different data of task A: on its training examples; on held-out examples without their labels,
all of them or a few; and on the held-out examples of a single class. Measured is what the network still knows of A.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import rich.console

from lifelong_jax import (
    Consolidation,
    init_consolidation,
    mas_importance,
    permuted_tasks,
)
from lifelong_jax.datasets import Dataset, hold_out_validation, load_dataset
from lifelong_jax.models import MLP, init_network
from lifelong_jax.plotting import COLORS, draw_over_seeds, make_figure
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
from lifelong_jax.studies import is_correct, learn_permuted, measure_seeds, permuted
from lifelong_jax.types import Params

NUM_CLASSES = 10
NUM_HELD_OUT = 718  # half of the bundled digits' training data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Protect a task by MAS on data without labels: held-out examples, a few of them, or those of one class."""

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
    """Numbers of held-out examples that the importance is computed on; ascending. There are 718, as many as A and B
    are trained on."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """One split of the data, one pair of tasks, one initialisation and one order of examples for each."""

    def __post_init__(self) -> None:
        """Refuses what would fail only after much has run."""
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
    """What one seed gives; accuracies are on task A's test data after task B, fractions.

    Attributes:
      before: after task A, before B.
      finetuned: without a penalty.
      training: with the importance on A's training data.
      held_out: with the importance on all held-out examples.
      few: `[num_numbers]`, with the importance on so many of them.
      by_class: `[NUM_CLASSES, NUM_CLASSES]`: with the importance on class i alone, on the examples of class j.
      on_b: `[3]`, on B: finetuned, training, held_out.
      correlation: of the importance on all held-out examples with that on the training data, over the parameters.
      few_correlation: `[num_numbers]`, the same for the few.
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
    """Runs the study.

    Args:
      config: the whole configuration.
    """
    console = rich.console.Console()
    with open_run(config, "unlabelled", console) as run:
        dataset = load_dataset("digits")
        function = functools.partial(measure, config, dataset)
        values = Measured(**measure_seeds(function, config.seeds, run, console))
        report(config, values, run, console)
        draw(config, values, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def measure(config: Config, dataset: Dataset, key: jax.Array) -> Measured:
    """Learns A, and then B once for each source of the importance."""
    split_key, tasks_key, init_key, a_key, b_key = jax.random.split(key, 5)
    halves = hold_out_validation(dataset, 0.5, split_key)
    size = NUM_HELD_OUT
    train, unlabelled = (jax.tree.map(lambda leaf: leaf[:size], half) for half in (halves.train, halves.test))
    shown_a, shown_b = (task.permutation for task in permuted_tasks(train, dataset.test, 2, tasks_key))
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
    params = learn(start, none, permutation=shown_a, key=a_key)

    importance = functools.partial(importance_on, model, params, permutation=shown_a)
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
        after = learn(params, Consolidation(params, omega), permutation=shown_b, key=b_key)
        correct[name] = np.asarray(is_correct(model, after, dataset.test, shown_a))
        on_b[name] = np.asarray(is_correct(model, after, dataset.test, shown_b)).mean()
    flat = {
        name: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(omega)]) for name, omega in sources.items()
    }
    counts = [str(count) for count in config.num_unlabelled]
    correlations = [np.corrcoef(flat["training"], flat[name])[0, 1] for name in ("held_out", *counts)]
    labels = np.asarray(dataset.test.labels)
    return Measured(
        before=np.asarray(is_correct(model, params, dataset.test, shown_a)).mean(),
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
    """Computes MAS's importance; there are no labels to hand over."""
    return mas_importance(permuted(model.apply, permutation), params, inputs, weights=weights)


def own_class_advantage(by_class: np.ndarray) -> float:
    """Computes how much better a class is kept by its own importance than by the others': a mean over classes."""
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
    print_table(console, "What is left of task A after task B", header, rows)
    (run.folder / "table.md").write_text(markdown_table(header, rows))


def draw(config: Config, values: Measured, run: Run) -> None:
    """Draws `unlabelled.png`."""
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
    left.set_title("by what Ω is computed on", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="center right")
    mean = 100 * values.by_class.mean(axis=0)
    relative = mean - mean.mean(axis=0)
    limit = np.abs(relative).max()
    image = right.imshow(relative, cmap="PuOr", vmin=-limit, vmax=limit)
    right.set(xlabel="accuracy on class", ylabel="Ω computed on class", xticks=range(10), yticks=range(10))
    right.set_title(f"a class's own Ω keeps it {advantage:.0f} points better", fontsize=10)
    figure.colorbar(image, ax=right, label="points above the column's mean", shrink=0.9)
    figure.savefig(run.folder / "unlabelled.png")


if __name__ == "__main__":
    main(parse_settings(Config, "unlabelled"))
