"""Sequences of tasks that are stopped or killed, and go on where they were, to the same numbers."""

import pathlib
import time
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.harness.checkpoints import restore_checkpoint, save_checkpoint
from experiments.harness.meshes import place_tasks
from experiments.harness.runs import Run, row_key
from experiments.harness.scores import ACCURACY
from lifelong_jax import _files
from lifelong_jax._processes import any_of_all, to_host
from lifelong_jax.checkpoint import save_consolidation
from lifelong_jax.continual import Progress, SequenceState, init_sequence, learn_jointly, learn_tasks
from lifelong_jax.methods import Method
from lifelong_jax.models import split_variables
from lifelong_jax.recipes import Recipe
from lifelong_jax.sweep import SweepAccuracies, SweepRun, learn_sweep
from lifelong_jax.tasks import pad_tasks
from lifelong_jax.types import Consolidation, Example, ModelState, Params, Task

_LOGGED = ("task", "epochs", "loss", "accuracies")  # of Progress

CHECKPOINT_SECONDS = 10.0  # the least time between two checkpoints
CHECKPOINT_SHARE = 0.005  # the largest share of the time that is spent on writing them

MAX_PADDING = 2.0  # times the examples, for one compilation of all tasks: more is worth the compilations


class ResumableSequence:
    """One learner's sequence of tasks, from one seed, in a run: its checkpoints, and its rows in the log.

    A checkpoint is written after an epoch if 10 seconds have passed since the last one, or, if writing one takes longer
    than 50 milliseconds, 200 times as long as it took. One is also written when the run is asked to stop.
    """

    def __init__(
        self,
        run: Run,
        *,
        method: str,
        seed: int,
        split: str | None = None,
        score: str = ACCURACY.name,
        keep_tasks: bool = False,
    ) -> None:
        """Finds what the run has of it already.

        Args:
          run: the run that it belongs to.
          method: the learner's name.
          seed: the seed of its tasks.
          split: "validation" if strengths are chosen by it, else None.
          score: the name of what is measured; the log has it, unless it is the accuracy.
          keep_tasks: whether each task's own parameters and importance are kept, in `task_file`.
        """
        self.run, self.seed, self.score = run, seed, score
        self._labels = {"method": method, "seed": seed} | ({"split": split} if split else {})
        self._labels |= {"score": score} if score != ACCURACY.name else {}
        self.name = f"{split} {method}, seed {seed}" if split else f"{method}, seed {seed}"
        self._folder = run.folder / "sequences" / urllib.parse.quote(self.name, safe=" (),+=")
        self._keep_tasks = keep_tasks
        self._last_saved, self._cost = time.monotonic(), 0.0
        self._earlier = run.earlier_rows.pop(row_key(self._labels), [])

    def result(self) -> dict[str, np.ndarray] | None:
        """Returns what was measured, if the sequence was finished before the run was resumed.

        Returns:
          The values that `finish` got, or None.
        """
        for row in self._earlier:
            if row["event"] == "sequence":
                names = row.keys() - self._labels.keys() - {"event"}
                return {name: np.array(row[name], np.float64) for name in names}  # None, in JSON, was NaN
        return None

    def earlier_epochs(self) -> list[Progress]:
        """Returns what was logged before the run was resumed, up to the checkpoint.

        Returns:
          The progress after each of these epochs.
        """
        rows = [row | {"task": row["task"] and row["task"] - 1} for row in self._earlier if row["event"] == "epoch"]
        return [Progress(**{name: row[name] for name in _LOGGED}) for row in rows]

    def log_epoch(self, progress: Progress) -> None:
        """Logs an epoch. In the log, as in the names of files and on the screen, tasks are counted from 1.

        Args:
          progress: what is known after it.
        """
        values = {name: getattr(progress, name) for name in _LOGGED}
        number = None if progress.task is None else progress.task + 1
        self.run.log(event="epoch", **self._labels, **values | {"task": number})

    def finish(self, **measured: Any) -> None:
        """Logs what was measured of the whole sequence, and removes its checkpoints: it is finished.

        Args:
          **measured: names and arrays or numbers.
        """
        self.run.log(event="sequence", **self._labels, **measured)
        if self.run.writes:
            _files.discard(self._folder / "checkpoints")

    def restore(self, start: SequenceState) -> SequenceState:
        """Restores the newest checkpoint, and removes what was logged after it.

        Args:
          start: the state that the sequence starts from if there is no checkpoint.

        Returns:
          The state to go on from.
        """
        _, state = restore_checkpoint(self._folder / "checkpoints", like=start) or (0, start)
        logged = max((progress.epochs for progress in self.earlier_epochs()), default=0)
        if state is not start and logged < state.epochs:
            warnings.warn(f"{self._folder} starts anew: its log ends before its checkpoint", stacklevel=2)
            state = start
        epochs = state.epochs
        if logged > epochs:
            key = row_key(self._labels)
            self.run.keep_rows(lambda row: row_key(row) != key or row["epochs"] <= epochs)
        self._earlier = [row for row in self._earlier if row["epochs"] <= epochs]
        return state

    def save(self, state: SequenceState) -> None:
        """Writes a checkpoint, if one is due.

        Args:
          state: the state after an epoch.

        Raises:
          KeyboardInterrupt: if the run is asked to stop.
        """
        now = time.monotonic()
        stopping, due = any_of_all(
            self.run.stopping.is_set(),
            now - self._last_saved >= max(CHECKPOINT_SECONDS, self._cost / CHECKPOINT_SHARE),
        )
        if stopping or due:
            save_checkpoint(self._folder / "checkpoints", state.epochs, state)
            self._last_saved = time.monotonic()
            self._cost = self._last_saved - now
        if stopping:
            raise KeyboardInterrupt

    def keep_task(self, task: int, learned: Consolidation, estimator: str, num_examples: int) -> None:
        """Writes a task's own parameters and importance into its file, if tasks are kept.

        Args:
          task: the task's number, from 0.
          learned: the parameters, as anchor, and the importance.
          estimator: the method's name.
          num_examples: the number of the task's training examples.
        """
        if self._keep_tasks:
            file = self.task_file(task)
            save_consolidation(file, learned, estimator=estimator, num_examples=num_examples, sync=False)

    def task_file(self, task: int) -> pathlib.Path:
        """Returns the file of a task's own parameters and importance, for `load_consolidation`.

        Args:
          task: the task's number, from 0.

        Returns:
          The file.
        """
        return self._folder / f"task-{task + 1}.safetensors"


def start_of_seed(
    make_tasks: Callable[[jax.Array], Sequence[Task]],
    init_params: Callable[[jax.Array, Example], Params],
    seed: int,
    *,
    max_padding: float = MAX_PADDING,
) -> SweepRun:
    """Makes what a seed sets, for every learner alike: the tasks, the initial parameters and the key of the shuffling.

    Args:
      make_tasks: `make_tasks(key) -> tasks`.
      init_params: `init_params(key, x) -> params`, x one example's input.
      seed: an integer.
      max_padding: as for `pad_cheaply`.

    Returns:
      The start, with strength 0.
    """
    tasks_key, params_key, learning_key = jax.random.split(jax.random.key(seed), 3)
    tasks = pad_cheaply(make_tasks(tasks_key), max_padding)
    return SweepRun(init_params(params_key, tasks[0].train.inputs[0]), tasks, learning_key, 0.0)


def pad_cheaply(tasks: Sequence[Task], max_padding: float = MAX_PADDING) -> Sequence[Task]:
    """Pads tasks of different sizes to one size, so that all are compiled once, unless that takes too much memory.

    Args:
      tasks: a sequence.
      max_padding: how many times as many examples there may be, padding included; infinity for `learn_sweep`, which
        takes no others.

    Returns:
      The tasks, padded or as they were.

    Example:
      >>> from lifelong_jax import Batch
      >>> batches = [Batch(np.zeros((size, 3)), np.zeros(size, int)) for size in (2, 3, 20)]
      >>> few, more, many = (Task(batch, batch) for batch in batches)
      >>> [[len(task.train.labels) for task in pad_cheaply(tasks)] for tasks in ([few, more], [few, more, many])]
      [[3, 3], [2, 3, 20]]
    """
    sizes = np.array([[len(task.train.labels), len(task.test.labels)] for task in tasks])
    padding = len(sizes) * sizes.max(0).sum() / sizes.sum()
    return pad_tasks(tasks) if padding <= max_padding else tasks


def split_start(recipe: Recipe, variables: Params) -> tuple[Params, ModelState]:
    """Splits what `init_params` made into parameters and a model state.

    Args:
      recipe: with a `train_fn` of `models.train_functions`, or with none.
      variables: a flax module's variables, or without a `train_fn`, parameters.

    Returns:
      The parameters, and the model state, or None.
    """
    return (variables, None) if recipe.train_fn is None else split_variables(variables)


def learn_starts(
    method: Method, recipe: Recipe, runs: Sequence[SweepRun], max_steps: int | None = None
) -> SweepAccuracies:
    """Learns several runs of a sequence as one program.

    Args:
      method: as for `learn_sweep`.
      recipe: as for `learn_sweep`.
      runs: from `start_of_seed`, whose parameters are what `split_start` splits.
      max_steps: as for `learn_sweep`.

    Returns:
      Each run's scores, on tasks that have been learned.
    """
    starts = [split_start(recipe, run.params) for run in runs]
    split = [
        run._replace(params=params, model_state=model_state)
        for run, (params, model_state) in zip(runs, starts, strict=True)
    ]
    return learn_sweep(method, recipe, split, max_steps=max_steps, forward_transfer=False)


def learn_resumably(
    method: Method | None,
    recipe: Recipe,
    strength: float,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    sequence: ResumableSequence,
    report: Callable[[Progress], None],
    *,
    mesh: Mesh | None = None,
    prepare: Callable[[SequenceState, ResumableSequence], SequenceState] | None = None,
) -> SequenceState:
    """Learns a sequence of tasks with checkpoints, from its last checkpoint on.

    Args:
      method: as for `learn_tasks`; None learns all tasks at once, as `learn_jointly` does.
      recipe: as for `learn_tasks`.
      strength: λ; not used without a method.
      params: where training starts; with a `recipe.train_fn`, the variables that `split_start` splits.
      tasks: the sequence.
      key: the random key of the sequence.
      sequence: its checkpoints.
      report: `report(progress)`, called after every epoch, before its checkpoint.
      mesh: the devices that share the examples; None for one.
      prepare: `prepare(start, sequence) -> start`, the state to start from if there is no checkpoint; by default
        the first epoch's.

    Returns:
      The state after the last task.
    """
    if mesh is not None:
        tasks = place_tasks(mesh, tasks)  # the parameters follow
    params, model_state = split_start(recipe, params)
    start = init_sequence(method, recipe, params, tasks, key, strength=strength, model_state=model_state)
    start = sequence.restore(start if prepare is None else prepare(start, sequence))

    def callback(state: SequenceState, progress: Progress) -> None:
        report(progress)
        if method is not None and progress.learned is not None:
            num_examples = np.count_nonzero(to_host(tasks[progress.task].train.weights))
            sequence.keep_task(progress.task, progress.learned, method.name, num_examples)
        sequence.save(state)

    if method is None:
        return learn_jointly(recipe, params, tasks, key, start=start, callback=callback)
    return learn_tasks(method, recipe, params, tasks, key, strength=strength, start=start, callback=callback)
