"""Compares ways of learning a sequence of tasks over several seeds, with progress and a log."""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
import rich.console
import rich.progress

from experiments.harness.parallel import map_as_finished
from experiments.harness.report import Outcome, estimate, format_score, progress_bar
from experiments.harness.runs import Run
from experiments.harness.scores import ACCURACY, Score
from experiments.harness.sequences import ResumableSequence, start_of_seed
from lifelong_jax.continual import Progress, SequenceState
from lifelong_jax.metrics import average_accuracy
from lifelong_jax.sweep import SweepRun
from lifelong_jax.types import Example, Params, Task

Learner: TypeAlias = Callable[
    [Params, Sequence[Task], jax.Array, ResumableSequence, Callable[[Progress], None]], SequenceState
]
"""`learner(params, tasks, key, sequence, report) -> state`: `learn_resumably` with method, recipe and strength."""

_MEASURED = ("accuracy_matrix", "initial_accuracies", "training_seconds", "importance_seconds")  # of SequenceState


def compare(
    learners: Mapping[str, Learner],
    make_tasks: Callable[[jax.Array], Sequence[Task]],
    init_params: Callable[[jax.Array, Example], Params],
    seeds: Sequence[int],
    num_epochs: int,
    run: Run,
    console: rich.console.Console,
    *,
    at_once: int,
    keep_tasks: bool = False,
    score: Score = ACCURACY,
) -> dict[str, Outcome]:
    """Lets each learner learn the same sequences of tasks, one for each seed, with a progress bar.

    A seed sets the tasks, the initial parameters and the shuffling, for every learner alike, so that learners can be
    compared seed by seed. What a resumed run has in its log is not computed again.

    Args:
      learners: the learners by name.
      make_tasks: `make_tasks(key) -> tasks`.
      init_params: `init_params(key, x) -> params`, x one example's input, such as
        `functools.partial(init_network, model)`.
      seeds: integers.
      num_epochs: passes over each task's training examples.
      run: the run, for the log and the checkpoints.
      console: where the progress bar is shown.
      at_once: how many sequences are learned at once.
      keep_tasks: whether each task's own parameters and importance are kept; see `ResumableSequence.task_file`.
      score: what the learners measure.

    Returns:
      What was measured of each learner.

    Raises:
      KeyboardInterrupt: if the run is asked to stop, once each sequence that is being learned has its checkpoint.
    """
    sequences = {
        (name, seed): ResumableSequence(run, method=name, seed=seed, score=score.name, keep_tasks=keep_tasks)
        for name in learners
        for seed in seeds
    }
    start_of = functools.partial(start_of_seed, make_tasks, init_params)
    learned: dict[tuple[str, int], tuple[dict[str, np.ndarray], np.ndarray]] = {}
    with progress_bar(console) as bar:
        line = _ProgressLine(bar, len(sequences))

        def learn(place: tuple[str, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
            name, _ = place
            show = functools.partial(line.show, place)
            return _learn_sequence(learners[name], start_of, num_epochs, sequences[place], show, console)

        begun = itertools.takewhile(lambda _: not run.is_stopping(), sequences)
        for place, measured_and_curve in map_as_finished(learn, begun, at_once):
            learned[place] = measured_and_curve
            name, _ = place
            if all((name, seed) in learned for seed in seeds):
                average = estimate([average_accuracy(learned[name, seed][0]["accuracy_matrix"]) for seed in seeds])
                seconds = time.perf_counter() - line.started[name]
                shown = f"{score.name} {format_score(average, score)}{' %' * score.in_percent}"
                text = f"{name}: average {shown}, in {seconds:.0f} s"
                console.print(text, highlight=False)
    if len(learned) < len(sequences):
        raise KeyboardInterrupt
    return {name: _stack([learned[name, seed] for seed in seeds]) for name in learners}


def _stack(learned: Sequence[tuple[dict[str, np.ndarray], np.ndarray]]) -> Outcome:
    measured = {key: np.stack([measured[key] for measured, _ in learned]) for key in _MEASURED}
    return Outcome(curves=np.stack([curve for _, curve in learned]), **measured)


class _ProgressLine:
    """The line of the progress bar: the epochs of all sequences."""

    def __init__(self, bar: rich.progress.Progress, num_sequences: int) -> None:
        self._update = functools.partial(bar.update, bar.add_task("", total=None, status=""))
        self._num_sequences = num_sequences
        self._epochs: dict[tuple[str, int], int] = {}
        self.started: dict[str, float] = {}

    def show(self, place: tuple[str, int], epochs: int, of: int, **status: str) -> None:
        """Shows how many of a sequence's epochs are learned."""
        self.started.setdefault(place[0], time.perf_counter())
        self._epochs[place] = epochs
        total, completed = self._num_sequences * of, sum(self._epochs.values())
        self._update(description=place[0], total=total, completed=completed, **status)


def _learn_sequence(
    learner: Learner,
    start_of: Callable[[int], SweepRun],
    num_epochs: int,
    sequence: ResumableSequence,
    show: Callable[..., None],
    console: rich.console.Console,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns what was measured of one sequence, and its curve `[num_epochs, num_tasks]`."""
    measured = sequence.result()
    start = start_of(sequence.seed) if measured is None else None
    num_tasks = len(start.tasks if measured is None else measured["accuracy_matrix"])
    curve = np.full((num_tasks * num_epochs, num_tasks), np.nan)
    show(0, len(curve))

    def draw(progress: Progress) -> None:
        curve[progress.epochs - 1, : len(progress.accuracies)] = progress.accuracies

    tested = sequence.score if sequence.score == ACCURACY.name else f"test {sequence.score}"

    def report(progress: Progress) -> None:
        sequence.log_epoch(progress)
        draw(progress)
        where = "all tasks" if progress.task is None else f"task {progress.task + 1}"
        status = f"seed {sequence.seed}, {where}, loss {progress.loss:.3f}, {tested} {progress.accuracies[-1]:.3f}"
        show(progress.epochs, len(curve), status=status)

    if start is not None:
        try:
            state = learner(start.params, start.tasks, start.key, sequence, report)
            measured = {field: getattr(state, field) for field in _MEASURED}
        except FloatingPointError as error:  # one strength too many must not cost all the others
            console.print(f"{sequence.name}: {error}", highlight=False)
            unknown = np.full((num_tasks, num_tasks), np.nan)
            accuracies = {"accuracy_matrix": unknown, "initial_accuracies": unknown[0]}
            measured = dict.fromkeys(_MEASURED, np.nan) | accuracies
        sequence.finish(**measured)
    for progress in sequence.earlier_epochs():
        draw(progress)
    show(len(curve), len(curve))
    return measured, curve
