"""What a script shows: progress, quantities over seeds, tables, and the report of a comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import rich.console
import rich.progress
import rich.table
from numpy.typing import ArrayLike

from experiments.harness.runs import Run
from lifelong_jax import metrics
from lifelong_jax._tables import markdown_table
from lifelong_jax.plotting import plot_accuracy_curves, plot_accuracy_matrices, plot_average_accuracy


class Estimate(NamedTuple):
    """A quantity over seeds.

    Attributes:
      mean: the mean over seeds; NaN if the quantity is not defined.
      stderr: the standard error of the mean, from the sample standard deviation (ddof=1); NaN for a single seed.
      values: a value for each seed.
    """

    mean: float
    stderr: float
    values: list[float]


def estimate(values: ArrayLike) -> Estimate:
    """Computes the mean of a quantity over seeds, and its standard error.

    Args:
      values: `[num_seeds]`, at least one.

    Returns:
      The estimate.

    Example:
      >>> estimate([1.0, 2.0, 3.0]).mean
      2.0
    """
    values = np.asarray(values, np.float64)
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), stderr, values.tolist())


def format_estimate(quantity: Estimate, scale: float = 1.0, digits: int = 1) -> str:
    """Formats a quantity for a table: `mean±standard error`.

    Args:
      quantity: the estimate.
      scale: a factor; 100 for percent.
      digits: after the decimal point.

    Returns:
      The text; "–" if the quantity is not defined, and no ± for a single seed.

    Example:
      >>> format_estimate(estimate([0.5, 0.7]), scale=100)
      '60.0±10.0'
    """
    if math.isnan(quantity.mean):
        return "–"
    mean = f"{scale * quantity.mean:.{digits}f}"
    return mean if math.isnan(quantity.stderr) else f"{mean}±{scale * quantity.stderr:.{digits}f}"


def print_table(
    console: rich.console.Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a table.

    Args:
      console: where it is printed.
      title: the line above it.
      header: the names of the columns.
      rows: a text for each column.
    """
    table = rich.table.Table(box=None, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        # One word per line, so that eight columns fit a screen of 80 characters.
        table.add_column(name.replace(" ", "\n"), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", highlight=False)
    console.print(table)


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    """Makes a progress bar that shows the time left (at the end, the time taken) and each task's field `status`.

    Args:
      console: where it is shown; if that is not a terminal, it is shown once, at the end.

    Returns:
      The bar, to be used in a `with` statement.
    """
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=10),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
        rich.progress.TextColumn("{task.fields[status]}"),
        console=console,
    )


_METRICS = (
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
)
_BASELINES = ("finetune", "l2")


class Outcome(NamedTuple):
    """What was measured of a learner, over seeds.

    Attributes:
      accuracy_matrix: `[num_seeds, num_tasks, num_tasks]`, fractions; NaN where not measured.
      initial_accuracies: `[num_seeds, num_tasks]`, fractions, before any task was learned; NaN where not measured.
      curves: `[num_seeds, num_epochs, num_tasks]`, the test accuracy after each epoch of the whole sequence; NaN before
        a task is learned.
      training_seconds: `[num_seeds]`.
      importance_seconds: `[num_seeds]`.
    """

    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray
    curves: np.ndarray
    training_seconds: np.ndarray
    importance_seconds: np.ndarray


class Summary(NamedTuple):
    """A learner's metrics over seeds; accuracies are fractions.

    Attributes:
      average_accuracy: over all tasks, after the last.
      average_incremental_accuracy: see `metrics`, as for the next four.
      forgetting: since a task's best.
      backward_transfer: of later tasks on earlier ones.
      forward_transfer: of earlier tasks on later ones.
      intransigence: against the learner named "joint"; NaN where there is none.
      first_task_accuracy: after the last task.
      last_task_accuracy: after the last task.
      training_seconds: compilation left out.
      importance_seconds: compilation left out.
      accuracy_matrix: `[num_tasks, num_tasks]`, the mean over seeds.
      margin_over: for each baseline, the difference of the average accuracies, seed by seed.
    """

    average_accuracy: Estimate
    average_incremental_accuracy: Estimate
    forgetting: Estimate
    backward_transfer: Estimate
    forward_transfer: Estimate
    intransigence: Estimate
    first_task_accuracy: Estimate
    last_task_accuracy: Estimate
    training_seconds: Estimate
    importance_seconds: Estimate
    accuracy_matrix: np.ndarray
    margin_over: dict[str, Estimate]


def summarize(outcomes: Mapping[str, Outcome]) -> dict[str, Summary]:
    """Computes each learner's metrics over seeds.

    Args:
      outcomes: from `compare`.

    Returns:
      A summary for each learner.
    """
    averages = {
        name: np.array([metrics.average_accuracy(matrix) for matrix in outcome.accuracy_matrix])
        for name, outcome in outcomes.items()
    }
    some = next(iter(outcomes.values()))
    no_joint = np.full_like(some.initial_accuracies, np.nan)
    joint_accuracies = outcomes["joint"].accuracy_matrix[:, -1] if "joint" in outcomes else no_joint

    def over_seeds(metric: Callable[..., float], *arrays: np.ndarray) -> Estimate:
        return estimate([metric(*of_seed) for of_seed in zip(*arrays, strict=True)])

    summaries = {}
    for name, outcome in outcomes.items():
        matrices = outcome.accuracy_matrix
        baselines = [baseline for baseline in _BASELINES if baseline in outcomes and name not in _BASELINES]
        summaries[name] = Summary(
            average_accuracy=estimate(averages[name]),
            average_incremental_accuracy=over_seeds(metrics.average_incremental_accuracy, matrices),
            forgetting=over_seeds(metrics.forgetting, matrices),
            backward_transfer=over_seeds(metrics.backward_transfer, matrices),
            forward_transfer=over_seeds(metrics.forward_transfer, matrices, outcome.initial_accuracies),
            intransigence=over_seeds(metrics.intransigence, matrices, joint_accuracies),
            first_task_accuracy=estimate(matrices[:, -1, 0]),
            last_task_accuracy=estimate(matrices[:, -1, -1]),
            training_seconds=estimate(outcome.training_seconds),
            importance_seconds=estimate(outcome.importance_seconds),
            accuracy_matrix=matrices.mean(axis=0),
            margin_over={baseline: estimate(averages[name] - averages[baseline]) for baseline in baselines},
        )
    return summaries


def report_comparison(
    outcomes: Mapping[str, Outcome],
    title: str,
    task_names: Sequence[str],
    num_epochs: int,
    run: Run,
    console: rich.console.Console,
) -> None:
    """Prints the table; writes `summary.json`, `table.md`, and three pictures.

    They are `accuracy.png`, `average_accuracy.png` and `accuracy_matrices.png`.

    Args:
      outcomes: from `compare`.
      title: what was learned.
      task_names: the tasks' names, short.
      num_epochs: passes over each task's training examples.
      run: where the files go.
      console: where the table is printed.
    """
    summary = summarize(outcomes)
    run.write_summary({"methods": summary})
    num_seeds = len(next(iter(outcomes.values())).training_seconds)
    spread = f", mean±standard error over {num_seeds} seeds" if num_seeds > 1 else ""
    baselines = [baseline for baseline in _BASELINES if baseline in summary]
    tables = {f"{title}: percent{spread}": _metrics_table(summary)}
    tables |= {f"Differences in average accuracy, and times{spread}": _margins_table(summary, baselines)}
    for caption, (header, *rows) in tables.items():
        print_table(console, caption, header, rows)
    markdown = "\n".join(markdown_table(header, rows) for header, *rows in tables.values())
    (run.folder / "table.md").write_text(markdown)
    finding = ", ".join(
        f"{name} {format_estimate(of_method.average_accuracy, 100, 0)}" for name, of_method in summary.items()
    )
    curves = {name: outcome.curves for name, outcome in outcomes.items()}
    curves_title = f"{title}: average accuracy at the end, percent: {finding}"
    plot_accuracy_curves(curves, task_names, num_epochs, curves_title).savefig(run.folder / "accuracy.png")
    of_seeds = {name: outcome.accuracy_matrix for name, outcome in outcomes.items()}
    plot_average_accuracy(of_seeds, title).savefig(run.folder / "average_accuracy.png")
    matrices = {name: of_method.accuracy_matrix for name, of_method in summary.items()}
    matrices_title = f"{title}: test accuracy in percent, by the task learned last"
    plot_accuracy_matrices(matrices, task_names, matrices_title).savefig(run.folder / "accuracy_matrices.png")
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def _metrics_table(summary: Mapping[str, Summary]) -> list[list[str]]:
    header = ["method", *(key.replace("_", " ") for key in _METRICS)]
    return [header] + [
        [name, *(format_estimate(getattr(of_method, key), 100) for key in _METRICS)]
        for name, of_method in summary.items()
    ]


def _margins_table(summary: Mapping[str, Summary], baselines: Sequence[str]) -> list[list[str]]:
    none = estimate([np.nan])
    header = ["method", *(f"above {baseline}" for baseline in baselines), "training seconds", "importance seconds"]
    return [header] + [
        [
            name,
            *(format_estimate(of_method.margin_over.get(baseline, none), 100) for baseline in baselines),
            *(format_estimate(seconds) for seconds in (of_method.training_seconds, of_method.importance_seconds)),
        ]
        for name, of_method in summary.items()
    ]
