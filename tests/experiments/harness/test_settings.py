"""Settings: their words on a command line, their checks, and those of a run that is resumed."""

import dataclasses
import io
import json
import math
import os
import sys

import pytest
import rich.console

from experiments.harness.runs import open_run
from experiments.harness.settings import (
    RunSettings,
    check_memory,
    check_settings,
    parse_numbers,
    parse_seeds,
    parse_settings,
)

CONSOLE = rich.console.Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    ewc: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    networks: tuple[tuple[int, ...], ...] = ((64,), (128, 128))
    strength: Inner = Inner()
    data_dir: str | None = None
    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1)


def parse(*arguments):
    return parse_settings(Config, "permuted", arguments)


def test_the_settings_are_those_of_the_run(tmp_path):
    output = ["--output-dir", str(tmp_path)]
    given = parse(*output, "--seeds", "3", "--strength.ewc", "0.3")
    with open_run(parse(*output), "permuted", CONSOLE, []):
        pass
    with open_run(given, "permuted", CONSOLE, []) as run:
        pass
    expected = dataclasses.replace(given, resume=str(run.folder))
    assert parse(*output, "--resume") == expected
    assert parse("--resume", *output, "--seeds", "3") == expected
    assert parse("--resume", str(run.folder), *output) == expected
    elsewhere = parse("--resume", str(run.folder), *output, "--data-dir", "elsewhere")
    assert elsewhere == dataclasses.replace(expected, data_dir="elsewhere")


def test_seeds_are_added_to_those_of_the_run(tmp_path):
    output = ["--output-dir", str(tmp_path)]
    with open_run(parse(*output, "--seeds", "4", "2"), "permuted", CONSOLE, []):
        pass
    for words, seeds in ((["4"], (4, 2)), (["2", "3", "4"], (4, 2, 3)), (["0", "9"], (4, 2, 0, 9))):
        assert parse(*output, "--resume", "--seeds", *words).seeds == seeds
    assert parse(*output, "--resume").seeds == (4, 2)  # nothing is written before the run is opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ewc"], r"has methods = \(\), but the command line has \('ewc',\)"),
        (["--strength.ewc", "1"], r"has strength = Inner\(ewc=0.1\), but the command line has Inner\(ewc=1.0\)"),
    ],
)
def test_contradictions_are_refused(tmp_path, arguments, message):
    with open_run(parse("--output-dir", str(tmp_path)), "permuted", CONSOLE, []):
        pass
    with pytest.raises(SystemExit, match=message):
        parse("--output-dir", str(tmp_path), "--resume", *arguments)


def test_an_edited_config_is_refused(tmp_path):
    with open_run(parse("--output-dir", str(tmp_path)), "permuted", CONSOLE, []) as run:
        pass
    config = json.loads((run.folder / "config.json").read_text())
    moved = config | {"output_dir": "elsewhere", "data_dir": "elsewhere"}
    (run.folder / "config.json").write_text(json.dumps(moved))
    assert parse("--resume", str(run.folder)).data_dir == "elsewhere"
    for edited, names in (
        ({"seeds": [0, 2]}, "seeds"),
        ({"seeds": "0"}, "seeds"),
        ({"strength": {"ewc": 0.2}, "networks": []}, "networks, strength"),
    ):
        (run.folder / "config.json").write_text(json.dumps(config | edited))
        with pytest.raises(
            SystemExit, match=rf"^error: --resume: [^ ]*config\.json was edited after the run began: {names}\. Put back"
        ):
            parse("--resume", str(run.folder))


def test_a_run_of_another_script_says_whose_it_is(tmp_path):
    with open_run(parse("--output-dir", str(tmp_path / "my runs")), "rotated", CONSOLE, []) as run:
        pass
    with pytest.raises(SystemExit, match=r"is a run of rotated, not of permuted: python -m .*rotated --resume '"):
        parse("--resume", str(run.folder))


def test_the_newest_run_is_the_one_that_was_written_to_last(tmp_path):
    folders = []
    for _ in range(2):
        with open_run(parse("--output-dir", str(tmp_path)), "permuted", CONSOLE, []) as run:
            folders.append(run.folder)
    for run, seconds in zip(folders, (2_000_000_000, 1_000_000_000), strict=True):
        for file in run.iterdir():
            os.utime(file, (seconds, seconds))
    assert sorted(folders) == folders
    assert parse("--output-dir", str(tmp_path), "--resume").resume == str(folders[0])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_console_without_utf_8_shows_plain_letters(monkeypatch, encoding):
    text = "98.5±0.2 – λ → 20°\n"
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    parse()
    rich.console.Console().print(text, end="")
    sys.stdout.flush()
    expected = {"utf-8": text, "ascii": "98.5+-0.2 - lambda -> 20 degrees\n", "latin-1": "98.5±0.2 - lambda -> 20°\n"}
    assert shown.getvalue().decode(encoding) == expected.get(encoding, "98.5±0.2 – lambda -> 20°\n")


def test_what_takes_more_memory_than_there_is_is_refused():
    check_memory("num_tasks = 5", 1e3)
    with pytest.raises(ValueError, match=r"num_tasks = 9 takes at least 1,000,000,000 GB of memory, of \d+ GB"):
        check_memory("num_tasks = 9", 1e18)


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
        ({"not_negative": {"strength": (1.0, 1e39)}}, "strength must be at most 3.4e38, the largest number of 32 bits"),
        ({"positive": {"batch_size": 2**31}}, "batch_size must be at most 2147483647, the largest integer of 32 bits"),
        ({"positive": {"num_epochs": 10**400}}, "num_epochs must be at most 2147483647"),
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
    assert parse_seeds(["4294967295"]) == (2**32 - 1,)
    for words in (["4294967296"], ["9" * 400], ["0-10000"], ["0-999999999999"]):
        with pytest.raises(ValueError, match=r"give seeds below 2\^32 \(4294967296\), at most 10000 of them, not"):
            parse_seeds(words)


def test_numbers_on_a_command_line():
    assert parse_numbers(["0.1", "1e3,5"]) == (0.1, 1000.0, 5.0)
    for words in (["a"], [""], ["1,,2"], []):
        with pytest.raises(ValueError, match="give numbers, such as 1,10,100, not"):
            parse_numbers(words)
