"""Learns a domain that drifts: the same images, rotated a little further in every task.

Neighbouring tasks help each other, so that the table shows transfer as well as forgetting: forward transfer, what
earlier tasks do for one that is yet to be learned, and backward transfer, what later tasks do to earlier ones.
"""

import dataclasses
import functools

import numpy as np

from lifelong_jax.experiment import Experiment, Settings, Strength, load_or_exit, make_network, run_experiment
from lifelong_jax.models import init_network
from lifelong_jax.resuming import parse_settings
from lifelong_jax.runs import check_settings
from lifelong_jax.tasks import rotated_tasks

STRENGTH = Strength(l2=0.0316, ewc=100.0, mas=0.1, local_mas=0.316, si=100.0, rwalk=31.6)  # chosen by --tune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Learn images that are rotated a little further in every task: transfer as well as forgetting."""

    dataset: str = "digits"
    """digits (bundled), or the name of an image-classification data set: see the README."""

    num_tasks: int = 5
    """How many tasks."""

    max_angle: float = 120.0
    """The last task's angle, in degrees; the first one's is 0, and the steps between are equal."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Refuses what would fail only after much has run."""
        super().__post_init__()
        check_settings(positive={"num_tasks": self.num_tasks}, not_negative={"max_angle": self.max_angle})


def main(config: Config) -> None:
    """Runs the comparison.

    Args:
      config: the whole configuration.
    """
    dataset = load_or_exit(config.dataset, config.data_dir)
    network = make_network(config, dataset.num_classes)
    angles = np.linspace(0, config.max_angle, config.num_tasks)
    experiment = Experiment(
        name="rotated",
        title=f"{config.dataset} rotated by 0 to {config.max_angle:g}°",
        datasets=[dataset],
        make_tasks=lambda datasets, key: rotated_tasks(datasets[0].train, datasets[0].test, angles),
        task_names=[f"{angle:.0f}°" for angle in angles],
        scenario="domain",
        apply_fn=network.apply,
        init_params=functools.partial(init_network, network),
    )
    run_experiment(config, experiment)


if __name__ == "__main__":
    main(parse_settings(Config, "rotated"))
