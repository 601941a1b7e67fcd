"""Compares how much methods forget of a sequence of permuted-image tasks.

Each task has the same images, with their pixels in another fixed order. For each method, one network is trained on one
task after the other. After each task it is tested on all of them.
"""

import dataclasses
import functools

from experiments.harness.experiment import Experiment, ImageSettings, Strength, load_or_exit, run_experiment
from experiments.harness.networks import make_network, network_functions
from experiments.harness.settings import DatasetName, check_num_tasks, parse_settings
from lifelong_jax import permuted_tasks
from lifelong_jax.models import init_network

STRENGTH = Strength(
    l2=0.00316, ewc=100.0, mas=0.0316, kfac=178.0, local_mas=0.316, si=31.6, rwalk=31.6
)  # chosen by --tune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImageSettings):
    """Compare how much methods forget of a sequence of permuted-image tasks."""

    dataset: DatasetName = "digits"

    num_tasks: int = 5
    """How many tasks."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        check_num_tasks(self.num_tasks, self.num_epochs)


def main(config: Config) -> None:
    """Runs the comparison."""
    dataset = load_or_exit(config.dataset, config)
    network = make_network(config, dataset.num_classes)
    apply_fn, train_fn = network_functions(config, network)
    experiment = Experiment(
        name="permuted",
        title=f"{config.num_tasks} permuted tasks of {config.dataset}",
        datasets=[dataset],
        make_tasks=lambda datasets, key: permuted_tasks(datasets[0].train, datasets[0].test, config.num_tasks, key),
        task_names=[f"task {task + 1}" for task in range(config.num_tasks)],
        scenario="domain",
        apply_fn=apply_fn,
        init_params=functools.partial(init_network, network),
        train_fn=train_fn,
    )
    run_experiment(config, experiment)


if __name__ == "__main__":
    main(parse_settings(Config, "permuted"))
