"""Compares ways of learning a sequence of tasks over several seeds: with progress, a log, a table and pictures."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
import rich.console

from lifelong_jax import metrics
from lifelong_jax.continual import LearnedSequence, Progress
from lifelong_jax.plotting import plot_accuracy_curves, plot_accuracy_matrices
from lifelong_jax.resuming import ResumableSequence
from lifelong_jax.runs import Estimate, Run, estimate, format_estimate, markdown_table, print_table, progress_bar
from lifelong_jax.types import Example, Params, Task

Learner: TypeAlias = Callable[..., LearnedSequence]
"""`learner(params, tasks, key, num_epochs=, report=, checkpoints=)`: `learn_tasks` or `learn_jointly`, all else filled
in."""


_MEASURED = ("accuracy_matrix", "initial_accuracies", "training_seconds", "importance_seconds")  # of LearnedSequence


class Outcome(NamedTuple):
    """What a learner did, over seeds.

    Attributes:
      accuracy_matrix: `[num_seeds, num_tasks, num_tasks]`, fractions; NaN where not measured.
      initial_accuracies: `[num_seeds, num_tasks]`, fractions, before any task was learned; NaN where not measured.
      curves: `[num_seeds, num_epochs, num_tasks]`, the test accuracy after each epoch of the whole sequence; NaN before
        a task's turn.
      training_seconds: `[num_seeds]`.
      importance_seconds: `[num_seeds]`.
    """

    accuracy_matrix: np.ndarray
    initial_accuracies: np.ndarray
    curves: np.ndarray
    training_seconds: np.ndarray
    importance_seconds: np.ndarray


_METRICS = (
    "average_accuracy",
    "average_incremental_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
)
_BASELINES = ("finetune", "l2")


def compare(
    learners: Mapping[str, Learner],
    make_tasks: Callable[[jax.Array], Sequence[Task]],
    init_params: Callable[[jax.Array, Example], Params],
    seeds: Sequence[int],
    num_epochs: int,
    run: Run,
    console: rich.console.Console,
    *,
    split: str | None = None,
    keep_tasks: bool = False,
) -> dict[str, Outcome]:
    """Lets each learner learn the same sequences of tasks, one for each seed, with a progress bar.

    A seed sets the tasks, the initial parameters and the shuffling, for every learner alike, so that their differences
    can be taken seed by seed. In a run that is resumed, what is in its log is not computed again.

    Args:
      learners: by name.
      make_tasks: `make_tasks(key) -> tasks`.
      init_params: `init_params(key, x) -> params`, x one example's input: `functools.partial(init_network, model)`,
        say.
      seeds: integers.
      num_epochs: passes over each task's training examples.
      run: where each epoch and each sequence is logged, and checkpoints are.
      console: where the progress bar is shown.
      split: what the log calls it; "validation" where strengths are chosen.
      keep_tasks: whether each task's own parameters and importance are kept; see `ResumableSequence.task_file`.

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
                sequence = ResumableSequence(run, method=name, seed=seed, split=split, keep_tasks=keep_tasks)
                measured = sequence.result()
                if measured is None:
                    show = functools.partial(_show, curve, functools.partial(bar.update, line), done)
                    learn = functools.partial(learner, num_epochs=num_epochs, checkpoints=sequence)
                    params = init_params(params_key, tasks[0].train.inputs[0])
                    measured = _measure(learn, params, tasks, learning_key, sequence, show, console)
                for progress in sequence.earlier_epochs():
                    curve[progress.epochs - 1, : len(progress.accuracies)] = progress.accuracies
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


def _measure(
    learn: Learner,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    sequence: ResumableSequence,
    show: Callable[[Progress], None],
    console: rich.console.Console,
) -> dict[str, np.ndarray]:
    def report(progress: Progress) -> None:
        sequence.log_epoch(progress)
        show(progress)

    try:
        result = learn(params, tasks, key, report=report)
        measured = {field: getattr(result, field) for field in _MEASURED}
    except FloatingPointError as error:  # one strength too many must not cost all the others
        console.print(f"{sequence.name}: {error}", highlight=False)
        nowhere = np.full((len(tasks), len(tasks)), np.nan)
        accuracies = {"accuracy_matrix": nowhere, "initial_accuracies": nowhere[0]}
        measured = dict.fromkeys(_MEASURED, np.nan) | accuracies
    sequence.finish(**measured)
    return measured


def _show(curve: np.ndarray, update_bar: Callable[..., None], done: int, progress: Progress) -> None:
    curve[progress.epochs - 1, : len(progress.accuracies)] = progress.accuracies
    where = "all tasks" if progress.task is None else f"task {progress.task + 1}"
    status = f"{where}, loss {progress.loss:.3f}, accuracy {progress.accuracies[-1]:.3f}"
    update_bar(completed=done + progress.epochs, status=status)


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
      margin_over: for each baseline there is, how far the average accuracy is above its, seed by seed.
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
    """Prints the table; writes `summary.json`, `table.md`, `accuracy.png` and `accuracy_matrices.png`.

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
    plot_accuracy_curves(
        {name: outcome.curves for name, outcome in outcomes.items()},
        task_names,
        num_epochs,
        f"{title}: average accuracy at the end, percent: {finding}",
        run.folder / "accuracy.png",
    )
    plot_accuracy_matrices(
        {name: of_method.accuracy_matrix for name, of_method in summary.items()},
        task_names,
        f"{title}: test accuracy in percent, by the task learned last",
        run.folder / "accuracy_matrices.png",
    )
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
