"""A run's folder: its configuration, its metrics as they come, its summary; and the tables and progress on the
screen."""

import dataclasses
import datetime
import json
import math
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import rich.console
import rich.progress
import rich.table
import tyro
from numpy.typing import ArrayLike

from lifelong_jax import _files


def parse_seeds(words: Sequence[str]) -> tuple[int, ...]:
    """Reads seeds from a command line.

    Args:
      words: integers, and ranges that include their ends; between commas, or a word each.

    Returns:
      The seeds.

    Raises:
      ValueError: if that is not what they are.

    Example:
      >>> parse_seeds(["0-3", "7,9"])
      (0, 1, 2, 3, 7, 9)
    """
    seeds: list[int] = []
    for part in ",".join(words).split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"give integers and ranges, such as 0-4 or 0,2,4, not {part!r}")
        seeds += range(int(first), int(last) + 1)
    return tuple(seeds)


def parse_numbers(words: Sequence[str]) -> tuple[float, ...]:
    """Reads numbers from a command line.

    Args:
      words: numbers, between commas, or a word each.

    Returns:
      The numbers.

    Raises:
      ValueError: if that is not what they are.

    Example:
      >>> parse_numbers(["1,10", "1e3"])
      (1.0, 10.0, 1000.0)
    """
    try:
        return tuple(float(part) for part in ",".join(words).split(","))
    except ValueError as error:
        raise ValueError(f"give numbers, such as 1,10,100, not {' '.join(words)!r}") from error


Seeds: TypeAlias = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="0-9",
        instance_from_str=parse_seeds,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda seeds: [",".join(map(str, seeds))],
    ),
]
"""Seeds as a setting: on a command line, `0-9` or `0,2,4`."""

Numbers: TypeAlias = Annotated[
    tuple[float, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="1,10,100",
        instance_from_str=parse_numbers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda numbers: [",".join(f"{number:g}" for number in numbers)],
    ),
]
"""Numbers as a setting: on a command line, `1,10,100`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings that all scripts have."""

    output_dir: str = "results"
    """Results go to a new folder in <output-dir>/<name of the experiment>/."""

    resume: str | None = None
    """Go on with a run that was stopped, in its folder and with its settings: its folder, or nothing for the newest run
    of this experiment."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that one run writes to.

    Attributes:
      folder: where; it holds `config.json` from the start.
      earlier_rows: what was logged before the run was resumed, by `row_key`.
      stopping: set when the run is asked to stop at the next checkpoint.
    """

    folder: pathlib.Path
    earlier_rows: dict[tuple, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)

    def log(self, **row: Any) -> None:
        """Appends a line to `metrics.jsonl`; what a killed run had logged stays.

        Args:
          **row: names and values; arrays become lists, and NaN becomes null.
        """
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(to_json(row)) + "\n")

    def log_once(self, **row: Any) -> None:
        """Appends a line to `metrics.jsonl`, unless the same is there, from before the run was resumed.

        Args:
          **row: names and values; arrays become lists, and NaN becomes null.
        """
        if to_json(row) not in read_rows(self.folder):
            self.log(**row)

    def keep_rows(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Removes rows from `metrics.jsonl`, and what is behind the last whole one.

        Args:
          keep: `keep(row) -> bool`.
        """
        rows = "".join(json.dumps(row) + "\n" for row in read_rows(self.folder) if keep(row))
        _files.write(self.folder / "metrics.jsonl", rows.encode())

    def write_json(self, name: str, values: Any) -> None:
        """Writes a file.

        Args:
          name: of the file.
          values: names and values; arrays become lists, and NaN becomes null.
        """
        _files.write(self.folder / name, (json.dumps(to_json(values), indent=2) + "\n").encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`.

        Args:
          summary: names and values; arrays become lists, and NaN becomes null.
        """
        self.write_json("summary.json", summary)


def read_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a run's `metrics.jsonl`, as far as it is whole: a process may have been killed while it wrote a line.

    Args:
      folder: the run's.

    Returns:
      The rows.
    """
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def row_key(row: Mapping[str, Any]) -> tuple:
    """Says which sequence of tasks a row is about.

    Args:
      row: of `metrics.jsonl`.

    Returns:
      Its split, method and seed; None for what it lacks.

    Example:
      >>> row_key({"method": "ewc", "seed": 0, "loss": 0.1})
      (None, 'ewc', 0)
    """
    return tuple(row.get(name) for name in ("split", "method", "seed"))


def start_run(output_dir: str | pathlib.Path, experiment: str, config: Any) -> Run:
    """Makes a new folder `output_dir/experiment/<date-time>` and writes the configuration into it.

    Args:
      output_dir: where the results of all experiments are.
      experiment: the experiment's name.
      config: a dataclass.

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
    run = Run(folder)
    run.write_json("config.json", dataclasses.asdict(config))
    return run


def check_settings(
    *,
    positive: Mapping[str, Any] | None = None,
    not_negative: Mapping[str, Any] | None = None,
    distinct: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Refuses settings that would fail, or mislead, only after others have run.

    Args:
      positive: names and numbers, or sequences of numbers, that must be above 0.
      not_negative: the same, for what may be 0.
      distinct: names and sequences that must have an entry, and none twice.

    Raises:
      ValueError: naming the setting.

    Example:
      >>> check_settings(positive={"num_epochs": 3}, distinct={"seeds": (0, 1)})
    """
    for settings, least, words in (
        (positive or {}, np.nextafter(0, 1), "above 0"),
        (not_negative or {}, 0, "at least 0"),
    ):
        for name, value in settings.items():
            numbers = np.atleast_1d(np.asarray(value, np.float64))
            if not (np.isfinite(numbers) & (numbers >= least)).all():
                raise ValueError(f"{name} must be finite and {words}, not {value}.")
    for name, value in (distinct or {}).items():
        if not value or len(set(value)) < len(value):
            raise ValueError(f"{name} must have at least one entry, and none twice, not {value}.")


class Estimate(NamedTuple):
    """A quantity over seeds.

    Attributes:
      mean: over the seeds; NaN where the quantity is not defined.
      stderr: the standard error of the mean, from the sample's standard deviation (ddof=1); NaN for a single seed.
      values: one for each seed.
    """

    mean: float
    stderr: float
    values: list[float]


def estimate(values: ArrayLike) -> Estimate:
    """Summarises a quantity over seeds.

    Args:
      values: `[num_seeds]`, at least one.

    Returns:
      Its mean and the mean's standard error.

    Example:
      >>> estimate([1.0, 2.0, 3.0]).mean
      2.0
    """
    values = np.asarray(values, np.float64)
    stderr = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), stderr, values.tolist())


def format_estimate(quantity: Estimate, scale: float = 1.0, digits: int = 1) -> str:
    """Writes a quantity for a table: `mean±standard error`.

    Args:
      quantity: what to write.
      scale: what it is multiplied by: 100 for percent.
      digits: behind the decimal point.

    Returns:
      The text; "–" where the quantity is not defined, and no ± where there is one seed.

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
    """Prints a table on the screen.

    Args:
      console: where.
      title: above it.
      header: the columns' names.
      rows: a text for each column.
    """
    table = rich.table.Table(box=None, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        # A word a line, for eight columns to fit a screen of 80 characters.
        table.add_column(name.replace(" ", "\n"), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", highlight=False)
    console.print(table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a table in Markdown.

    Args:
      header: the columns' names.
      rows: a text for each column.

    Returns:
      The table, a line each.

    Example:
      >>> print(markdown_table(["method", "accuracy"], [["ewc", "0.9"]]), end="")
      | method | accuracy |
      | --- | ---: |
      | ewc | 0.9 |
    """
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def progress_bar(console: rich.console.Console) -> rich.progress.Progress:
    """Makes a progress bar with the time left, or, at the end, the time it took; each bar's field `status` is shown
    behind it.

    Args:
      console: where it is shown; on what is no terminal, it is shown once, at the end.

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


def to_json(value: Any) -> Any:
    """Turns a value into what JSON can hold: arrays to lists, named tuples to objects, NaN and infinities to None.

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
