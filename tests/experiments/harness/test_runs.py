"""Run folders: what is logged, kept, locked and stopped."""

import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import shlex
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from experiments.harness import record, runs
from experiments.harness.report import estimate
from experiments.harness.runs import Run, compute_once, open_run, read_rows
from experiments.harness.settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[str, ...] = ("ewc",)
    strength: float = 2.0


CONSOLE = rich.console.Console()
EPOCH = {"event": "epoch", "method": "ewc", "seed": 0, "task": 1, "loss": None, "accuracies": [0.5, None]}


def test_a_run_writes_as_it_goes(tmp_path):
    run = runs.start_run(tmp_path, "study", Config(), [])
    assert run.folder.parent == tmp_path / "study"
    assert json.loads((run.folder / "config.json").read_text()) == {"methods": ["ewc"], "strength": 2.0}
    run.log(epoch=1, accuracies=np.array([0.5, np.nan]))
    run.log(epoch=2, loss=math.inf)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1, "accuracies": [0.5, None]}, {"epoch": 2, "loss": None}]
    run.write_summary({"ewc": estimate([1.0, 3.0])})
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary == {"ewc": {"mean": 2.0, "stderr": 1.0, "values": [1.0, 3.0]}}


def test_two_runs_at_once_get_two_folders(tmp_path):
    folders = {runs.start_run(tmp_path, "study", Config(), []).folder for _ in range(3)}
    assert len(folders) == 3


def test_half_a_row_is_no_row(tmp_path):
    run = Run(tmp_path)
    run.log(**EPOCH, epochs=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epoch", "method": "ew')
    assert len(read_rows(tmp_path)) == 1
    run = Run(tmp_path)
    runs._read_log(run)
    run.log(**EPOCH, epochs=2)
    assert [row["epochs"] for row in read_rows(tmp_path)] == [1, 2]


WRONG = [
    {"epochs": "2"},
    {"epochs": 2, "event": "other"},
    {"epochs": 2, "event": ["epoch"]},
    {"epochs": 2, "seed": [0]},
    {"epochs": 2, "method": 3},
    {"epochs": 2, "accuracies": [0.5, "high"]},
    {"epochs": 2, "accuracies": [[0.5], 0.5]},
    {"epochs": 2, "loss": {}},
    {"event": "sequence"},
    {},
]


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[1]", b"\xff", *(json.dumps(EPOCH | wrong).encode() for wrong in WRONG)]
)
def test_a_damaged_line_costs_no_other_row(tmp_path, damaged):
    run = Run(tmp_path)
    for epochs in (1, 2):
        run.log(**EPOCH, epochs=epochs)
    first, second = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([first, damaged, second, b""]))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run = Run(tmp_path)
    with pytest.warns(UserWarning, match=r"line 2 of .*metrics\.jsonl is damaged, and is skipped"):
        runs._read_log(run)
    assert [row["epochs"] for row in run.earlier_rows[None, "ewc", 0]] == [1, 2]
    assert [row["epochs"] for row in read_rows(tmp_path)] == [1, 2]  # and is not said again
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == before


class NamedNumbers(NamedTuple):
    inexact: jax.Array
    boolean: np.ndarray
    number: float


def never():
    raise AssertionError("computed again")


def test_a_part_is_computed_once(tmp_path):
    run = Run(tmp_path)
    numbers = NamedNumbers(jnp.array([0.1, np.nan, -np.inf], jnp.float32), np.arange(6).reshape(2, 3) == 4, 1 / 3)
    expected = {
        "numbers": {name: np.asarray(leaf) for name, leaf in numbers._asdict().items()},
        "accuracy": np.float64(0.7),
    }
    for function in (lambda: {"numbers": numbers, "accuracy": 0.7}, never):
        part = compute_once(run, "two parameters, seed 0", function)
        jax.tree.map(np.testing.assert_array_equal, part, expected)
        assert jax.tree.map(lambda leaf: leaf.dtype, part) == jax.tree.map(lambda leaf: leaf.dtype, expected)

    (file,) = (tmp_path / "parts").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole.replace(np.float64(0.7).tobytes(), np.float64(0.8).tobytes())):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"seed 0\.npz is damaged, and is computed again"):
            assert compute_once(run, "two parameters, seed 0", lambda: {"accuracy": 0.9}) == {"accuracy": 0.9}

    def interrupted():
        run.stopping.set()
        return {"accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        compute_once(run, "two parameters, seed 1", interrupted)
    assert compute_once(run, "two parameters, seed 1", never) == {"accuracy": 0.5}


def test_a_second_signal_stops_at_once(tmp_path, capsys):
    with (
        pytest.raises(SystemExit, match="130"),
        open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE, []) as run,
    ):
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stopping.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("unreachable")
    assert "--resume" in capsys.readouterr().out.replace("\n", " ")


def test_one_process_at_a_time_writes_to_a_run(tmp_path):
    with open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE, []) as run:
        again = RunSettings(output_dir=str(tmp_path), resume=str(run.folder))
        with pytest.raises(SystemExit, match="another process is writing to"), open_run(again, "permuted", CONSOLE, []):
            pass
    with open_run(again, "permuted", CONSOLE, []):
        pass


def test_the_folder_is_printed_at_the_start_and_can_be_pasted_into_a_shell(tmp_path, capsys):
    settings = RunSettings(output_dir=str(tmp_path / "two words; $HOME"))
    with pytest.raises(SystemExit, match="130"), open_run(settings, "permuted", rich.console.Console(), []) as run:
        assert f"writing in {run.folder}" in capsys.readouterr().out
        raise KeyboardInterrupt
    (command,) = (line for line in capsys.readouterr().out.splitlines() if "--resume" in line)
    assert shlex.split(command)[-2:] == ["--resume", str(run.folder)]
    resumed = RunSettings(output_dir=str(tmp_path), resume=str(run.folder))
    with open_run(resumed, "permuted", rich.console.Console(), []):
        assert f"going on in {run.folder}" in capsys.readouterr().out


def test_changed_data_are_refused(tmp_path):
    images, labels = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3), np.array([0, 1])
    with open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE, [images, labels]) as run:
        pass
    settings = RunSettings(output_dir=str(tmp_path), resume=str(run.folder))
    with open_run(settings, "permuted", CONSOLE, [np.nextafter(images, 2), labels]):  # as another device divides
        pass
    for data, which in (
        ([images, 1 - labels], "data set 2 of 2 has changed"),
        ([images.reshape(3, 2), labels], "data set 1 of 2 has changed"),
        ([images[:, ::-1], labels[::-1]], "data set 1, 2 of 2 has changed"),
    ):
        with (
            pytest.raises(SystemExit, match=f"^error: --resume: .* was begun with other data: .*{which}"),
            open_run(settings, "permuted", CONSOLE, data),
        ):
            raise AssertionError("unreachable")


def test_other_versions_are_said(tmp_path, monkeypatch):
    with open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE, []) as run:
        pass
    settings = RunSettings(output_dir=str(tmp_path), resume=str(run.folder))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "optax" else version(name))
    monkeypatch.setattr(record, "_revision", lambda: "abc")
    warned = rf"was begun with optax {version('optax')}, now 0.0.1; git revision .*, now abc"
    with pytest.warns(UserWarning, match=warned), open_run(settings, "permuted", CONSOLE, []):
        pass


def test_a_run_without_a_record_goes_on_with_a_warning_and_one_with_a_damaged_record_is_refused(tmp_path):
    with open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE, []) as run:
        pass
    settings = RunSettings(output_dir=str(tmp_path), resume=str(run.folder))
    for content in (b"{", b"[]", b"{}", b"\xff"):
        (run.folder / "record.json").write_bytes(content)
        with pytest.raises(SystemExit, match=r"record\.json is damaged"), open_run(settings, "permuted", CONSOLE, []):
            raise AssertionError("unreachable")
    (run.folder / "record.json").unlink()
    with pytest.warns(UserWarning, match=r"has no record\.json"), open_run(settings, "permuted", CONSOLE, []):
        pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded(RunSettings):
    seeds: tuple[int, ...] = (0,)
    strength: float = 2.0


def test_what_is_added_is_written_into_both_files_or_neither(tmp_path, capsys, monkeypatch):
    names = ("config.json", "record.json")
    with open_run(Seeded(output_dir=str(tmp_path)), "permuted", CONSOLE, []) as run:
        before = [(run.folder / name).read_bytes() for name in names]
    more = Seeded(output_dir=str(tmp_path / "elsewhere"), resume=str(run.folder), seeds=(0, 3))
    write_bytes = pathlib.Path.write_bytes

    def full_disk(path, data):
        if "record" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_bytes(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "write_bytes", full_disk)
        with pytest.raises(SystemExit, match="No space left"), open_run(more, "permuted", CONSOLE, []):
            raise AssertionError("unreachable")
    assert [(run.folder / name).read_bytes() for name in names] == before
    with open_run(more, "permuted", rich.console.Console(), []):
        assert "adding seeds 3" in capsys.readouterr().out
    with open_run(Seeded(output_dir=str(tmp_path), seeds=(0, 3)), "permuted", CONSOLE, []) as whole:
        pass
    assert [(run.folder / name).read_bytes() for name in names] == [
        (whole.folder / name).read_bytes() for name in names
    ]


def test_too_little_memory_is_one_line(tmp_path):
    with (
        pytest.raises(SystemExit, match=r"^error: Unable to allocate 9 GiB\nto go on: "),
        open_run(RunSettings(output_dir=str(tmp_path)), "permuted", CONSOLE, []),
    ):
        raise MemoryError("Unable to allocate 9 GiB")


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    settings = RunSettings(output_dir=str(tmp_path / "file"))
    with pytest.raises(SystemExit, match=r"error: .*file"), open_run(settings, "permuted", CONSOLE, []):
        pass
