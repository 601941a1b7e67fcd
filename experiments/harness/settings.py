"""The settings of a script: its command line, the checks of values, and the settings of a run that is resumed."""

import dataclasses
import json
import pathlib
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

import numpy as np
import tyro

SettingsType = TypeVar("SettingsType", bound="RunSettings")

_NEWEST = "newest"
_PLACES = ("output_dir", "data_dir", "resume")  # settings that do not change the numbers


def parse_seeds(words: Sequence[str]) -> tuple[int, ...]:
    """Reads seeds from a command line.

    Args:
      words: integers and ranges (with both ends), separated by commas or given as several words.

    Returns:
      The seeds.

    Raises:
      ValueError: if a word is neither an integer nor a range.

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
    experiment."""


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
            numbers = np.atleast_1d(np.asarray(value, np.float64))
            if not (np.isfinite(numbers) & (numbers >= least)).all():
                raise ValueError(f"{name} must be finite and {words}, not {value}.")
    for name, value in (distinct or {}).items():
        if not value or len(set(value)) < len(value):
            raise ValueError(f"{name} must have at least one entry, and no entry twice, not {value}.")


def parse_settings(
    settings_type: type[SettingsType], experiment: str, arguments: Sequence[str] | None = None
) -> SettingsType:
    """Reads a script's command line. With `--resume`, the settings are those of the run that is resumed.

    Args:
      settings_type: the dataclass of the script's settings.
      experiment: the name of the script: of its module in `experiments`, and of its folder of results.
      arguments: the words of the command line; None for those of this program. `--resume` takes a run's folder, or
        nothing for the newest run of this experiment.

    Returns:
      The settings; `resume` is None or the folder of the run.

    Raises:
      SystemExit: if an argument is invalid, there is no such run, or an argument contradicts the settings of the run.

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
                f"error: --resume: {folder} has {field.name} = {theirs}, but the command line has {ours}. A run is "
                f"resumed with its own settings: leave {field.name} out, or start another run without --resume."
            )
    return dataclasses.replace(given, resume=str(folder))


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
