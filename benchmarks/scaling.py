"""Computes what importances of large models take on many chips, and prints Markdown tables. Nothing is measured.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --chip "NVIDIA H100 80GB HBM3" --chips-per-host 8 --network 5e10

Parameters, importances, anchors and the optimiser's state are sharded over all chips in equal parts (FSDP). Each chip
computes one sequence at a time; layers are computed again in the backward pass. `tests/benchmarks/test_scaling.py`
compares the counts with the compiler's, for small models. Seconds are those of the slowest of three: products at a
share of the peak, memory, and the network, which work at the same time.
"""

import argparse
import functools
import math
from typing import NamedTuple

import jax

from benchmarks.chips import CHIPS, Chip
from lifelong_jax._tables import markdown_table
from lifelong_jax.models import TransformerConfig, transformer_functions

GPT = functools.partial(TransformerConfig, tied=False, bias=False, positions="rotary", norm="rms", remat=True)
MODELS = {
    "1 B": GPT(50_304, 2048, num_layers=16, num_heads=16, width=2048),
    "7 B": GPT(32_000, 4096, num_layers=32, num_heads=32, width=4096),
    "70 B": GPT(32_000, 4096, num_layers=80, num_heads=64, num_kv_heads=8, width=8192, hidden_size=43_008),
}
FLOAT32, BFLOAT16, BYTE = 4, 2, 1  # bytes an entry
GIB = 2**30


@functools.cache
def count_params(config: TransformerConfig) -> int:
    """Counts the parameters, from their shapes alone."""
    init_fn, _ = transformer_functions(config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init_fn, jax.random.key(0))))


def layer_params(config: TransformerConfig) -> int:
    """Counts the weights of a layer: of queries, keys, values and outputs of attention, and of the perceptron."""
    width, shared = config.width, (config.num_kv_heads or config.num_heads) / config.num_heads
    return round(2 * width**2 * (1 + shared)) + 2 * width * (config.hidden_size or 4 * width)


def fisher_flops(config: TransformerConfig) -> float:
    """Counts the operations of a Fisher of one sequence, with one backward pass: empirical, or with one sample.

    There are three products per weight and token, each of a multiplication and an addition: forward, back, and the
    gradient. Layers are computed once more. So are the two products of attention, whose derivatives are four.
    """
    tokens, width = config.max_length, config.width
    layer = 2 * tokens * (4 * layer_params(config) + 8 * tokens * width)
    return config.num_layers * layer + 2 * tokens * 3 * config.vocab_size * width


def temporary_bytes(config: TransformerConfig, dtype_bytes: int = BFLOAT16) -> float:
    """Counts what a chip holds for a sequence, besides its shards: activations, logits, and a layer's weights.

    Of one layer at a time, it has the weights and the gradient of its sequence, in float32, before it is squared and
    scattered. A table of embeddings is such a layer, too.
    """
    tokens, width, hidden = config.max_length, config.width, config.hidden_size or 4 * config.width
    inputs = dtype_bytes * config.num_layers * tokens * width
    within = dtype_bytes * tokens * (2 * hidden + 8 * width) + 2 * FLOAT32 * config.num_heads * tokens**2
    logits = 2 * FLOAT32 * tokens * config.vocab_size
    weights = (dtype_bytes + FLOAT32) * max(layer_params(config), config.vocab_size * width)
    return inputs + max(within, logits) + weights


class Cost(NamedTuple):
    """What a pass or a step takes on each chip.

    Attributes:
      flops: floating-point operations.
      memory: bytes that its memory reads and writes.
      network: bytes that it sends, and receives.
    """

    flops: float
    memory: float
    network: float

    def seconds(self, chip: Chip, share: float) -> float:
        """Returns the time of the slowest of the three."""
        bound = self.memory / chip.bytes_per_second, self.network / chip.network
        return max(self.flops / (share * chip.bfloat16), *bound)


def fisher_cost(config: TransformerConfig) -> Cost:
    """Counts what one sequence costs the chip that computes it.

    Weights come in bfloat16 twice, forward and back, and are read three times. The gradient is written, read and
    squared in float32, and the sum over chips is scattered.
    """
    size = count_params(config)
    return Cost(fisher_flops(config), (3 * BFLOAT16 + 3 * FLOAT32) * size, (2 * BFLOAT16 + FLOAT32) * size)


def penalty_cost(config: TransformerConfig, num_chips: int, kept_bytes: int) -> Cost:
    """Counts what the penalty adds to a training step: each chip reads its shards of anchor and importance."""
    return Cost(0, kept_bytes * count_params(config) / num_chips, 0)


def memory_table(chip: Chip, numbers: list[int]) -> str:
    """Makes the table of GiB per chip, in brackets where they do not fit."""
    rows = []
    for name, config in MODELS.items():
        for number in numbers:
            shard = count_params(config) / number / GIB
            temporary = temporary_bytes(config) / GIB
            fisher = 2 * FLOAT32 * shard + temporary
            training = 4 * FLOAT32 * shard + temporary  # parameters, gradient, and Adam's two moments
            kept = [2 * FLOAT32 * shard, (BFLOAT16 + BYTE) * shard]
            rows.append(
                [name, number, FLOAT32 * shard, temporary, fisher, *kept, training, *(training + k for k in kept)]
            )
    cells = [[name, str(number), *(_gib(value, chip) for value in values)] for name, number, *values in rows]
    header = ["model", "chips", "parameters", "temporary", "a Fisher's pass", "anchor, importance", "the same, 3 bytes"]
    return markdown_table([*header, "training", "with both", "with both, 3 bytes"], cells)


def _gib(value: float, chip: Chip) -> str:
    return f"{value:,.2f}" if value * GIB < 0.9 * chip.memory else f"({value:,.0f})"


def fisher_table(chip: Chip, numbers: list[int], share: float, num_tokens: float) -> str:
    """Makes the table of a Fisher's times: of the three parts of a sequence, and of many tokens on all chips."""
    rows = []
    for name, config in MODELS.items():
        cost = fisher_cost(config)
        alone = [Cost(cost.flops, 0, 0), Cost(0, cost.memory, 0), Cost(0, 0, cost.network)]
        parts = [f"{1000 * part.seconds(chip, share):,.0f}" for part in alone]
        whole = [num_tokens / config.max_length / number * cost.seconds(chip, share) for number in numbers]
        rows.append([name, *parts, *(f"{seconds:,.1f}" for seconds in whole)])
    header = ["model", "products, ms a sequence", "memory", "network"]
    return markdown_table([*header, *(f"{num_tokens:,.0f} tokens, {number} chips, s" for number in numbers)], rows)


def penalty_table(chip: Chip, numbers: list[int], share: float) -> str:
    """Makes the table of what the penalty adds to a step, in milliseconds, and of a step of one sequence a chip."""
    rows = []
    for name, config in MODELS.items():
        step = fisher_cost(config).seconds(chip, share)
        costs = [penalty_cost(config, number, kept).seconds(chip, share) for kept in (8, 3) for number in numbers]
        rows.append([name, f"{1000 * step:,.0f}", *(f"{1000 * seconds:,.2f}" for seconds in costs)])
    columns = [f"{kept} bytes, {number} chips" for kept in (8, 3) for number in numbers]
    return markdown_table(["model", "a step, ms", *columns], rows)


def file_table(numbers: list[int], chips_per_host: int, disk: float) -> str:
    """Makes the table of files: their size, and the seconds in which all hosts write their parts of them."""
    rows = []
    for name, config in MODELS.items():
        sizes = [kept * count_params(config) for kept in (2 * FLOAT32, BFLOAT16 + BYTE, BYTE)]
        seconds = [
            f"{size / disk / max(1, number // chips_per_host):,.1f}"
            for number in numbers
            for size in (sizes[0], sizes[-1])
        ]
        rows.append([name, *(f"{size / GIB:,.1f}" for size in sizes), *seconds])
    header = ["model", "8 bytes, GiB", "3 bytes", "1 byte: the anchor by its digest"]
    columns = [f"{kept}, {number} chips, s" for number in numbers for kept in ("8 bytes", "1 byte")]
    return markdown_table([*header, *columns], rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", choices=CHIPS, default="TPU v5")
    parser.add_argument("--chips", type=int, nargs="+", default=[8, 64, 512], help="numbers of chips")
    parser.add_argument("--chips-per-host", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that products reach")
    parser.add_argument("--network", type=float, help="bytes per second that a chip sends; the chip's own by default")
    parser.add_argument("--tokens", type=float, default=1e7, help="that a Fisher is computed over")
    parser.add_argument("--disk", type=float, default=1e9, help="bytes per second that a host writes")
    arguments = parser.parse_args()
    chip = CHIPS[arguments.chip]
    chip = chip._replace(network=arguments.network or chip.network)
    print(", ".join(f"{name}: {count_params(config):,} parameters" for name, config in MODELS.items()) + "\n")
    print(memory_table(chip, arguments.chips))
    print(fisher_table(chip, arguments.chips, arguments.share, arguments.tokens))
    print(penalty_table(chip, arguments.chips, arguments.share))
    print(file_table(arguments.chips, arguments.chips_per_host, arguments.disk))


if __name__ == "__main__":
    main()
