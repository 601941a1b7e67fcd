"""Runs EWC and MAS on permuted MNIST in other libraries and in this one, and prints a Markdown table.

    pip install -e ".[data,models,plotting]" torch==2.13.0+cpu torchvision==0.28.0 backpack-for-pytorch avalanche-lib
    python -m benchmarks.peers --chart docs/peers.png

The packages of the first line are no dependencies of the project. All ways get the same arrays: five permuted tasks,
and the first parameters of an MLP 784-1000-1000-10. Each task is learned in one epoch of batches of 128 by Adam with
the step size 1e-3. This library has the proximal penalty, all others have it in the loss. An importance is of all
examples of a task. After each task the test sets of the tasks so far are scored.

Each run is a process of its own. So the peak of its memory is its own, and its start-up counts: all its time that is
not training, importance or evaluation, such as imports, reading the arrays and compilation. In each turn all ways run,
one after the other. Two ways compute the gradient of each example by itself. There, a share of each task's examples
give the importance, and its seconds are divided by the share.

λ of the Fishers is that of `benchmarks.whole_run`. Each other one is the best of a few decades on validation data:

    python -m benchmarks.peers --validation --turns 1 --ways avalanche-ewc --strength 3e4
"""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.timing import load_part, quartiles
from experiments.protocols import uniform_init
from lifelong_jax._tables import markdown_table
from lifelong_jax.datasets import hold_out_validation
from lifelong_jax.plotting import COLORS, make_figure

NUM_TASKS = 5
PARTS = ("start-up", "training", "importance", "evaluation")


class Way(NamedTuple):
    """A way to make the run.

    Attributes:
      module: the module in `benchmarks` whose `learn(way, arrays, strength, share)` makes it.
      name: the name in the table.
      importance: the importance, in words.
      strength: λ, or the way's own factor of its penalty.
      of_part: whether the importance is of a share of the examples.
    """

    module: str
    name: str
    importance: str
    strength: float
    of_part: bool = False


WAYS = {
    "exact": Way("peers_ours", "lifelong_jax, `ewc()`", "exact Fisher", 300.0),
    "empirical": Way("peers_ours", 'lifelong_jax, `ewc("empirical")`', "Fisher at the true labels", 300.0),
    "mas": Way("peers_ours", "lifelong_jax, `mas()`", "MAS of each example", 0.1),
    "hooks": Way("peers_torch", "PyTorch, hooks", "exact Fisher", 300.0),
    "backpack": Way("peers_torch", "PyTorch, BackPACK", "Fisher at the true labels", 300.0),
    "torch-func": Way("peers_torch", "PyTorch, `torch.func`", "Fisher at the true labels", 300.0, of_part=True),
    "batch-of-one": Way("peers_torch", "PyTorch, batches of one", "Fisher at the true labels", 300.0, of_part=True),
    "avalanche-ewc": Way("peers_avalanche", "Avalanche, EWC", "squared gradients of batches", 3e4),
    "avalanche-mas": Way("peers_avalanche", "Avalanche, MAS", "absolute gradients of batches", 1.0),
}


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="number of turns")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS))
    parser.add_argument("--data", choices=("mnist", "random"), default="mnist", help="or random images of its size")
    parser.add_argument("--examples", type=int, help="training examples; all by default")
    parser.add_argument(
        "--share", type=float, default=0.1, help="of the examples, for the ways that take each by itself"
    )
    parser.add_argument("--validation", action="store_true", help="score a sixth of the training data")
    parser.add_argument("--strength", type=float, help="one λ for all ways, in place of each way's own")
    parser.add_argument("--chart", type=pathlib.Path, help="where to save the chart")
    arguments = parser.parse_args(given)
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    with tempfile.TemporaryDirectory() as folder:
        arrays = pathlib.Path(folder) / "arrays.npz"
        np.savez(arrays, **make_arrays(arguments.data, arguments.examples, validation=arguments.validation))
        for turn in range(arguments.turns):
            for way in arguments.ways[:: 1 if turn % 2 == 0 else -1]:
                strength = WAYS[way].strength if arguments.strength is None else arguments.strength
                measured[way].append(run_in_process(way, arrays, strength, arguments.share))
                print(f"turn {turn + 1}, {way}: {measured[way][-1]}", file=sys.stderr)
    print_table(measured, arguments.share)
    if arguments.chart is not None:
        draw(measured, arguments.chart)


def make_arrays(data: str, num_examples: int | None, *, validation: bool) -> dict[str, np.ndarray]:
    """Makes what all ways get: the images, the permutations, and the first parameters."""
    dataset = load_part(data, num_examples)
    if validation:
        dataset = hold_out_validation(dataset, 1 / 6, jax.random.key(0))
    draw = np.random.default_rng(0)
    arrays = {"permutations": np.stack([draw.permutation(784) for _ in range(NUM_TASKS)])}
    for split, batch in (("train", dataset.train), ("test", dataset.test)):
        arrays[f"{split}_inputs"] = np.asarray(batch.inputs).reshape(-1, 784)
        arrays[f"{split}_labels"] = np.asarray(batch.labels).astype(np.int64)
    layers = uniform_init((1000, 1000), jax.random.key(0), np.zeros(784, np.float32))["params"]
    for index in range(3):
        arrays |= {f"{name}_{index}": np.asarray(leaf) for name, leaf in layers[f"Dense_{index}"].items()}
    return arrays


def run_in_process(way: str, arrays: pathlib.Path, strength: float, share: float) -> dict[str, float]:
    """Makes a run in a process of its own, and returns what it took."""
    start = time.perf_counter()
    share = share if WAYS[way].of_part else 1.0
    code = f"from benchmarks import peers; peers.child({way!r}, {str(arrays)!r}, {strength}, {share})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {way} failed:\n{done.stderr}")
    seconds = time.perf_counter() - start
    measured = json.loads(done.stdout.splitlines()[-1])
    measured["start-up"] = seconds - sum(measured[part] for part in PARTS[1:])
    measured["importance"] /= share
    return measured | {"total": sum(measured[part] for part in PARTS)}


def child(way: str, arrays: str, strength: float, share: float) -> None:
    """Makes a run, and prints what it took, and the peak of the memory in MiB."""
    module = importlib.import_module(f"benchmarks.{WAYS[way].module}")
    measured = module.learn(way, arrays, strength, share)
    print(json.dumps(measured | {"memory": peak_memory()}))


def peak_memory() -> float:
    """Reads the peak of this process's memory in MiB. `getrusage` would count the parent's, before `exec`."""
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def print_table(measured: dict[str, list[dict[str, float]]], share: float) -> None:
    """Prints medians over the turns, with quartiles, and ratios of totals to the first way's in the same turn."""
    first = next(iter(measured.values()))
    header = ["way", "importance", *(f"{part}, s" for part in (*PARTS, "total")), "times the first", "memory, MiB"]
    rows = []
    for way, turns in measured.items():
        seconds = [quartiles([turn[part] for turn in turns], 1) for part in (*PARTS, "total")]
        ratios = [turn["total"] / of_first["total"] for turn, of_first in zip(turns, first, strict=True)]
        memory = quartiles([turn["memory"] for turn in turns], 0)
        name, importance = WAYS[way].name, WAYS[way].importance
        importance += f", of {share:.0%}" * WAYS[way].of_part
        rows.append([name, importance, *seconds, quartiles(ratios), memory, f"{100 * turns[0]['accuracy']:.1f}"])
    print(markdown_table([*header, "average accuracy, %"], rows))


def draw(measured: dict[str, list[dict[str, float]]], file: pathlib.Path) -> None:
    """Draws the median seconds of each way's parts as bars; those above five times the median way's are cut off."""
    figure = make_figure(7.2, 0.7 + 0.36 * len(measured), "Five permuted tasks of MNIST: seconds, by part")
    axis = figure.subplots()
    names, left = [WAYS[way].name.replace("`", "") for way in measured], np.zeros(len(measured))
    for part, color in zip(PARTS, COLORS, strict=False):
        seconds = np.array([np.median([turn[part] for turn in turns]) for turns in measured.values()])
        axis.barh(names, seconds, left=left, color=color, label=part)
        left += seconds
    end = 1.15 * left[left <= 5 * np.median(left)].max()
    for place, total in enumerate(left):
        inside = {"x": total, "ha": "left"} if total < end else {"x": end, "ha": "right", "color": "white"}
        axis.text(y=place, s=f" {total:.0f} ", va="center", fontsize=8, **inside)
    axis.set_xlim(0, end)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.legend(frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    main()
