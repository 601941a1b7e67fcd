"""Compares ways of learning a sequence of tasks over several seeds: with progress, a log, a table and pictures."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
import rich.console

from lifelong_jax.continual import LearnedSequence, Progress
from lifelong_jax.metrics import average_accuracy, backward_transfer, forgetting
from lifelong_jax.plotting import plot_accuracy_curves, plot_accuracy_matrices
from lifelong_jax.runs import Estimate, Run, estimate, format_estimate, markdown_table, print_table, progress_bar
from lifelong_jax.types import Params, Task

Learner: TypeAlias = Callable[..., LearnedSequence]
"""`learner(params, tasks, key, num_epochs=, report=)`: `learn_tasks` or `learn_jointly`, all else filled in."""


_MEASURED = ("accuracy_matrix", "training_seconds", "importance_seconds")  # of a LearnedSequence


class Outcome(NamedTuple):
    """What a learner did, over seeds.

    Attributes:
      accuracy_matrix: `[num_seeds, num_tasks, num_tasks]`, fractions; NaN where not measured.
      curves: `[num_seeds, num_epochs, num_tasks]`, the test accuracy after each epoch of the whole sequence; NaN before
        a task's turn.
      training_seconds: `[num_seeds]`.
      importance_seconds: `[num_seeds]`.
    """

    accuracy_matrix: np.ndarray
    curves: np.ndarray
    training_seconds: np.ndarray
    importance_seconds: np.ndarray


_COLUMNS = {
    "average accuracy": ("average_accuracy", 100, 1),
    "forgetting": ("forgetting", 100, 1),
    "backward transfer": ("backward_transfer", 100, 1),
    "first task": ("first_task_accuracy", 100, 1),
    "last task": ("last_task_accuracy", 100, 1),
    "training seconds": ("training_seconds", 1, 1),
    "importance seconds": ("importance_seconds", 1, 1),
}
_BASELINES = ("finetune", "l2")


def compare(
    learners: Mapping[str, Learner],
    make_tasks: Callable[[jax.Array], Sequence[Task]],
    init_params: Callable[[jax.Array], Params],
    seeds: Sequence[int],
    num_epochs: int,
    log: Callable[..., None],
    console: rich.console.Console,
) -> dict[str, Outcome]:
    """Lets each learner learn the same sequences of tasks, one for each seed, with a progress bar.

    A seed sets the tasks, the initial parameters and the shuffling, for every learner alike, so that their differences
    can be taken seed by seed.

    Args:
      learners: by name.
      make_tasks: `make_tasks(key) -> tasks`.
      init_params: `init_params(key) -> params`.
      seeds: integers.
      num_epochs: passes over each task's training examples.
      log: called with a row of names and values after each epoch and each sequence; `Run.log`, say.
      console: where the progress bar is shown.

    Returns:
      For each learner, what it did.
    """
    outcomes: dict[str, Outcome] = {}
    with progress_bar(console) as bar:
        line = bar.add_task("", total=None, status="")
        for name, learner in learners.items():
            learned, curves = [], []
            start = time.perf_counter()
            for count, seed in enumerate(seeds):
                tasks_key, params_key, learning_key = jax.random.split(jax.random.key(seed), 3)
                tasks = make_tasks(tasks_key)
                curve = np.full((len(tasks) * num_epochs, len(tasks)), np.nan)
                done = (len(outcomes) * len(seeds) + count) * len(curve)
                bar.update(line, total=len(learners) * len(seeds) * len(curve), description=name)
                log_of_run = functools.partial(log, method=name, seed=seed)
                report = functools.partial(_report, curve, log_of_run, functools.partial(bar.update, line), done)
                try:
                    result = learner(init_params(params_key), tasks, learning_key, num_epochs=num_epochs, report=report)
                    measured = {field: getattr(result, field) for field in _MEASURED}
                except FloatingPointError as error:  # one strength too many must not cost all the others
                    console.print(f"{name}, seed {seed}: {error}", highlight=False)
                    nowhere = np.full((len(tasks), len(tasks)), np.nan)
                    measured = dict.fromkeys(_MEASURED, np.nan) | {"accuracy_matrix": nowhere}
                log_of_run(event="sequence", **measured)
                bar.update(line, completed=done + len(curve))
                learned.append(measured)
                curves.append(curve)
            stacked = {field: np.stack([measured[field] for measured in learned]) for field in _MEASURED}
            outcomes[name] = Outcome(curves=np.stack(curves), **stacked)
            accuracy = format_estimate(summarize(outcomes)[name].average_accuracy, 100)
            console.print(
                f"{name}: average accuracy {accuracy} %, in {time.perf_counter() - start:.0f} s", highlight=False
            )
    return outcomes


def _report(
    curve: np.ndarray, log: Callable[..., None], update_bar: Callable[..., None], done: int, progress: Progress
) -> None:
    curve[progress.epochs - 1, : len(progress.accuracies)] = progress.accuracies
    log(event="epoch", **progress._asdict())
    where = "all tasks" if progress.task is None else f"task {progress.task + 1}"
    status = f"{where}, loss {progress.loss:.3f}, accuracy {progress.accuracies[-1]:.3f}"
    update_bar(completed=done + progress.epochs, status=status)


class Summary(NamedTuple):
    """A learner's metrics over seeds; accuracies are fractions.

    Attributes:
      average_accuracy: over all tasks, after the last.
      forgetting: see `metrics.forgetting`.
      backward_transfer: see `metrics.backward_transfer`.
      first_task_accuracy: after the last task.
      last_task_accuracy: after the last task.
      training_seconds: compilation left out.
      importance_seconds: compilation left out.
      accuracy_matrix: `[num_tasks, num_tasks]`, the mean over seeds.
      margin_over: for each baseline there is, how far the average accuracy is above its, seed by seed.
    """

    average_accuracy: Estimate
    forgetting: Estimate
    backward_transfer: Estimate
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
        name: np.array([average_accuracy(matrix) for matrix in outcome.accuracy_matrix])
        for name, outcome in outcomes.items()
    }
    summaries = {}
    for name, outcome in outcomes.items():
        matrices = outcome.accuracy_matrix
        baselines = [baseline for baseline in _BASELINES if baseline in outcomes and name not in _BASELINES]
        summaries[name] = Summary(
            average_accuracy=estimate(averages[name]),
            forgetting=estimate([forgetting(matrix) for matrix in matrices]),
            backward_transfer=estimate([backward_transfer(matrix) for matrix in matrices]),
            first_task_accuracy=estimate(matrices[:, -1, 0]),
            last_task_accuracy=estimate(matrices[:, -1, -1]),
            training_seconds=estimate(outcome.training_seconds),
            importance_seconds=estimate(outcome.importance_seconds),
            accuracy_matrix=matrices.mean(axis=0),
            margin_over={baseline: estimate(averages[name] - averages[baseline]) for baseline in baselines},
        )
    return summaries


def report_comparison(
    outcomes: Mapping[str, Outcome], title: str, num_epochs: int, run: Run, console: rich.console.Console
) -> None:
    """Prints the table; writes `summary.json`, `table.md`, `accuracy.png` and `accuracy_matrices.png`.

    Args:
      outcomes: from `compare`.
      title: what was learned.
      num_epochs: passes over each task's training examples.
      run: where the files go.
      console: where the table is printed.
    """
    summary = summarize(outcomes)
    run.write_summary({"methods": summary})
    header = ["method", *_COLUMNS]
    rows = [
        [name, *(format_estimate(getattr(metrics, key), scale, digits) for key, scale, digits in _COLUMNS.values())]
        for name, metrics in summary.items()
    ]
    num_seeds = len(next(iter(outcomes.values())).training_seconds)
    spread = f", mean±standard error over {num_seeds} seeds" if num_seeds > 1 else ""
    print_table(console, f"{title}: percent{spread}", header, rows)
    markdown = markdown_table(header, rows)
    baselines = [baseline for baseline in _BASELINES if baseline in summary]
    if baselines:
        header = ["average accuracy of", *(f"above {baseline}" for baseline in baselines)]
        rows = [
            [name, *(format_estimate(margin, 100) for margin in metrics.margin_over.values())]
            for name, metrics in summary.items()
            if metrics.margin_over
        ]
        print_table(console, f"Differences, seed by seed: percentage points{spread}", header, rows)
        markdown += "\n" + markdown_table(header, rows)
    (run.folder / "table.md").write_text(markdown)
    finding = ", ".join(
        f"{name} {format_estimate(metrics.average_accuracy, 100, 0)}" for name, metrics in summary.items()
    )
    plot_accuracy_curves(
        {name: outcome.curves for name, outcome in outcomes.items()},
        num_epochs,
        f"{title}: average accuracy at the end, percent: {finding}",
        run.folder / "accuracy.png",
    )
    plot_accuracy_matrices(
        {name: metrics.accuracy_matrix for name, metrics in summary.items()},
        f"{title}: test accuracy in percent, by the task learned last",
        run.folder / "accuracy_matrices.png",
    )
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)
