"""Compares methods on a sequence of texts, whose next byte a small network predicts: prose, source code, names.

All texts come with Python: the language's documentation, its standard library, and the names of Unicode's characters.
The score is the loss per byte on each text, in nats; a lower one is better. Paragraphs are cut into examples of some
number of bytes. Shorter ones are padded; the padding has the weight 0 in losses, importances and scores.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import numpy as np

from experiments.harness.experiment import Experiment, Settings, Strength, run_experiment
from experiments.harness.settings import Seeds, check_settings, parse_settings, refuse
from experiments.harness.texts import code, prose
from lifelong_jax import Batch, Task
from lifelong_jax.datasets import Dataset, next_token_example
from lifelong_jax.importance import layer_output
from lifelong_jax.models import init_network
from lifelong_jax.objectives import classification

STRENGTH = Strength(l2=0.316, ewc=31.6, mas=0.01, kfac=0.0, local_mas=0.01, si=100.0, rwalk=10.0)  # on validation data
OBJECTIVE = classification(score="loss")._replace(score="loss per byte")
NUM_BYTES, NUM_HEADS = 256, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Compare how much methods forget of a sequence of texts, whose next byte a small network predicts."""

    texts: tuple[Literal["prose", "code", "names"], ...] = ("prose", "code", "names")
    """The texts, in the order of learning: Python's documentation, its standard library, names of Unicode."""

    length: int = 64
    """Bytes of an example; shorter ones are padded."""

    num_examples: int = 768
    """Training examples of each text; there are a quarter as many test examples."""

    width: int = 64
    """The network's width: an embedding of bytes and positions, one block of causal attention, an output layer."""

    methods: tuple[Literal["finetune", "l2", "ewc", "mas", "local_mas", "si", "rwalk", "joint"], ...] = (
        "finetune",
        "l2",
        "ewc",
        "mas",
        "joint",
    )
    """The methods to compare, as for permuted; kfac takes no padding."""

    num_epochs: int = 8
    """Passes over each text's training examples."""

    optimizer: Literal["adam", "sgd", "momentum"] = "adam"
    """The optimiser: Adam, plain SGD, or SGD with momentum 0.9. Each task begins with a fresh optimiser state."""

    learning_rate: float = 3e-3
    """The optimiser's step size."""

    fisher: Literal["sampled", "empirical"] = "sampled"
    """For ewc, the labels of the Fisher information: at each position, a byte sampled from the model (sampled), or the
    true one (empirical). The exact expectation would take a pass for each position and byte."""

    seeds: Seeds = (0, 1, 2)
    """The seeds, such as 0-2: each has its own initialisation and order of examples."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        names = ("length", "num_examples", "width")
        check_settings(positive={name: getattr(self, name) for name in names}, distinct={"texts": self.texts})
        if self.width % NUM_HEADS:
            raise ValueError(f"width must be a multiple of {NUM_HEADS}, the number of heads, not {self.width}.")


def main(config: Config) -> None:
    """Runs the comparison."""
    try:
        datasets = [load_text(name, config.length, config.num_examples) for name in config.texts]
    except (OSError, ValueError) as error:
        refuse(error)
    network = Network(config.width)
    experiment = Experiment(
        name="text",
        title=f"Next byte of {' → '.join(config.texts)}",
        datasets=datasets,
        make_tasks=lambda datasets, key: [Task(train, test) for train, test, _ in datasets],
        task_names=config.texts,
        scenario="domain",
        apply_fn=network.apply,
        init_params=functools.partial(init_network, network),
        objective=OBJECTIVE,
    )
    run_experiment(config, experiment)


def load_text(name: str, length: int, num_examples: int) -> Dataset:
    """Loads a text: a sample of its paragraphs, the same for all seeds, cut into examples."""
    found = {"prose": prose, "code": code, "names": names}[name]()
    paragraphs = list(dict.fromkeys(filter(str.strip, found)))  # once each: some stand in several chapters
    order = np.random.default_rng(0).permutation(len(paragraphs))
    pieces = (piece for index in order for piece in cut(paragraphs[index].encode() + b"\n", length))
    num_test = max(1, num_examples // 4)
    taken = list(itertools.islice(pieces, num_test + num_examples))
    if len(taken) < num_test + num_examples:
        raise ValueError(f"num_examples must be at most {len(taken) * 4 // 5} for {name}, not {num_examples}")
    return Dataset(make_batch(taken[num_test:], length), make_batch(taken[:num_test], length), NUM_BYTES)


def names() -> list[str]:
    """Returns the names of Unicode's characters, but not those that are numbered or spelled by a rule."""
    found = (unicodedata.name(chr(point), "") for point in range(0x20000))
    return [name for name in found if name and not name.startswith(("CJK", "HANGUL"))]


def cut(text: bytes, length: int) -> Iterable[bytes]:
    """Cuts a text into pieces of some length; the last may be shorter."""
    return (text[start : start + length] for start in range(0, len(text), length))


def make_batch(pieces: Sequence[bytes], length: int) -> Batch:
    """Makes the examples of pieces of text.

    The labels are the bytes, and the input at a position is the byte before it, 0 at the first. The padding of a short
    piece has the weight 0.
    """
    examples = [next_token_example(list(b"\0" + piece), length) for piece in pieces]
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *examples))


class Network(nn.Module):
    """Predicts each byte of a text from those before it: a block of causal attention between embedding and output.

    Attributes:
      width: of all layers, a multiple of the number of heads.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the logits `[length, 256]` of the bytes that follow those of `x`, `[length]`."""
        place = self.param("place", nn.initializers.normal(0.02), (len(x), self.width))
        h = nn.Embed(NUM_BYTES, self.width)(x) + place
        normal = nn.LayerNorm()(h)
        h += nn.MultiHeadDotProductAttention(NUM_HEADS)(normal, mask=nn.make_causal_mask(x))
        hidden = layer_output(nn.relu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        return nn.Dense(NUM_BYTES)(nn.LayerNorm()(h + nn.Dense(self.width)(hidden)))


if __name__ == "__main__":
    main(parse_settings(Config, "text"))
