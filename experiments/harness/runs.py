"""A run's folder: its configuration, its metrics as they come, its parts, its summary; and how a run is resumed."""

import contextlib
import dataclasses
import datetime
import fcntl
import io
import json
import math
import pathlib
import shlex
import shutil
import signal
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from experiments.harness.record import RECORD, check_unchanged, digests_of_settings, make_record, read_record
from experiments.harness.settings import ADDED_TO, RunSettings
from lifelong_jax import _files
from lifelong_jax._processes import any_of_all, is_first, text_of_first

_KINDS = {"event": str, "split": str, "score": str, "method": str, "seed": int, "epochs": int}
"""The kinds of what is no number, list or None in the rows of the log."""

_NEEDED = {
    "epoch": {"method", "seed", "task", "epochs", "loss", "accuracies"},
    "sequence": {"method", "seed", "accuracy_matrix"},
}
"""What a row has, by its event."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that one run writes to; several threads may log at once.

    Attributes:
      folder: its path; it has `config.json` from the start.
      earlier_rows: the rows that were logged before the run was resumed, by `row_key`.
      stopping: set when the run is asked to stop at the next checkpoint.
      writes: whether this process writes the files; of several that learn together, the first one does.
    """

    folder: pathlib.Path
    earlier_rows: dict[tuple, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)
    writes: bool = True
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def is_stopping(self) -> bool:
        """Returns whether the run is asked to stop, in one of the processes that learn together; all call it.

        Returns:
          The answer, which is the same for all.
        """
        return any_of_all(self.stopping.is_set())[0]

    def log(self, **row: Any) -> None:
        """Appends a line to `metrics.jsonl`, so that a killed run keeps what it had logged.

        Args:
          **row: names and values; arrays become lists, and NaN becomes null.
        """
        if self.writes:
            with self._lock, (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(to_json(row)) + "\n")

    def log_once(self, **row: Any) -> None:
        """Appends a line to `metrics.jsonl`, unless it was logged before the run was resumed.

        Args:
          **row: names and values; arrays become lists, and NaN becomes null.
        """
        if to_json(row) not in read_rows(self.folder):
            self.log(**row)

    def keep_rows(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Removes rows from `metrics.jsonl`, and a last line that is not complete.

        Args:
          keep: `keep(row) -> bool`.
        """
        if self.writes:
            with self._lock:
                _write_rows(self.folder, filter(keep, read_rows(self.folder)))

    def write_json(self, name: str, values: Any) -> None:
        """Writes a file.

        Args:
          name: of the file.
          values: names and values; arrays become lists, and NaN becomes null.
        """
        if self.writes:
            _files.write(self.folder / name, _encoded(values))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`.

        Args:
          summary: names and values; arrays become lists, and NaN becomes null.
        """
        self.write_json("summary.json", summary)


def read_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the rows of a run's `metrics.jsonl`.

    The last line is left out if it is not complete: the process was killed while it wrote it. Of any other line that is
    not a row, a warning says so.

    Args:
      folder: the run's.

    Returns:
      The rows.
    """
    file = folder / "metrics.jsonl"
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1] if file.exists() else [], 1):
        try:
            rows.append(_checked(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            warnings.warn(f"line {number} of {file} is damaged, and is skipped: {error}", stacklevel=2)
    return rows


def _checked(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    for name, kind in _KINDS.items():
        if name in row and not isinstance(row[name], kind):
            raise ValueError(f"{name} is {row[name]!r}")
    if "event" in row:  # a row of a sequence; those of studies are only compared
        missing = _NEEDED[row["event"]] - row.keys()
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        for name in row.keys() - _KINDS.keys():
            np.array(row[name], np.float64)  # an error, unless it is a number, None, or a list of equal lists of them
    return row


def _encoded(values: Any) -> bytes:
    return (json.dumps(to_json(values), indent=2) + "\n").encode()


def _write_rows(folder: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    _files.write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def row_key(row: Mapping[str, Any]) -> tuple:
    """Returns what identifies the sequence of tasks that a row belongs to.

    Args:
      row: of `metrics.jsonl`.

    Returns:
      The row's split, method and seed; None where it has none.

    Example:
      >>> row_key({"method": "ewc", "seed": 0, "loss": 0.1})
      (None, 'ewc', 0)
    """
    return tuple(row.get(name) for name in ("split", "method", "seed"))


def start_run(output_dir: str | pathlib.Path, experiment: str, config: Any, data: Sequence[Any]) -> Run:
    """Makes a new folder `output_dir/experiment/<date-time>` and writes `record.json` and `config.json` into it.

    Args:
      output_dir: the folder of the results of all experiments.
      experiment: the experiment's name.
      config: a dataclass.
      data: the data sets that are learned, trees of arrays.

    Returns:
      The run.
    """
    start = datetime.datetime.now()
    while True:  # a second later, where two runs start within one second
        folder = pathlib.Path(output_dir) / experiment / start.strftime("%Y-%m-%d-%H%M%S")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            start += datetime.timedelta(seconds=1)
        else:
            break
    run, written = Run(folder), to_json(dataclasses.asdict(config))
    run.write_json(RECORD, make_record(experiment, written, data))
    run.write_json("config.json", written)
    return run


def to_json(value: Any) -> Any:
    """Converts a value for JSON: arrays to lists, named tuples to objects, NaN and infinities to None.

    Args:
      value: a nesting of mappings, sequences, arrays and numbers.

    Returns:
      A nesting of dicts, lists, numbers, strings and None.

    Example:
      >>> to_json({"accuracy": np.array([0.5, np.nan])})
      {'accuracy': [0.5, None]}
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def open_run(
    settings: RunSettings, experiment: str, console: rich.console.Console, data: Sequence[Any]
) -> Iterator[Run]:
    """Starts a run, or resumes the one that `settings.resume` names. One process at a time may write to a run.

    A run is resumed with the data that it was begun with. Of other versions of the code, a warning says so. If the
    settings have more seeds or methods than the run, they are written into its files first.

    On Ctrl-C or SIGTERM, the run stops at its next checkpoint: after the epoch that is being learned; with
    `compute_once`, after the part that is being computed; in a sweep, after the runs that have begun. The program then
    prints how to resume, and ends with the usual status (130 or 143).

    Args:
      settings: the script's settings.
      experiment: the script's name.
      console: where messages are printed.
      data: the data sets that are learned, trees of arrays.

    Yields:
      The run.

    Raises:
      SystemExit: if the run was stopped, another process is writing to it, its data have changed, a file could not be
        written, or memory was not enough.
    """
    go_on = ""
    stopped_by = signal.SIGINT
    try:
        new = settings.resume is None
        run = _begin(settings, experiment, data)
        go_on = f"to go on: python -m experiments.{experiment} --resume {shlex.quote(str(run.folder))}"
        console.print(f"{'writing' if new else 'going on'} in {run.folder}", highlight=False, soft_wrap=True)

        def request_stop(number: int, frame: object) -> None:
            nonlocal stopped_by
            if run.stopping.is_set():
                raise KeyboardInterrupt
            stopped_by = number
            run.stopping.set()
            console.print("stopping at the next checkpoint; once more, to stop at once")

        with _locked(run), _handled(request_stop, signal.SIGINT, signal.SIGTERM):
            if not new:
                _check_record(run.folder, data)
                if run.writes:
                    _write_added(run.folder, settings, console)
                _read_log(run)
            yield run
            any_of_all()  # the others wait until the first process has written everything
    except KeyboardInterrupt:
        console.print(f"stopped; {go_on}", highlight=False, soft_wrap=True)
        raise SystemExit(128 + stopped_by) from None
    except (OSError, MemoryError) as error:
        raise SystemExit(f"error: {error}\n{go_on}".strip()) from error


def _begin(settings: RunSettings, experiment: str, data: Sequence[Any]) -> Run:
    """Makes the run's folder, or finds it. Of several processes, the first one makes it."""
    if settings.resume is not None:
        return Run(pathlib.Path(settings.resume), writes=is_first())
    folder = start_run(settings.output_dir, experiment, settings, data).folder if is_first() else pathlib.Path()
    if jax.process_count() > 1:
        folder = pathlib.Path(text_of_first(str(folder)))
    return Run(folder, writes=is_first())


def compute_once(run: Run, name: str, function: Callable[[], Any]) -> dict[str, Any]:
    """Computes a part of a run and keeps it in `parts/<name>.npz`, or reads it if the run has computed it before.

    Args:
      run: the run. The file stays when the run is finished, so that `--resume` can draw its picture again.
      name: the part's name.
      function: `function() -> part`, a nesting of dicts and NamedTuples of arrays and numbers.

    Returns:
      The part, as dicts of NumPy arrays, to the bit.

    Raises:
      KeyboardInterrupt: after the part is kept, if the run is asked to stop.

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
            warnings.warn(f"{file} is damaged, and is computed again: {error}", stacklevel=2)
    leaves = jax.tree.leaves_with_path(jax.device_get(function()))
    buffer = io.BytesIO()
    np.savez(buffer, **{jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves})
    _files.write(file, buffer.getvalue(), sync=True)
    if run.stopping.is_set():
        raise KeyboardInterrupt
    return _read_part(file)


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


def _check_record(folder: pathlib.Path, data: Sequence[Any]) -> None:
    try:
        recorded = read_record(folder)
        if recorded is None:
            warnings.warn(f"{folder} has no {RECORD}: whether its data are what they were is not known", stacklevel=2)
        else:
            check_unchanged(folder, recorded, data)
    except ValueError as error:
        raise SystemExit(f"error: --resume: {error}") from error


def _write_added(folder: pathlib.Path, settings: RunSettings, console: rich.console.Console) -> None:
    """Writes the seeds and methods that are added to a run into `config.json` and `record.json`."""
    config, record = json.loads((folder / "config.json").read_bytes()), read_record(folder)
    added = {}
    for name in ADDED_TO:
        entries = to_json(getattr(settings, name, []))
        if entries != config.get(name, []):
            added[name] = entries
            new = [str(entry) for entry in entries if entry not in config[name]]
            console.print(f"adding {name} {', '.join(new)}", highlight=False, soft_wrap=True)
    if not added:
        return
    files = {"config.json": config | added}
    if record is not None:
        files[RECORD] = record | {"settings": digests_of_settings(config | added)}
    with contextlib.ExitStack() as stack:  # both, or neither
        for name, values in files.items():
            stack.enter_context(_files.replacing(folder / name)).write_bytes(_encoded(values))


def _read_log(run: Run) -> None:
    file = run.folder / "metrics.jsonl"
    rows = read_rows(run.folder)
    if run.writes and file.exists() and len(rows) < file.read_bytes().count(b"\n"):
        shutil.copy(file, run.folder / "metrics.damaged.jsonl")
    if run.writes:
        _write_rows(run.folder, rows)  # without an incomplete line
    for row in rows:
        run.earlier_rows.setdefault(row_key(row), []).append(row)


@contextlib.contextmanager
def _locked(run: Run) -> Iterator[None]:
    if not run.writes:
        yield
        return
    with (run.folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock ends with the process, however that ends
        except BlockingIOError as error:
            raise SystemExit(f"error: another process is writing to {run.folder}") from error
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], *signals: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
