"""Settings: their words on a command line, their checks, and those of a run that is resumed."""

import dataclasses
import math

import pytest
import rich.console

from experiments.harness.runs import open_run
from experiments.harness.settings import RunSettings, check_settings, parse_numbers, parse_seeds, parse_settings

CONSOLE = rich.console.Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    ewc: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    networks: tuple[tuple[int, ...], ...] = ((64,), (128, 128))
    strength: Inner = Inner()
    data_dir: str | None = None
    seeds: tuple[int, ...] = (0, 1)


def parse(*arguments):
    return parse_settings(Config, "permuted", arguments)


def test_the_settings_are_those_of_the_run(tmp_path):
    output = ["--output-dir", str(tmp_path)]
    given = parse(*output, "--seeds", "3", "--strength.ewc", "0.3")
    with open_run(parse(*output), "permuted", CONSOLE):
        pass
    with open_run(given, "permuted", CONSOLE) as run:
        pass
    expected = dataclasses.replace(given, resume=str(run.folder))
    assert parse(*output, "--resume") == expected
    assert parse("--resume", *output, "--seeds", "3") == expected
    assert parse("--resume", str(run.folder), *output) == expected
    elsewhere = parse("--resume", str(run.folder), *output, "--data-dir", "elsewhere")
    assert elsewhere == dataclasses.replace(expected, data_dir="elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], r"has seeds = \(0, 1\), but the command line has \(0,\)"),
        (["--strength.ewc", "1"], r"has strength = Inner\(ewc=0.1\), but the command line has Inner\(ewc=1.0\)"),
    ],
)
def test_contradictions_are_refused(tmp_path, arguments, message):
    with open_run(parse("--output-dir", str(tmp_path)), "permuted", CONSOLE):
        pass
    with pytest.raises(SystemExit, match=message):
        parse("--output-dir", str(tmp_path), "--resume", *arguments)


def test_runs_that_are_not_there_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"--resume: there is no run in .*permuted"):
        parse("--output-dir", str(tmp_path), "--resume")
    with pytest.raises(SystemExit, match=r"there is no run in .*: it has no config.json"):
        parse("--resume", str(tmp_path))
    for content in ('{"seeds": [0]}', "{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(SystemExit, match="is damaged, or was written by another version of this script"):
            parse("--resume", str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positive": {"num_epochs": 0}}, "num_epochs must be finite and above 0, not 0"),
        ({"positive": {"hidden_sizes": (3, -1)}}, r"hidden_sizes must be finite and above 0, not \(3, -1\)"),
        ({"not_negative": {"strength": math.nan}}, "strength must be finite and at least 0, not nan"),
        ({"distinct": {"seeds": (0, 0)}}, r"seeds must have at least one entry, and no entry twice, not \(0, 0\)"),
        ({"distinct": {"methods": ()}}, "methods must have at least one entry"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(**settings)


def test_seeds_on_a_command_line():
    assert parse_seeds(["0", "2", "7"]) == (0, 2, 7)
    assert parse_seeds(["0-2,10-11"]) == (0, 1, 2, 10, 11)
    assert parse_seeds(["5-5"]) == (5,)
    for words in (["a"], [""], ["1.5"], ["-1"], ["0,,1"], ["0-"], ["3-1"], ["1-2-3"], []):
        with pytest.raises(ValueError, match="give integers and ranges, such as 0-4 or 0,2,4, not"):
            parse_seeds(words)


def test_numbers_on_a_command_line():
    assert parse_numbers(["0.1", "1e3,5"]) == (0.1, 1000.0, 5.0)
    for words in (["a"], [""], ["1,,2"], []):
        with pytest.raises(ValueError, match="give numbers, such as 1,10,100, not"):
            parse_numbers(words)
