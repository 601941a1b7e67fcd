"""Learns one data set after another with a shared trunk and a head for each, as in the paper on MAS.

The task is known at test time. In the scenario "domain", all data sets share one head, such as digits from several
sources. By default the data sets are the bundled digits and letters. The paper's sequence begins
with MIT indoor scenes and Caltech-UCSD birds:

    python -m experiments.dataset_sequence --datasets mit_scenes:PATH caltech_birds2011 --image-size 224 --channels 3 \
        --network alexnet --pretrained alexnet.safetensors --num-epochs 10 --learning-rate 1e-3
"""

import dataclasses
import pathlib
from typing import Literal

import flax.linen as nn
import jax

from experiments.harness.experiment import Experiment, ImageSettings, Strength, load_or_exit, run_experiment
from experiments.harness.networks import make_network, network_functions
from experiments.harness.settings import check_settings, parse_settings, refuse
from lifelong_jax import dataset_tasks
from lifelong_jax.models import AlexNet, init_network, load_pretrained
from lifelong_jax.types import Example, Params

STRENGTH = Strength(l2=0.01, ewc=1e3, mas=1.0, kfac=316.0, local_mas=1.0, si=1e3, rwalk=100.0)  # by --tune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ImageSettings):
    """Learn one data set after another with a shared trunk and a head for each."""

    datasets: tuple[str, ...] = ("digits", "letters")
    """digits and letters (both bundled), mit_scenes:PATH, folder:PATH, or names of data sets that TFDS has prepared."""

    scenario: Literal["task", "domain"] = "task"
    """task: the task is known at test time, and each data set has a head. domain: all data sets have the same classes,
    and share one head."""

    image_size: int = 8
    """All images are resized to this height and width, in pixels."""

    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour."""

    network: Literal["mlp", "cnn", "alexnet"] = "mlp"
    """The shared trunk; alexnet needs images of at least 63 pixels."""

    pretrained: str | None = None
    """A safetensors file with torchvision's parameters for AlexNet."""

    strength: Strength = STRENGTH

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        check_settings(distinct={"datasets": self.datasets})
        if self.pretrained is not None and self.network != "alexnet":
            raise ValueError(f"pretrained parameters are for network alexnet, not {self.network}.")
        if self.pretrained is not None and not pathlib.Path(self.pretrained).expanduser().is_file():
            raise ValueError(f"pretrained must be a safetensors file, but there is no file {self.pretrained}.")
        if self.network == "alexnet" and (self.image_size < 63 or self.channels != 3):
            raise ValueError(
                f"network alexnet needs --image-size 63 or more, such as 224, and --channels 3, not "
                f"{self.image_size} and {self.channels}."
            )


def main(config: Config) -> None:
    """Runs the comparison."""
    datasets = [load_or_exit(name, config) for name in config.datasets]
    shared_outputs = config.scenario == "domain"
    counts = [dataset.num_classes for dataset in datasets]
    if shared_outputs and len(set(counts)) > 1:
        refuse(f"--scenario domain needs data sets of the same classes, not of {', '.join(map(str, counts))} classes")
    network = make_trunk_and_heads(config, counts[0] if shared_outputs else sum(counts))

    def init_params(key: jax.Array, x: Example) -> Params:
        params = init_network(network, key, x)
        return params if config.pretrained is None else load_pretrained(params, config.pretrained)

    apply_fn, train_fn = network_functions(config, network)
    experiment = Experiment(
        name="dataset_sequence",
        title=f"{' → '.join(config.datasets)}, {config.scenario}-incremental",
        datasets=datasets,
        make_tasks=lambda datasets, key: dataset_tasks(datasets, shared_outputs=shared_outputs),
        task_names=[short_name(name) for name in config.datasets],
        scenario=config.scenario,
        apply_fn=apply_fn,
        init_params=init_params,
        train_fn=train_fn,
    )
    run_experiment(config, experiment)


def short_name(name: str) -> str:
    """Returns a data set's name for pictures: of a folder of images, the last part of its path."""
    kind, _, path = name.partition(":")
    return pathlib.Path(path).name if kind == "folder" else kind


def make_trunk_and_heads(config: Config, num_outputs: int) -> nn.Module:
    """Makes the network. Its output layer holds the heads of all data sets."""
    return AlexNet(num_outputs) if config.network == "alexnet" else make_network(config, num_outputs)


if __name__ == "__main__":
    main(parse_settings(Config, "dataset_sequence"))
