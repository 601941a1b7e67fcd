"""Runs that are stopped, killed or out of disk, and go on where they were, to the same numbers."""

import contextlib
import dataclasses
import fcntl
import io
import json
import pathlib
import signal
import sys
import time
import typing
import urllib.parse
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import rich.console
import tyro

from lifelong_jax import _files
from lifelong_jax.checkpoint import restore_checkpoint, save_checkpoint, save_consolidation
from lifelong_jax.consolidation import consolidate
from lifelong_jax.continual import NO_CHECKPOINTS, Checkpoints, Progress, SequenceState
from lifelong_jax.methods import Method, finetune
from lifelong_jax.runs import Run, RunSettings, read_rows, row_key, start_run
from lifelong_jax.types import Consolidation

SettingsType = TypeVar("SettingsType", bound=RunSettings)

CHECKPOINT_SECONDS = 10.0  # at least, between two checkpoints
CHECKPOINT_SHARE = 0.005  # at most, of the time, spent on writing them

_NEWEST = "newest"
_PLACES = ("output_dir", "data_dir", "resume")  # what does not change the numbers


def parse_settings(
    settings_type: type[SettingsType], experiment: str, arguments: Sequence[str] | None = None
) -> SettingsType:
    """Reads a script's command line. With `--resume`, the settings are those of the run that goes on.

    Args:
      settings_type: the dataclass of the script's settings.
      experiment: the script's name, of its module in `experiments` and of its folder of results.
      arguments: by default those that the program was called with. `--resume` takes a run's folder, or nothing for the
        newest run of this experiment.

    Returns:
      The settings; `resume` is None or the folder of the run.

    Raises:
      SystemExit: if an argument is not understood, there is no such run, or an argument contradicts its settings.

    Example:
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Config(RunSettings):
      ...     num_tasks: int = 5
      >>> parse_settings(Config, "permuted", ["--num-tasks", "3"]).num_tasks
      3
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--resume" in arguments:
        behind = arguments.index("--resume") + 1
        if behind == len(arguments) or arguments[behind].startswith("--"):
            arguments.insert(behind, _NEWEST)
    program = f"python -m experiments.{experiment}"
    settings = tyro.cli(settings_type, prog=program, args=arguments)
    if settings.resume is None:
        return settings
    try:
        folder = pathlib.Path(settings.resume)
        if settings.resume == _NEWEST:
            folder = _newest_run(pathlib.Path(settings.output_dir) / experiment)
        saved = _read_settings(settings_type, folder / "config.json")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --resume: {error}") from error
    given = tyro.cli(settings_type, prog=program, args=arguments, default=saved)
    for field in dataclasses.fields(settings_type):
        ours, theirs = getattr(given, field.name), getattr(saved, field.name)
        if field.name not in _PLACES and ours != theirs:
            raise SystemExit(
                f"error: --resume: {folder} has {field.name} = {theirs}, which the command line contradicts with "
                f"{ours}. A run goes on with its own settings: leave that out, or start another run without --resume."
            )
    return dataclasses.replace(given, resume=str(folder))


@contextlib.contextmanager
def open_run(settings: RunSettings, experiment: str, console: rich.console.Console) -> Iterator[Run]:
    """Starts a run, or goes on with the one that `settings.resume` names; one process at a time may write to it.

    On Ctrl-C, or when the process is told to terminate, the run stops after the epoch that is being learned, with a
    checkpoint; or, with `compute_once`, after the part that is being computed, and in a sweep after the runs that have
    begun. The program then ends with the usual status (130 or 143), and says how to go on.

    Args:
      settings: the script's settings.
      experiment: the script's name.
      console: where it is said how to go on.

    Yields:
      The run.

    Raises:
      SystemExit: if the run was stopped, another process is writing to it, or a file could not be written.
    """
    go_on = ""
    stopped_by = signal.SIGINT
    try:
        new = settings.resume is None
        run = start_run(settings.output_dir, experiment, settings) if new else Run(pathlib.Path(settings.resume))
        go_on = f"to go on: python -m experiments.{experiment} --resume {run.folder}"

        def request_stop(number: int, frame: object) -> None:
            nonlocal stopped_by
            if run.stopping.is_set():
                raise KeyboardInterrupt
            stopped_by = number
            run.stopping.set()
            console.print("stopping at the next checkpoint; once more, to stop at once")

        with _locked(run.folder), _handled(request_stop, signal.SIGINT, signal.SIGTERM):
            if not new:
                _read_log(run)
            yield run
    except KeyboardInterrupt:
        console.print(f"stopped; {go_on}", highlight=False, soft_wrap=True)
        raise SystemExit(128 + stopped_by) from None
    except OSError as error:
        raise SystemExit(f"error: {error}\n{go_on}".strip()) from error


def compute_once(run: Run, name: str, function: Callable[[], Any]) -> dict[str, Any]:
    """Computes a part of a run and keeps it, in `parts/<name>.npz`; or reads it, where the run had computed it before.

    Args:
      run: where the file is. It stays when the run is finished, so that its picture can be drawn again by `--resume`.
      name: of the part, in this run.
      function: what computes it, without arguments: a nesting of dicts and NamedTuples of arrays and numbers.

    Returns:
      What it returned, as dicts of NumPy arrays, to the bit.

    Raises:
      KeyboardInterrupt: if the run is asked to stop, once the part is kept.

    Example:
      >>> import tempfile
      >>> run = Run(pathlib.Path(tempfile.mkdtemp()))
      >>> float(compute_once(run, "seed 0", lambda: {"loss": 0.5})["loss"])
      0.5
      >>> float(compute_once(run, "seed 0", lambda: {"loss": 0.7})["loss"])
      0.5
    """
    file = run.folder / "parts" / f"{name}.npz"
    if file.exists():
        try:
            return _read_part(file)
        except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError) as error:
            warnings.warn(f"{file} is computed again, it is damaged: {error}", stacklevel=2)
    leaves = jax.tree.leaves_with_path(jax.device_get(function()))
    buffer = io.BytesIO()
    np.savez(buffer, **{jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves})
    _files.write(file, buffer.getvalue(), sync=True)
    if run.stopping.is_set():
        raise KeyboardInterrupt
    return _read_part(file)


class ResumableSequence:
    """One learner's sequence of tasks, from one seed, in a run: its checkpoints, and its rows in the log.

    It is what `learn_tasks` takes as `checkpoints`. A checkpoint is written after an epoch when 10 seconds have passed
    since the last one, or, where one takes longer than 50 milliseconds, 200 times as long as it took; and when the run
    is asked to stop.
    """

    def __init__(self, run: Run, *, method: str, seed: int, split: str | None = None, keep_tasks: bool = False) -> None:
        """Finds what there is of it already.

        Args:
          run: where its files are.
          method: the learner's name.
          seed: of its tasks.
          split: "validation" where strengths are chosen.
          keep_tasks: whether each task's own parameters and importance are kept, as `task_file` names.
        """
        self.run, self.seed = run, seed
        self._labels = {"method": method, "seed": seed} | ({"split": split} if split else {})
        self.name = f"{split} {method}, seed {seed}" if split else f"{method}, seed {seed}"
        self._folder = run.folder / "sequences" / urllib.parse.quote(self.name, safe=" (),+=")
        self._keep_tasks = keep_tasks
        self._last_saved, self._cost = time.monotonic(), 0.0
        self._earlier = run.earlier_rows.pop(row_key(self._labels), [])

    def result(self) -> dict[str, np.ndarray] | None:
        """Gives what was measured, where the sequence was finished before the run was resumed.

        Returns:
          The values that `finish` was given, or None.
        """
        for row in self._earlier:
            if row["event"] == "sequence":
                names = row.keys() - self._labels.keys() - {"event"}
                return {name: np.array(row[name], np.float64) for name in names}  # None, in JSON, was NaN
        return None

    def earlier_epochs(self) -> list[Progress]:
        """Gives what was logged before the run was resumed, and not dropped.

        Returns:
          The progress after each of these epochs.
        """
        rows = [row for row in self._earlier if row["event"] == "epoch"]
        return [Progress(**{name: row[name] for name in Progress._fields}) for row in rows]

    def log_epoch(self, progress: Progress) -> None:
        """Logs an epoch.

        Args:
          progress: after it.
        """
        self.run.log(event="epoch", **self._labels, **progress._asdict())

    def finish(self, **measured: Any) -> None:
        """Logs what was measured of the whole sequence, which is then finished and needs no checkpoint.

        Args:
          **measured: names and arrays or numbers.
        """
        self.run.log(event="sequence", **self._labels, **measured)
        _files.discard(self._folder / "checkpoints")

    def restore(self, start: SequenceState, num_epochs: int) -> tuple[int, SequenceState]:
        """See `continual.Checkpoints`. What was logged after the checkpoint is dropped.

        Args:
          start: where the sequence would start.
          num_epochs: passes over each task's training examples.

        Returns:
          The number of epochs learned, and the state.
        """
        epochs, state = restore_checkpoint(self._folder / "checkpoints", like=start) or (0, start)
        logged = max((progress.epochs for progress in self.earlier_epochs()), default=0)
        if logged < epochs:
            warnings.warn(f"{self._folder} starts anew: its log ends before its checkpoint", stacklevel=2)
            epochs, state = 0, start
        if logged > epochs:
            key = row_key(self._labels)
            self.run.keep_rows(lambda row: row_key(row) != key or row["epochs"] <= epochs)
        self._earlier = [row for row in self._earlier if row["epochs"] <= epochs]
        return epochs, state

    def save(self, epochs: int, state: SequenceState) -> None:
        """See `continual.Checkpoints`.

        Args:
          epochs: learned so far.
          state: after them.

        Raises:
          KeyboardInterrupt: if the run is asked to stop.
        """
        stopping = self.run.stopping.is_set()
        now = time.monotonic()
        if stopping or now - self._last_saved >= max(CHECKPOINT_SECONDS, self._cost / CHECKPOINT_SHARE):
            save_checkpoint(self._folder / "checkpoints", epochs, state)
            self._last_saved = time.monotonic()
            self._cost = self._last_saved - now
        if stopping:
            raise KeyboardInterrupt

    def keep_task(self, task: int, kept: Consolidation, estimator: str, num_examples: int) -> None:
        """See `continual.Checkpoints`.

        Args:
          task: from 0.
          kept: the parameters and the importance.
          estimator: the method's name.
          num_examples: of the task.
        """
        if self._keep_tasks:
            file = self.task_file(task)
            save_consolidation(file, kept, estimator=estimator, num_examples=num_examples, sync=False)

    def task_file(self, task: int) -> pathlib.Path:
        """Says where a task's own parameters and importance are kept, for `load_consolidation`.

        Args:
          task: from 0.

        Returns:
          The file.
        """
        return self._folder / f"task-{task + 1}.safetensors"


class KeptTasks:
    """Lets `learn_tasks` go on after tasks that were learned before, consolidated by another rule, or decay, as well.

    It is what `learn_tasks` takes as `checkpoints`, with tasks that begin with those kept. Of these nothing is measured
    again.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lifelong_jax import Batch, add_quadratic_penalty, learn_tasks, mas, permuted_tasks
      >>> batch = Batch(jnp.eye(4), jnp.arange(4) % 2, jnp.ones(4))
      >>> tasks = permuted_tasks(batch, batch, 3, jax.random.key(0))
      >>> optimizer_fn = lambda strength: optax.chain(add_quadratic_penalty(strength), optax.sgd(1.0))
      >>> kept = [Consolidation(jnp.zeros((4, 2)), jnp.ones((4, 2)))] * 2
      >>> learned = learn_tasks(mas("separate"), lambda w, x: x @ w, optimizer_fn, jnp.zeros((4, 2)), tasks,
      ...                       jax.random.key(1), strength=0.1, num_epochs=10, batch_size=2,
      ...                       checkpoints=KeptTasks(kept, mas("separate"), num_epochs=10))
      >>> np.isnan(learned.accuracy_matrix).all(axis=1)
      array([ True,  True, False])
    """

    def __init__(
        self,
        kept: Sequence[Consolidation],
        method: Method,
        num_epochs: int,
        checkpoints: Checkpoints = NO_CHECKPOINTS,
    ) -> None:
        """Prepares to go on.

        Args:
          kept: each task's own parameters and importance, in order; from `load_consolidation`, say.
          method: its rule and decay consolidate them. What is learned from then on, that of `learn_tasks` consolidates.
          num_epochs: passes over each task's training examples, as for `learn_tasks`.
          checkpoints: where the state is kept from then on.

        Raises:
          ValueError: if nothing is kept, or the method carries more from task to task than what is.
        """
        if not kept:
            raise ValueError("kept is empty: without kept tasks, learn_tasks begins with the first one by itself.")
        if method.carry is not finetune().carry:
            raise ValueError(f"{method.name} carries its optimiser's state from task to task, which is not kept.")
        self._kept, self._method, self._num_epochs, self._checkpoints = kept, method, num_epochs, checkpoints

    def restore(self, start: SequenceState, num_epochs: int) -> tuple[int, SequenceState]:
        """See `continual.Checkpoints`.

        Args:
          start: where the sequence would start.
          num_epochs: passes over each task's training examples.

        Returns:
          The number of epochs learned, and the state.

        Raises:
          ValueError: if the sequence's number of epochs is another one than that of these tasks.
        """
        if num_epochs != self._num_epochs:
            raise ValueError(f"num_epochs is {self._num_epochs} for KeptTasks, but {num_epochs} for the sequence.")
        rule, decay = self._method.rule, self._method.decay
        consolidation = start.consolidation
        for task in self._kept:
            consolidation = consolidate(consolidation, task.anchor, task.importance, rule=rule, decay=decay)
        training = start.training._replace(params=self._kept[-1].anchor)
        epochs, state = self._checkpoints.restore(
            start._replace(training=training, consolidation=consolidation), num_epochs
        )
        return max(epochs, len(self._kept) * num_epochs), state

    def save(self, epochs: int, state: SequenceState) -> None:
        """See `continual.Checkpoints`.

        Args:
          epochs: learned so far.
          state: after them.
        """
        self._checkpoints.save(epochs, state)

    def keep_task(self, task: int, kept: Consolidation, estimator: str, num_examples: int) -> None:
        """See `continual.Checkpoints`.

        Args:
          task: from 0.
          kept: the parameters and the importance.
          estimator: the method's name.
          num_examples: of the task.
        """
        self._checkpoints.keep_task(task, kept, estimator, num_examples)


def _newest_run(folder: pathlib.Path) -> pathlib.Path:
    runs = sorted(config.parent for config in folder.glob("*/config.json"))
    if not runs:
        raise FileNotFoundError(f"there is no run in {folder}")
    return runs[-1]


def _read_settings(settings_type: type[SettingsType], file: pathlib.Path) -> SettingsType:
    try:
        return _from_json(settings_type, json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no run in {file.parent}: it has no {file.name}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or of another version of this script: {error}") from error


def _from_json(settings_type: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError("it holds no settings")
    types = typing.get_type_hints(settings_type)
    differing = types.keys() ^ values.keys()
    if differing:
        raise ValueError(f"it lacks, or has too many, {', '.join(sorted(differing))}")

    def convert(kind: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return _from_json(kind, value)
        return tuple(convert(None, item) for item in value) if isinstance(value, list) else value

    return settings_type(**{name: convert(types[name], value) for name, value in values.items()})


def _read_part(file: pathlib.Path) -> dict[str, Any]:
    part = {}
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as leaves:
        for path, leaf in leaves.items():
            *branches, last = path.split("/")
            branch = part
            for name in branches:
                branch = branch.setdefault(name, {})
            branch[last] = leaf
    return part


def _read_log(run: Run) -> None:
    run.keep_rows(lambda row: True)  # but not what was half written
    for row in read_rows(run.folder):
        run.earlier_rows.setdefault(row_key(row), []).append(row)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, however that ends
        except BlockingIOError as error:
            raise SystemExit(f"error: another process is writing to {folder}") from error
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], *signals: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
