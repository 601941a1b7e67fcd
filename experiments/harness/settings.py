"""The settings of a script: its command line, the checks of values, and the settings of a run that is resumed."""

import codecs
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import shlex
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar

import numpy as np
import tyro

from experiments.harness.compilation import keep_programs
from experiments.harness.meshes import start_processes
from experiments.harness.record import PLACES, check_unedited, read_record

SettingsType = TypeVar("SettingsType", bound="RunSettings")

ADDED_TO = ("methods", "seeds")
"""The settings that a command line with `--resume` adds to: each entry is learned by itself."""

_NEWEST = "newest"
_MOST_SEEDS = 10_000
_LARGEST = 2**31 - 1  # of integers in JAX's usual mode
_PLAIN = {"±": "+-", "–": "-", "−": "-", "λ": "lambda", "→": "->", "°": " degrees", "\N{NO-BREAK SPACE}": " "}


def parse_seeds(words: Sequence[str]) -> tuple[int, ...]:
    """Reads seeds from a command line.

    Args:
      words: integers and ranges (with both ends), separated by commas or given as several words.

    Returns:
      The seeds.

    Raises:
      ValueError: if a word is neither an integer nor a range; if a seed has more than 32 bits, of which JAX would use
        the lower ones, so that two seeds were one; or if there are more than 10,000 seeds.

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
        if int(last) >= 2**32 or int(last) - int(first) >= _MOST_SEEDS:
            raise ValueError(f"give seeds below 2^32 (4294967296), at most {_MOST_SEEDS} of them, not {part!r}")
        seeds += range(int(first), int(last) + 1)
    return tuple(seeds)


def parse_numbers(words: Sequence[str]) -> tuple[float, ...]:
    """Reads numbers from a command line.

    Args:
      words: numbers, separated by commas or given as several words.

    Returns:
      The numbers.

    Raises:
      ValueError: if a word is not a number.

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
    """Resume a run that was stopped, with its own settings: its folder, or nothing for the newest run of this
    experiment. Seeds and methods that are given beside it are added to the run's."""

    compilation_cache: str | None = None
    """A folder where compiled programs are kept for later runs, such as ~/.cache/jax. By default none are kept."""


DatasetName: TypeAlias = Annotated[
    str,
    tyro.conf.arg(
        help="digits and letters (both bundled), folder:PATH and mit_scenes:PATH (with --image-size, where the images "
        "differ in size), or the name of an image-classification data set that TFDS has prepared, such as mnist."
    ),
]
"""The name of a data set as a setting."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(RunSettings):
    """The settings of all scripts that load data sets by name."""

    data_dir: str | None = None
    """Where TFDS keeps prepared data sets; by default TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    image_size: int | None = None
    """All images are resized to this height and width, in pixels; by default, they stay as they are."""

    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; by default, images stay as they are."""

    skip_unreadable: bool = False
    """Leave out image files that cannot be read, and say how many; by default, they end the program."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        if self.image_size is not None:
            check_settings(positive={"image_size": self.image_size})


def check_settings(
    *,
    positive: Mapping[str, Any] | None = None,
    not_negative: Mapping[str, Any] | None = None,
    distinct: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Checks settings before anything is computed.

    Args:
      positive: names and numbers, or sequences of numbers, that must be above 0.
      not_negative: names and numbers, or sequences of numbers, that must be at least 0.
      distinct: names and sequences that must have at least one entry, and no entry twice.

    Raises:
      ValueError: if a setting fails its check; the message names it.

    Example:
      >>> check_settings(positive={"num_epochs": 3}, distinct={"seeds": (0, 1)})
    """
    for settings, least, words in (
        (positive or {}, np.nextafter(0, 1), "above 0"),
        (not_negative or {}, 0, "at least 0"),
    ):
        for name, value in settings.items():
            entries = np.ravel(np.array(value, object))
            if any(isinstance(entry, int) and entry > _LARGEST for entry in entries):
                raise ValueError(f"{name} must be at most {_LARGEST}, the largest integer of 32 bits, not {value}.")
            numbers = entries.astype(np.float64)
            if not (np.isfinite(numbers) & (numbers >= least)).all():
                raise ValueError(f"{name} must be finite and {words}, not {value}.")
            if (numbers > np.finfo(np.float32).max).any():
                raise ValueError(f"{name} must be at most 3.4e38, the largest number of 32 bits, not {value}.")
    for name, value in (distinct or {}).items():
        if not value or len(set(value)) < len(value):
            raise ValueError(f"{name} must have at least one entry, and no entry twice, not {value}.")


def check_memory(what: str, num_bytes: float) -> None:
    """Checks before anything is computed that a size is not absurd.

    Args:
      what: the settings that make it so large.
      num_bytes: the least memory that it takes.

    Raises:
      ValueError: if this machine has less memory; the message says how much it takes.

    Example:
      >>> check_memory("num_tasks = 5", 4000)
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if num_bytes > there:
        raise ValueError(f"{what} takes at least {num_bytes / 1e9:,.0f} GB of memory, of {there / 1e9:,.0f} GB")


def check_num_tasks(num_tasks: int, num_epochs: int) -> None:
    """Checks before anything is computed that there is a task, and that memory holds the accuracy curves of a sequence.

    Args:
      num_tasks: how many tasks.
      num_epochs: passes over each task's training data.

    Raises:
      ValueError: naming the number of tasks.
    """
    check_settings(positive={"num_tasks": num_tasks})
    check_memory(f"num_tasks = {num_tasks}", 8 * num_tasks**2 * num_epochs)


def refuse(error: object) -> NoReturn:
    """Ends the program as a wrong argument does: with one line, and exit code 2.

    Args:
      error: what is wrong.

    Raises:
      SystemExit: always.
    """
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def parse_settings(
    settings_type: type[SettingsType], experiment: str, arguments: Sequence[str] | None = None
) -> SettingsType:
    """Reads a script's command line. With `--resume`, the settings are those of the run that is resumed.

    Seeds and methods on such a command line are added to the run's, behind those that it has.

    Args:
      settings_type: the dataclass of the script's settings.
      experiment: the name of the script: of its module in `experiments`, and of its folder of results.
      arguments: the words of the command line; None for those of this program. `--resume` takes a run's folder, or
        nothing for the newest run of this experiment.

    Returns:
      The settings; `resume` is None or the folder of the run. The processes that share a mesh have found each other.

    Raises:
      SystemExit: if an argument is invalid, there is no such run, an argument contradicts the settings of the run, or
        there are not as many devices as the mesh has.

    Example:
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Config(RunSettings):
      ...     num_tasks: int = 5
      >>> parse_settings(Config, "permuted", ["--num-tasks", "3"]).num_tasks
      3
    """
    _write_what_a_console_can_show()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--resume" in arguments:
        behind = arguments.index("--resume") + 1
        if behind == len(arguments) or arguments[behind].startswith("--"):
            arguments.insert(behind, _NEWEST)
    program = f"python -m experiments.{experiment}"
    settings = tyro.cli(settings_type, prog=program, args=arguments)
    if settings.resume is not None:
        settings = _with_settings_of_run(settings, experiment, arguments)
    if settings.compilation_cache is not None:
        keep_programs(settings.compilation_cache)
    if hasattr(settings, "mesh"):
        try:
            start_processes(settings.mesh)
        except ValueError as error:
            refuse(error)
    return settings


def _with_settings_of_run(settings: SettingsType, experiment: str, arguments: Sequence[str]) -> SettingsType:
    settings_type, program = type(settings), f"python -m experiments.{experiment}"
    try:
        folder = pathlib.Path(settings.resume)
        if settings.resume == _NEWEST:
            folder = _newest_run(pathlib.Path(settings.output_dir) / experiment)
        saved = _read_settings(settings_type, experiment, folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --resume: {error}") from error
    given = tyro.cli(settings_type, prog=program, args=arguments, default=saved)
    both = {}
    for field in dataclasses.fields(settings_type):
        ours, theirs = getattr(given, field.name), getattr(saved, field.name)
        if field.name in ADDED_TO and theirs:  # without any, the script chooses
            both[field.name] = theirs + tuple(entry for entry in ours if entry not in theirs)
        elif field.name not in PLACES and ours != theirs:
            raise SystemExit(
                f"error: --resume: {folder} has {field.name} = {theirs}, but the command line has {ours}. A run is "
                f"resumed with its own settings: leave {field.name} out, or start another run without --resume."
            )
    return dataclasses.replace(given, resume=str(folder), **both)


def _newest_run(folder: pathlib.Path) -> pathlib.Path:
    """Returns the run that was written to last."""

    def last_written(run: pathlib.Path) -> tuple[int, str]:
        return max(file.stat().st_mtime_ns for file in run.iterdir()), run.name

    runs = [config.parent for config in folder.glob("*/config.json")]
    if not runs:
        raise FileNotFoundError(f"there is no run in {folder}")
    return max(runs, key=last_written)


def _read_settings(settings_type: type[SettingsType], experiment: str, folder: pathlib.Path) -> SettingsType:
    file, recorded = folder / "config.json", read_record(folder)
    theirs = experiment if recorded is None else recorded["experiment"]
    if theirs != experiment:
        command = f"python -m experiments.{theirs} --resume {shlex.quote(str(folder))}"
        raise ValueError(f"{folder} is a run of {theirs}, not of {experiment}: {command}")
    with _named_in_errors(file):
        values = json.loads(file.read_text(encoding="utf-8"))
    if recorded is not None and isinstance(values, dict):
        check_unedited(folder, recorded, values)
    with _named_in_errors(file):
        return _from_json(settings_type, values)


@contextlib.contextmanager
def _named_in_errors(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no run in {file.parent}: it has no {file.name}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or was written by another version of this script: {error}") from error


def _from_json(settings_type: type, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError("it has no settings")
    types = typing.get_type_hints(settings_type)
    differing = types.keys() ^ values.keys()
    if differing:
        raise ValueError(f"missing or unknown settings: {', '.join(sorted(differing))}")

    def convert(kind: Any, value: Any) -> Any:
        if isinstance(value, dict):
            return _from_json(kind, value)
        return tuple(convert(None, item) for item in value) if isinstance(value, list) else value

    return settings_type(**{name: convert(types[name], value) for name, value in values.items()})


def _write_what_a_console_can_show() -> None:
    """Lets a console without UTF-8 show plain letters in place of those that it lacks, instead of raising an error."""
    codecs.register_error("plain", _plain_letters)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="plain")


def _plain_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
