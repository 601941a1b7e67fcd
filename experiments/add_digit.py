"""A network learns to add 1 to a digit, and then to add 2. Afterwards it can no longer add 1.

The input is an image of a digit and the number to add; the class is the sum. As the number to add is part of the input,
one network could do both. After the second task it has simply forgotten the first.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from experiments.harness.experiment import Experiment, ImageSettings, Strength, load_or_exit, run_experiment
from experiments.harness.networks import make_network, network_functions
from experiments.harness.settings import check_settings, parse_settings
from lifelong_jax import Batch, Task
from lifelong_jax.datasets import Dataset
from lifelong_jax.models import init_network

STRENGTH = Strength(l2=0.1, ewc=3.16e4, mas=3.16, kfac=3.16e4, local_mas=316.0, si=3.16e5, rwalk=100.0)  # by --tune
LARGEST_ADDEND = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImageSettings):
    """Learn to add 1 to a digit, then to add 2: can the network still add 1?"""

    dataset: str = "digits"
    """digits (bundled), or the name of a data set of images of digits, such as mnist."""

    addends: tuple[int, ...] = (1, 2)
    """The number that each task adds to the digit, at most 10,000: every sum is a class."""

    network: Literal["mlp"] = "mlp"
    """A multilayer perceptron. A convolutional network cannot be used, because the input is an image and a number."""

    num_epochs: int = 10
    """Passes over each task's training data."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        check_settings(not_negative={"addends": self.addends}, distinct={"addends": self.addends})
        if max(self.addends) > LARGEST_ADDEND:
            gigabytes = 5 * 4 * max(self.addends) * (1 + sum(self.hidden_sizes[-1:])) / 1e9
            raise ValueError(
                f"addends must be at most {LARGEST_ADDEND}, not {self.addends}: every sum is an output of the network, "
                f"whose last layer would take {gigabytes:,.1f} GB or more for each method and seed."
            )


def main(config: Config) -> None:
    """Runs the comparison."""
    dataset = load_or_exit(config.dataset, config)
    network = make_network(config, dataset.num_classes + max(config.addends))
    apply_fn, train_fn = network_functions(config, network)
    experiment = Experiment(
        name="add_digit",
        title=f"Adding {', then '.join(map(str, config.addends))} to {config.dataset}",
        datasets=[dataset],
        make_tasks=lambda datasets, key: [make_task(datasets[0], config.addends, addend) for addend in config.addends],
        task_names=[f"+{addend}" for addend in config.addends],
        scenario="domain",
        apply_fn=apply_fn,
        init_params=functools.partial(init_network, network),
        train_fn=train_fn,
    )
    run_experiment(config, experiment)


def make_task(dataset: Dataset, addends: Sequence[int], addend: int) -> Task:
    """Makes the task of adding one number. Inputs are an image's pixels and the number, one-hot; the class is the sum.

    The one-hot vector is scaled to the norm of an average image, so that the network does not overlook it.
    """
    norm = jnp.sqrt(jnp.mean(jnp.sum(dataset.train.inputs**2, axis=(1, 2, 3))))

    def add(batch: Batch) -> Batch:
        pixels = batch.inputs.reshape(len(batch.labels), -1)
        one_hot = jnp.tile(jnp.where(jnp.array(addends) == addend, norm, 0), (len(pixels), 1))
        return batch._replace(inputs=jnp.concatenate([pixels, one_hot], axis=1), labels=batch.labels + addend)

    return Task(add(dataset.train), add(dataset.test))


if __name__ == "__main__":
    main(parse_settings(Config, "add_digit"))
