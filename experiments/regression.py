"""Compares methods on a sequence of regressions: by what angle is an image turned? Each task shows another class.

A network sees an image that was turned by a random angle, and tells the angle. It learns this for one digit after the
other. What turns a 7 upright is no help with a 4, so it forgets how the earlier digits stand.
"""

import dataclasses
import functools

import jax
import numpy as np
from PIL import Image

from experiments.harness.experiment import Experiment, ImageSettings, Strength, load_or_exit, run_experiment
from experiments.harness.networks import make_network, network_functions
from experiments.harness.settings import DatasetName, check_settings, parse_settings, refuse
from lifelong_jax import Batch, Task
from lifelong_jax.datasets import Dataset
from lifelong_jax.models import init_network
from lifelong_jax.objectives import regression

STRENGTH = Strength(l2=0.1, ewc=100.0, mas=3.16, kfac=31.6, local_mas=10.0, si=1e4, rwalk=1e3)  # on validation data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImageSettings):
    """Compare methods on a sequence of regressions: by what angle is an image turned?"""

    dataset: DatasetName = "digits"

    classes: tuple[int, ...] = (2, 3, 4, 5, 7)
    """The class of each task's images, in the order of learning."""

    max_angle: float = 90.0
    """The largest angle, in degrees, to the left and to the right."""

    turns: int = 4
    """How many times each image is shown, each time at another angle."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        check_settings(
            positive={"max_angle": self.max_angle, "turns": self.turns},
            not_negative={"classes": self.classes},
            distinct={"classes": self.classes},
        )


def main(config: Config) -> None:
    """Runs the comparison."""
    dataset = load_or_exit(config.dataset, config)
    if max(config.classes) >= dataset.num_classes:
        refuse(f"classes must be below {dataset.num_classes}, as {config.dataset} has them, not {config.classes}")
    network = make_network(config, num_outputs=1)
    apply_fn, train_fn = network_functions(config, network)
    experiment = Experiment(
        name="regression",
        title=f"Angles of {config.dataset}, one class after the other",
        datasets=[dataset],
        make_tasks=lambda datasets, key: make_tasks(config, datasets[0], key),
        task_names=[f"class {number}" for number in config.classes],
        scenario="domain",
        apply_fn=apply_fn,
        init_params=functools.partial(init_network, network),
        objective=regression(),
        train_fn=train_fn,
    )
    run_experiment(config, experiment)


def make_tasks(config: Config, dataset: Dataset, key: jax.Array) -> list[Task]:
    """Makes the task of each class: turned images, and the angles."""
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def turned(batch: Batch, number: int) -> Batch:
        images = np.asarray(batch.inputs)[np.asarray(batch.labels) == number]
        return turn(np.repeat(images, config.turns, axis=0), config.max_angle, random)

    return [Task(turned(dataset.train, number), turned(dataset.test, number)) for number in config.classes]


def turn(images: np.ndarray, max_angle: float, random: np.random.Generator) -> Batch:
    """Turns each image by an angle of its own. The label is the angle, in a unit in which its variance is 1.

    So a network that always answers 0 has the squared error 1.
    """
    labels = random.uniform(-(3**0.5), 3**0.5, size=(len(images), 1))
    angles = max_angle / 3**0.5 * labels[:, 0]
    inputs = [
        [np.asarray(Image.fromarray(channel).rotate(angle, Image.Resampling.BILINEAR)) for channel in image]
        for image, angle in zip(np.moveaxis(images, -1, 1), angles, strict=True)
    ]
    return Batch(*jax.device_put((np.moveaxis(np.array(inputs, np.float32), 1, -1), labels.astype(np.float32))))


if __name__ == "__main__":
    main(parse_settings(Config, "regression"))
