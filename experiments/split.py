"""Compares methods on disjoint groups of classes, learned one after the other, in one of three scenarios.

- task: the task is known at test time, and only its own classes can be the answer.
- domain: all tasks share their outputs. The network only says whether an image is of its group's first or second class.
- class: the task is not known at test time, and every class seen so far can be the answer.

Parameter importance alone does not solve the class-incremental scenario. The penalty preserves the outputs of the old
classes, but no example compares an old class with a new one. So the network answers with the newest classes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from experiments.harness.experiment import Experiment, ImageSettings, Strength, load_or_exit, run_experiment
from experiments.harness.networks import make_network, network_functions
from experiments.harness.settings import DatasetName, check_settings, parse_settings, refuse
from lifelong_jax import Task, split_tasks
from lifelong_jax.datasets import Dataset
from lifelong_jax.models import init_network

# Chosen by --tune, for the task- and the domain-incremental scenario.
STRENGTH = Strength(l2=0.0316, ewc=1e3, mas=10.0, kfac=3.16e3, local_mas=10.0, si=1e3, rwalk=316.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImageSettings):
    """Compare methods on disjoint groups of classes, in the task-, domain- or class-incremental scenario."""

    scenario: Literal["task", "domain", "class"] = "task"
    """task: the task is known at test time. domain: all tasks share their outputs. class: every class seen so far can
    be the answer; parameter importance alone does not solve this."""

    dataset: DatasetName = "digits"

    classes_per_task: int = 2
    """How many classes each task has; the last task may have fewer."""

    class_order: Literal["random", "sorted"] = "random"
    """random: the order of the classes depends on the seed. sorted: the classes are in numerical order."""

    num_epochs: int = 10
    """Passes over each task's training data."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        check_settings(positive={"classes_per_task": self.classes_per_task})


def main(config: Config) -> None:
    """Runs the comparison."""
    dataset = load_or_exit(config.dataset, config)
    if config.classes_per_task >= dataset.num_classes:
        refuse(
            f"classes_per_task must be below {dataset.num_classes}, the number of classes of {config.dataset}, so that "
            f"there are several tasks, not {config.classes_per_task}"
        )
    shared_outputs = config.scenario == "domain"
    network = make_network(config, config.classes_per_task if shared_outputs else dataset.num_classes)

    def make_tasks(datasets: Sequence[Dataset], key: jax.Array) -> list[Task]:
        train, test, num_classes = datasets[0]
        groups = class_groups(config, num_classes, key)
        return split_tasks(train, test, groups, num_classes, shared_outputs=shared_outputs)

    apply_fn, train_fn = network_functions(config, network)
    experiment = Experiment(
        name="split",
        title=f"Split {config.dataset}, {config.scenario}-incremental",
        datasets=[dataset],
        make_tasks=make_tasks,
        task_names=[f"task {task + 1}" for task in range(-(-dataset.num_classes // config.classes_per_task))],
        scenario=config.scenario,
        apply_fn=apply_fn,
        init_params=functools.partial(init_network, network),
        train_fn=train_fn,
    )
    run_experiment(config, experiment)


def class_groups(config: Config, num_classes: int, key: jax.Array) -> list[list[int]]:
    """Splits the classes into groups, one for each task."""
    order = np.arange(num_classes)
    if config.class_order == "random":
        order = np.asarray(jax.random.permutation(key, num_classes))
    starts = range(0, num_classes, config.classes_per_task)
    return [order[start : start + config.classes_per_task].tolist() for start in starts]


if __name__ == "__main__":
    main(parse_settings(Config, "split"))
