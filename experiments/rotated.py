"""Compares methods on a domain that drifts: the same images, rotated a little further in every task.

Neighbouring tasks help each other, so the table shows transfer as well as forgetting. Forward transfer is the effect of
earlier tasks on a later one, backward transfer that of later tasks on an earlier one.
"""

import dataclasses
import functools

import numpy as np

from experiments.harness.experiment import Experiment, ImageSettings, Strength, load_or_exit, run_experiment
from experiments.harness.networks import make_network, network_functions
from experiments.harness.settings import DatasetName, check_num_tasks, check_settings, parse_settings
from lifelong_jax import rotated_tasks
from lifelong_jax.models import init_network

STRENGTH = Strength(l2=0.0316, ewc=100.0, mas=0.1, kfac=100.0, local_mas=0.316, si=100.0, rwalk=31.6)  # by --tune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImageSettings):
    """Compare transfer and forgetting on images that are rotated a little further in every task."""

    dataset: DatasetName = "digits"

    num_tasks: int = 5
    """How many tasks."""

    max_angle: float = 120.0
    """The last task's angle, in degrees. The first task's is 0; the angles between are equally spaced."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        check_settings(not_negative={"max_angle": self.max_angle})
        check_num_tasks(self.num_tasks, self.num_epochs)


def main(config: Config) -> None:
    """Runs the comparison."""
    dataset = load_or_exit(config.dataset, config)
    network = make_network(config, dataset.num_classes)
    angles = np.linspace(0, config.max_angle, config.num_tasks)
    apply_fn, train_fn = network_functions(config, network)
    experiment = Experiment(
        name="rotated",
        title=f"{config.dataset} rotated by 0 to {config.max_angle:g}°",
        datasets=[dataset],
        make_tasks=lambda datasets, key: rotated_tasks(datasets[0].train, datasets[0].test, angles),
        task_names=[f"{angle:.0f}°" for angle in angles],
        scenario="domain",
        apply_fn=apply_fn,
        init_params=functools.partial(init_network, network),
        train_fn=train_fn,
    )
    run_experiment(config, experiment)


if __name__ == "__main__":
    main(parse_settings(Config, "rotated"))
