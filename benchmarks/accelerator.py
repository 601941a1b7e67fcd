"""Makes the tables of the page on performance on the device at hand.

    python -m benchmarks.accelerator > tables.md
    python -m benchmarks.accelerator --smallest    # to see that it works

Each table is made twice: with products of float32 in full, and by JAX's default, which is coarser on accelerators; on a
CPU, where both are one, once. The first table has the limits of the chip: those that its maker publishes, if it is
known, and a large product and a large copy. The whole run is on random images of the size of MNIST's, so that nothing
is read: its times are those of MNIST, its accuracy means nothing. On a CPU, it has a fifth of the images, importances
are those of the MLP alone, and convolutions are of small images. After 400 seconds, no further table is begun, and
those that are left out are named: the command is meant to take less than eight minutes.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks import convolutions, importance, penalty, sweep, transformer, whole_run
from benchmarks.chips import PRECISIONS, find_chip, measure_bytes, measure_flops
from benchmarks.timing import device
from lifelong_jax._tables import markdown_table


class Part(NamedTuple):
    """A benchmark.

    Attributes:
      title: the heading of its tables.
      main: prints its tables.
      arguments: what it is called with.
      smallest: what it is called with to see that it works.
      more_on_cpu: what it is called with besides on a CPU.
    """

    title: str
    main: Callable[[list[str]], None]
    arguments: str
    smallest: str
    more_on_cpu: str = ""


PARTS = [
    Part("Importances", importance.main, "--rounds 3", "--rounds 1 --models 0", more_on_cpu="--models 0"),
    Part("The penalty", penalty.main, "--turns 21", "--turns 2 --tasks 1 2"),
    Part(
        "A whole run",
        whole_run.main,
        "--data random --turns 1",
        "--data random --turns 1 --examples 600",
        more_on_cpu="--examples 12000",
    ),
    Part("Sweeps", sweep.main, "--turns 1", "--turns 1 --examples 64 --epochs 1 --runs 1 2"),
    Part("Transformers", transformer.main, "--rounds 3", "--rounds 1"),
    Part(
        "Convolutions",
        convolutions.main,
        "--turns 3",
        "--turns 2 --sizes 8 --batch-sizes 32",
        more_on_cpu="--sizes 8",
    ),
]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=400, help="after these, no further table is begun")
    parser.add_argument("--smallest", action="store_true", help="the smallest settings, whose times mean nothing")
    arguments = parser.parse_args()
    end = time.perf_counter() + arguments.seconds
    print(f"# {device()}\n\n{limits(arguments.smallest)}")
    left_out = []
    for part in PARTS:
        usual = f"{part.arguments} {part.more_on_cpu if on_cpu() else ''}"
        for precision in PRECISIONS[: 1 if on_cpu() else None]:
            if time.perf_counter() > end:
                left_out.append(f"{part.title}, {precision}")
                continue
            print(f"## {part.title}, products at precision {precision!r}\n", flush=True)
            with jax.default_matmul_precision(precision):
                part.main((part.smallest if arguments.smallest else usual).split())
    if left_out:
        print(f"Left out, as the time was over: {'; '.join(left_out)}.")


def on_cpu() -> bool:
    """Says whether the device at hand is a CPU."""
    return jax.devices()[0].platform == "cpu"


def limits(smallest: bool) -> str:
    """Makes the table of the limits of the chip, published and measured."""
    chip = find_chip(jax.devices()[0].device_kind)
    is_large = not smallest and not on_cpu()
    size, num_bytes = (8192, 2**30) if is_large else (1024, 2**26)
    rows = []
    for precision in PRECISIONS:
        published = None if chip is None else getattr(chip, precision)
        row = [f"product {size} × {size}, precision {precision!r}, TFLOP/s"]
        rows.append([*row, *_cells(measure_flops(precision, size), published, 1e12)])
    copied = measure_bytes(num_bytes), None if chip is None else chip.bytes_per_second
    rows.append([f"copy of {num_bytes // 2**20} MiB, GB/s", *_cells(*copied, 1e9)])
    return markdown_table(["what", "measured", "published", "share"], rows)


def _cells(measured: float, published: float | None, unit: float) -> list[str]:
    if published is None:
        return [f"{measured / unit:.3g}", "–", "–"]
    return [f"{measured / unit:.3g}", f"{published / unit:.3g}", f"{measured / published:.2f}"]


if __name__ == "__main__":
    main()
