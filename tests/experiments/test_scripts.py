"""What all scripts have in common: the list of them, a help that comes soon, and equal files of equal runs."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from experiments import permuted, reconsolidate, regression, rotated, split, strength_sweep
from experiments.__main__ import scripts
from experiments.harness.settings import DataSettings, parse_settings

NAMES = {
    path.stem
    for path in pathlib.Path(permuted.__file__).parent.glob("[!_]*.py")
    if 'if __name__ == "__main__"' in path.read_text()
}
SLOW = {"sklearn", "matplotlib", "orbax", "tensorflow", "tensorflow_datasets", "scipy", "pandas"}
"""Packages that take a second or so to import, and that only a run needs."""

CHILD = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(f"experiments.{name}")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_the_scripts_are_listed():
    result = subprocess.run([sys.executable, "-m", "experiments"], capture_output=True, text=True, check=True)
    listed = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("  "))
    assert listed.keys() == scripts().keys() == NAMES
    assert listed["permuted"] == permuted.__doc__.partition("\n")[0]


def test_a_help_imports_nothing_that_only_a_run_needs():
    command = [sys.executable, "-c", CHILD, json.dumps(sorted(NAMES))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not SLOW & set(json.loads(result.stdout))


@pytest.mark.parametrize("script", [permuted, rotated, split, regression, reconsolidate, strength_sweep])
def test_the_help_names_every_kind_of_data_set(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_settings(script.Config, script.__name__, ["--help"])
    printed = capsys.readouterr().out
    for name in ("digits", "letters", "folder:PATH", "mit_scenes:PATH", "TFDS"):
        assert name in printed


def test_every_script_that_takes_a_data_set_has_the_flags_of_images():
    configs = [importlib.import_module(f"experiments.{name}").Config for name in sorted(NAMES - {"track"})]
    taking = [config for config in configs if {"dataset", "datasets"} & config.__dataclass_fields__.keys()]
    assert len(taking) == 8
    assert all(issubclass(config, DataSettings) for config in taking)


@pytest.mark.usefixtures("standard_promotion")
def test_equal_runs_have_equal_files_but_for_the_log_and_the_times(tmp_path):
    small = "--num-tasks 2 --hidden-sizes 8 --num-epochs 1 --seeds 0 1 --methods ewc --strength 1,10"
    config = parse_settings(permuted.Config, "permuted", [*small.split(), "--output-dir", str(tmp_path)])
    permuted.main(config)
    permuted.main(config)
    first, second = sorted((tmp_path / "permuted").iterdir())
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert pathlib.Path("sequences/ewc, seed 0/task-1.safetensors") in files
    for file in files:
        if str(file) not in ("metrics.jsonl", "times.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes(), file
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows if row["event"] == "epoch"} == {1, 2}  # counted from 1, as in the files' names
