"""Tests of the command that makes all tables of the page on performance, without its benchmarks."""

import jax
import pytest

from benchmarks import accelerator, chips


def test_chips_are_known_by_the_names_that_jax_gives_them():
    kinds = {"NVIDIA H100 80GB HBM3": 3350, "NVIDIA H200": 4800, "NVIDIA A100-SXM4-40GB": 1555, "TPU v5 lite": 819}
    kinds |= {"TPU v5": 2765, "TPU v5p": 2765, "TPU v6 lite": 1640}
    assert {kind: chips.find_chip(kind).bytes_per_second / 1e9 for kind in kinds} == kinds


def test_of_an_unknown_chip_the_limits_are_measured_alone(monkeypatch):
    assert chips.find_chip("cpu") is None
    monkeypatch.setattr(accelerator, "measure_flops", lambda precision, size: 2e12)
    monkeypatch.setattr(accelerator, "measure_bytes", lambda num_bytes: 3e9)
    assert [row.split("|")[2:] for row in accelerator.limits(smallest=True).splitlines()[2:]] == [
        [f" {measured:>8} ", "         – ", "     – ", ""] for measured in (2, 2, 3)
    ]
    monkeypatch.setattr(accelerator, "find_chip", lambda kind: chips.H100)
    highest, default, copied = accelerator.limits(smallest=True).splitlines()[2:]
    assert "0.03" in highest and "495" in default and "3.35e+03" in copied


def test_each_table_is_made_at_both_precisions_until_the_time_is_over(monkeypatch, capsys):
    made = []

    def make(arguments):
        made.append((jax.config.jax_default_matmul_precision, *arguments))

    monkeypatch.setattr(accelerator, "limits", lambda smallest: "")
    steps = accelerator.Part("Steps", make, "--turns 9", "--turns 1", "--examples 3")
    monkeypatch.setattr(accelerator, "PARTS", [steps])
    monkeypatch.setattr("sys.argv", ["accelerator"])
    accelerator.main()
    assert made == [("highest", "--turns", "9", "--examples", "3")]  # on a CPU both precisions are one
    made.clear()
    monkeypatch.setattr(accelerator, "on_cpu", lambda: False)
    accelerator.main()
    assert made == [(precision, "--turns", "9") for precision in ("highest", "default")]
    made.clear()
    monkeypatch.setattr("sys.argv", ["accelerator", "--smallest"])
    accelerator.main()
    assert made == [("highest", "--turns", "1"), ("default", "--turns", "1")]
    monkeypatch.setattr("sys.argv", ["accelerator", "--seconds", "0"])
    accelerator.main()
    assert len(made) == 2
    assert capsys.readouterr().out.endswith("Left out, as the time was over: Steps, highest; Steps, default.\n")


@pytest.mark.parametrize("part", accelerator.PARTS, ids=lambda part: part.title)
@pytest.mark.parametrize("settings", ["arguments", "smallest"])
def test_benchmarks_take_the_arguments_that_they_are_called_with(part, settings, capsys):
    arguments = f"{getattr(part, settings)} {part.more_on_cpu}".split()
    with pytest.raises(SystemExit, match="0"):  # its help ends it, after the values are known to be right
        part.main([*arguments, "--help"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in arguments if name.startswith("--"))
