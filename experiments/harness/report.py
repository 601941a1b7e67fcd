"""What a script shows: progress, quantities over seeds, tables, and the report of a comparison."""

import csv
import functools
import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.cells
import rich.console
import rich.progress
import rich.table
import rich.text
from numpy.typing import ArrayLike

from experiments.harness.runs import Run
from experiments.harness.scores import ACCURACY, Score
from lifelong_jax import metrics
from lifelong_jax._tables import markdown_table


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
    mean = f"{scale * quantity.mean:z.{digits}f}"  # z: no minus sign before 0.0
    return mean if math.isnan(quantity.stderr) else f"{mean}±{scale * quantity.stderr:.{digits}f}"


def format_score(quantity: Estimate, score: Score) -> str:
    """Formats a score, or a difference of scores, for a table.

    Args:
      quantity: the estimate, a fraction if it is of accuracies.
      score: how it is shown.

    Returns:
      The text, as `format_estimate` makes it.

    Example:
      >>> format_score(estimate([0.5, 0.7]), ACCURACY)
      '60.0±10.0'
    """
    return format_estimate(quantity, score.factor, score.digits)


def print_table(
    console: rich.console.Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a table. The names of its columns are broken at spaces where it would be too wide; values are never cut.

    Args:
      console: where it is printed.
      title: the line above it.
      header: the names of the columns.
      rows: a text for each column.
    """
    widths = [max((rich.cells.cell_len(row[index]) for row in rows), default=0) for index in range(len(header))]
    most_words = max(len(name.split()) for name in header)
    for num_lines in range(1, most_words + 1):
        broken = [_break(name, num_lines, width) for name, width in zip(header, widths, strict=True)]
        columns = zip(widths, broken, strict=True)
        total = sum(1 + max(width, *map(rich.cells.cell_len, lines)) for width, lines in columns)
        if total <= console.width:
            break
    table = rich.table.Table(box=None, padding=(0, 1, 0, 0), width=total)
    for index, lines in enumerate(broken):
        table.add_column("\n".join(lines), justify="left" if index == 0 else "right", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", highlight=False, soft_wrap=True)
    console.print(table, crop=False)


def report_tables(tables: Mapping[str, Sequence[Sequence[str]]], run: Run, console: rich.console.Console) -> None:
    """Prints tables, and writes them into `table.md`.

    Args:
      tables: for each title, the header and the rows.
      run: where the file goes.
      console: where the tables are printed.
    """
    for title, (header, *rows) in tables.items():
        print_table(console, title, header, rows)
    markdown = "\n".join(markdown_table(header, rows) for header, *rows in tables.values())
    (run.folder / "table.md").write_text(markdown, encoding="utf-8")


def _break(name: str, num_lines: int, at_least: int) -> list[str]:
    """Breaks a name at spaces into at most so many lines, as narrow as they can be, but no narrower than `at_least`."""
    for width in range(max(1, at_least), len(name)):
        lines = textwrap.wrap(name, width, break_long_words=False, break_on_hyphens=False)
        if len(lines) <= num_lines:
            return lines
    return [name]


class _StatusColumn(rich.progress.ProgressColumn):
    """The field `status`, cut off where it is too long for the screen."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    """Makes a progress bar that shows the time left (at the end, the time taken) and each task's field `status`.

    Args:
      console: where it is shown; if that is not a terminal, it is shown once, at the end.

    Returns:
      The bar, to be used in a `with` statement.
    """
    whole = functools.partial(rich.table.Column, no_wrap=True)
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", table_column=whole()),
        rich.progress.BarColumn(bar_width=10, table_column=whole()),
        rich.progress.MofNCompleteColumn(table_column=whole()),
        rich.progress.TimeRemainingColumn(elapsed_when_finished=True, table_column=whole()),
        _StatusColumn(),
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
      accuracy_matrix: `[num_seeds, num_tasks, num_tasks]`, fractions, or another score; NaN where not measured.
      initial_accuracies: `[num_seeds, num_tasks]`, before any task was learned; NaN where not measured.
      curves: `[num_seeds, num_epochs, num_tasks]`, the test score after each epoch of the whole sequence; NaN before a
        task is learned.
      training_seconds: `[num_seeds]`, compilation left out.
      importance_seconds: `[num_seeds]`, compilation left out.
    """

    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray
    curves: np.ndarray
    training_seconds: np.ndarray
    importance_seconds: np.ndarray


def fail_if_all_diverged(accuracies: Iterable[ArrayLike]) -> None:
    """Ends the program with an error if training diverged for every entry of a table.

    Args:
      accuracies: of each entry, over seeds; NaN where training diverged.

    Raises:
      SystemExit: if each entry has a NaN, so that it is "–" in the table.

    Example:
      >>> fail_if_all_diverged([[0.9, np.nan], [0.5, 0.6]])
    """
    if all(np.isnan(of_entry).any() for of_entry in accuracies):
        raise SystemExit("error: no result, because training diverged: lower the learning rate or the strengths")


class Summary(NamedTuple):
    """A learner's metrics over seeds; accuracies are fractions. Another score stands in their place.

    Attributes:
      average_accuracy: over all tasks, after the last.
      average_incremental_accuracy: see `metrics`, as for the next four.
      forgetting: since a task's best.
      backward_transfer: of later tasks on earlier ones.
      forward_transfer: of earlier tasks on later ones.
      intransigence: against the learner named "joint"; NaN where there is none.
      first_task_accuracy: after the last task.
      last_task_accuracy: after the last task.
      accuracy_matrix: `[num_tasks, num_tasks]`, the mean over seeds.
      margin_over: for each baseline, by how much the average accuracy is better, seed by seed.
    """

    average_accuracy: Estimate
    average_incremental_accuracy: Estimate
    forgetting: Estimate
    backward_transfer: Estimate
    forward_transfer: Estimate
    intransigence: Estimate
    first_task_accuracy: Estimate
    last_task_accuracy: Estimate
    accuracy_matrix: np.ndarray
    margin_over: dict[str, Estimate]


def summarize(outcomes: Mapping[str, Outcome], *, higher_is_better: bool = True) -> dict[str, Summary]:
    """Computes each learner's metrics over seeds.

    Args:
      outcomes: from `compare`.
      higher_is_better: whether a higher score is better.

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
        directed = functools.partial(metric, higher_is_better=higher_is_better)
        return estimate([directed(*of_seed) for of_seed in zip(*arrays, strict=True)])

    def margin(name: str, baseline: str) -> Estimate:
        difference = averages[name] - averages[baseline]
        return estimate(difference if higher_is_better else -difference)

    summaries = {}
    for name, outcome in outcomes.items():
        matrices = outcome.accuracy_matrix
        baselines = [baseline for baseline in _BASELINES if baseline in outcomes and name not in _BASELINES]
        summaries[name] = Summary(
            average_accuracy=estimate(averages[name]),
            average_incremental_accuracy=estimate(list(map(metrics.average_incremental_accuracy, matrices))),
            forgetting=over_seeds(metrics.forgetting, matrices),
            backward_transfer=over_seeds(metrics.backward_transfer, matrices),
            forward_transfer=over_seeds(metrics.forward_transfer, matrices, outcome.initial_accuracies),
            intransigence=over_seeds(metrics.intransigence, matrices, joint_accuracies),
            first_task_accuracy=estimate(matrices[:, -1, 0]),
            last_task_accuracy=estimate(matrices[:, -1, -1]),
            accuracy_matrix=matrices.mean(axis=0),
            margin_over={baseline: margin(name, baseline) for baseline in baselines},
        )
    return summaries


def report_comparison(
    outcomes: Mapping[str, Outcome],
    title: str,
    task_names: Sequence[str],
    num_epochs: int,
    compilation_seconds: float,
    run: Run,
    console: rich.console.Console,
    *,
    score: Score = ACCURACY,
) -> None:
    """Prints the tables; writes `summary.json`, `table.md`, `table.csv`, `times.json`, and three pictures.

    The pictures are `accuracy.png`, `average_accuracy.png` and `accuracy_matrices.png`; another score has its own name
    there, and in `summary.json` and `table.csv`. Only `times.json` has times, so that the other files of equal runs are
    equal.

    Args:
      outcomes: from `compare`.
      title: what was learned.
      task_names: the tasks' names, short.
      num_epochs: passes over each task's training examples.
      compilation_seconds: from `time_compilation`.
      run: where the files go.
      console: where the tables are printed.
      score: what was measured.
    """
    summary = summarize(outcomes, higher_is_better=score.higher_is_better)
    run.write_summary({"methods": {name: _renamed(of_method, score) for name, of_method in summary.items()}})
    num_seeds = len(next(iter(outcomes.values())).training_seconds)
    spread = f", mean±standard error over {num_seeds} seeds" if num_seeds > 1 else ""
    unit = "percent" if score.in_percent else score.name
    tables = {f"{title}: {unit}{spread}": _metrics_table(summary, score)}
    if not score.in_percent:  # a loss of 2 may be low on one task, and high on another
        of_tasks = f"{score.name.capitalize()} on each task after the last{spread}"
        tables[of_tasks] = _tasks_table(outcomes, task_names, score)
    baselines = [baseline for baseline in _BASELINES if baseline in summary]
    if baselines:
        tables[f"Differences in average {score.name}{spread}"] = _margins_table(summary, baselines, score)
    report_tables(tables, run, console)
    (run.folder / "table.csv").write_text(_csv(summary, score), encoding="utf-8")
    _report_times(outcomes, compilation_seconds, spread, run, console)
    _draw_comparison(outcomes, summary, title, task_names, num_epochs, run, score)
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def _renamed(of_method: Summary, score: Score) -> dict[str, Any]:
    return {score.rename(key): value for key, value in of_method._asdict().items()}


def _metrics_table(summary: Mapping[str, Summary], score: Score) -> list[list[str]]:
    header = ["method", *(score.rename(key).replace("_", " ") for key in _METRICS)]
    return [header] + [
        [name, *(format_score(getattr(of_method, key), score) for key in _METRICS)]
        for name, of_method in summary.items()
    ]


def _tasks_table(outcomes: Mapping[str, Outcome], task_names: Sequence[str], score: Score) -> list[list[str]]:
    return [["method", *task_names]] + [
        [name, *(format_score(estimate(of_task), score) for of_task in outcome.accuracy_matrix[:, -1].T)]
        for name, outcome in outcomes.items()
    ]


def _margins_table(summary: Mapping[str, Summary], baselines: Sequence[str], score: Score) -> list[list[str]]:
    none, side = estimate([np.nan]), "above" if score.higher_is_better else "below"
    header = ["method", *(f"{side} {baseline}" for baseline in baselines)]
    return [header] + [
        [name, *(format_score(of_method.margin_over.get(baseline, none), score) for baseline in baselines)]
        for name, of_method in summary.items()
    ]


def _csv(summary: Mapping[str, Summary], score: Score) -> str:
    """The metrics, accuracies as fractions, with their standard errors; empty where a metric is not defined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = map(score.rename, _METRICS)
    writer.writerow(["method", *(column for name in names for column in (name, f"{name}_stderr"))])
    for name, of_method in summary.items():
        numbers = [number for key in _METRICS for number in getattr(of_method, key)[:2]]
        writer.writerow([name, *("" if math.isnan(number) else number for number in numbers)])
    return text.getvalue()


def _report_times(
    outcomes: Mapping[str, Outcome], compilation_seconds: float, spread: str, run: Run, console: rich.console.Console
) -> None:
    times = {
        name: (estimate(outcome.training_seconds), estimate(outcome.importance_seconds))
        for name, outcome in outcomes.items()
    }
    rows = [[name, *map(format_estimate, of_method)] for name, of_method in times.items()]
    print_table(console, f"Seconds per sequence{spread}", ["method", "training", "importance"], rows)
    added_up = f"Compilation is left out: it took {compilation_seconds:.0f} s, added up over all sequences."
    console.print(added_up, highlight=False, soft_wrap=True)
    methods = {name: dict(zip(("training", "importance"), of_method, strict=True)) for name, of_method in times.items()}
    run.write_json("times.json", {"methods": methods, "compilation": compilation_seconds})


def _draw_comparison(
    outcomes: Mapping[str, Outcome],
    summary: Mapping[str, Summary],
    title: str,
    task_names: Sequence[str],
    num_epochs: int,
    run: Run,
    score: Score,
) -> None:
    from lifelong_jax import plotting  # here, as matplotlib is slow to import

    finding = ", ".join(  # no line may end between a name and its number
        f"{name}\N{NO-BREAK SPACE}{format_estimate(of_method.average_accuracy, score.factor, score.digits - 1)}"
        for name, of_method in summary.items()
    )
    pictures = {
        "accuracy": plotting.plot_accuracy_curves(
            {name: outcome.curves for name, outcome in outcomes.items()},
            task_names,
            num_epochs,
            f"{title}: average {score.name} at the end{', percent' * score.in_percent}: {finding}",
            score=score.name,
        ),
        "average_accuracy": plotting.plot_average_accuracy(
            {name: outcome.accuracy_matrix for name, outcome in outcomes.items()}, title, score=score.name
        ),
        "accuracy_matrices": plotting.plot_accuracy_matrices(
            {name: of_method.accuracy_matrix for name, of_method in summary.items()},
            task_names,
            f"{title}: test {score.name}{' in percent' * score.in_percent}, by the task learned last",
            score=score.name,
            higher_is_better=score.higher_is_better,
        ),
    }
    for name, figure in pictures.items():
        figure.savefig(run.folder / f"{score.rename(name)}.png")
