"""Learns a sequence of permuted-image tasks with one network, once per method: forgetting, and its cures.

Every task shows the same images through another fixed permutation of their pixels. The network is trained on one task
after the other, and tested on all of them after each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import optax
import rich.console
import tyro

from lifelong_jax import Task, add_quadratic_penalty, learn_jointly, learn_tasks, methods, permuted_tasks
from lifelong_jax.comparison import Learner, compare, report_comparison, summarize
from lifelong_jax.continual import OptimizerFn
from lifelong_jax.datasets import Dataset, hold_out_validation, load_dataset
from lifelong_jax.models import MLP
from lifelong_jax.runs import Run, check_settings, format_estimate, markdown_table, print_table, start_run
from lifelong_jax.types import OutputFn, Params


@dataclasses.dataclass(frozen=True)
class Strength:
    """The strength of the penalty, λ, for each method that has one. `--tune` chooses them anew."""

    l2: float = 0.00316
    """λ of l2."""

    ewc: float = 100.0
    """λ of ewc."""

    mas: float = 0.0316
    """λ of mas."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn a sequence of permuted-image tasks with one network, once per method: forgetting, and its cures."""

    dataset: str = "digits"
    """digits (bundled), or the name of an image-classification data set that TFDS has prepared, such as mnist."""

    data_dir: str | None = None
    """Where TFDS keeps prepared data sets; by default TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    methods: tuple[Literal["finetune", "l2", "ewc", "mas", "joint"], ...] = ("finetune", "l2", "ewc", "mas", "joint")
    """What to compare: finetune (no penalty), l2 (every parameter equally important), ewc (Fisher diagonal), mas
    (output
    sensitivity), joint (all tasks' data at once: the upper bound)."""

    num_tasks: int = 5
    """How many tasks."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the network's hidden layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    optimizer: Literal["adam", "sgd", "momentum"] = "momentum"
    """Adam, plain SGD, or SGD with momentum 0.9; its state is fresh for each task."""

    learning_rate: float = 0.01
    """The optimiser's step size."""

    strength: Strength = Strength()

    fisher: Literal["exact", "sampled", "empirical"] = "exact"
    """For ewc: labels in expectation over the model's classes, one sampled from the model, or the true ones."""

    consolidation: Literal["separate", "latest"] = "separate"
    """One penalty per task, each around its own anchor, or a single one around the latest parameters."""

    decay: float = 1.0
    """What the earlier tasks' importance is multiplied by at each new task."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One sequence of tasks, one initialisation and one order of examples for each."""

    tune: bool = False
    """First choose each method's strength, on a fifth of the training data, which is then given back."""

    tune_grid: tuple[float, ...] = tuple(float(f"{10 ** (half_decade / 2):.3g}") for half_decade in range(-8, 9))
    """The strengths tried by --tune, for every method alike."""

    tune_seeds: tuple[int, ...] = (100, 101)
    """The seeds of --tune; other ones than the reported."""

    output_dir: str = "results"
    """Results go to a new folder in <output-dir>/permuted/."""

    def __post_init__(self) -> None:
        """Refuses what would fail only after other methods have run."""
        names = ("num_tasks", "hidden_sizes", "num_epochs", "batch_size", "learning_rate")
        strengths = {f"strength.{name}": value for name, value in dataclasses.asdict(self.strength).items()}
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={**strengths, "tune_grid": self.tune_grid, "decay": self.decay},
            distinct={name: getattr(self, name) for name in ("methods", "seeds", "tune_grid", "tune_seeds")},
        )


def main(config: Config) -> None:
    """Runs the comparison, choosing strengths first if asked to.

    Args:
      config: the whole configuration.
    """
    console = rich.console.Console()
    try:
        dataset = load_dataset(config.dataset, config.data_dir)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    run = start_run(config.output_dir, "permuted", config)
    model = MLP(config.hidden_sizes, dataset.num_classes)
    optimizer_fn = make_optimizer_fn(config)  # one object for all learners: compiled functions are kept by it
    learn = functools.partial(make_learner, config, model.apply, optimizer_fn)
    start = functools.partial(init_params, model, dataset)
    if config.tune:
        strength = tune(config, learn, start, hold_out_validation(dataset, 0.2, jax.random.key(0)), run, console)
        config = dataclasses.replace(config, strength=strength)
        run.write_config(config)
    learners = {name: learn(name, getattr(config.strength, name, 0.0)) for name in config.methods}
    tasks = functools.partial(make_tasks, config, dataset)
    outcomes = compare(learners, tasks, start, config.seeds, config.num_epochs, run.log, console)
    title = f"{config.num_tasks} permuted tasks of {config.dataset}"
    report_comparison(outcomes, title, config.num_epochs, run, console)


def make_optimizer_fn(config: Config) -> OptimizerFn:
    """Makes the pipeline: the penalty's gradient joins the loss's, and the optimiser takes their sum."""
    base = {
        "adam": optax.adam(config.learning_rate),
        "sgd": optax.sgd(config.learning_rate),
        "momentum": optax.sgd(config.learning_rate, momentum=0.9),
    }[config.optimizer]
    return lambda strength: optax.chain(add_quadratic_penalty(strength), base)


def make_learner(config: Config, apply_fn: OutputFn, optimizer_fn: OptimizerFn, name: str, strength: float) -> Learner:
    """Makes the learner that a method's name stands for."""
    if name == "joint":
        return functools.partial(learn_jointly, apply_fn, optimizer_fn, batch_size=config.batch_size)
    method = {
        "finetune": methods.finetune(),
        "l2": methods.l2(config.consolidation, config.decay),
        "ewc": methods.ewc(config.fisher, config.consolidation, config.decay),
        "mas": methods.mas(config.consolidation, config.decay),
    }[name]
    return functools.partial(
        learn_tasks, method, apply_fn, optimizer_fn, strength=strength, batch_size=config.batch_size
    )


def init_params(model: MLP, dataset: Dataset, key: jax.Array) -> Params:
    """Draws the network's first parameters."""
    return model.init(key, dataset.train.inputs[0])


def make_tasks(config: Config, dataset: Dataset, key: jax.Array) -> list[Task]:
    """Draws the permutations."""
    return permuted_tasks(dataset.train, dataset.test, config.num_tasks, key)


def tune(
    config: Config,
    learn: Callable[[str, float], Learner],
    start: Callable[[jax.Array], Params],
    dataset: Dataset,
    run: Run,
    console: rich.console.Console,
) -> Strength:
    """Chooses each method's strength by its average accuracy on validation data, which `dataset` holds as test data."""
    names = [field.name for field in dataclasses.fields(Strength) if field.name in config.methods]
    learners = {f"{name} {strength:.3g}": learn(name, strength) for name in names for strength in config.tune_grid}
    tasks = functools.partial(make_tasks, config, dataset)
    log = functools.partial(run.log, split="validation")
    outcomes = compare(learners, tasks, start, config.tune_seeds, config.num_epochs, log, console)
    accuracy = {name: metrics.average_accuracy for name, metrics in summarize(outcomes).items()}
    header = ["strength", *names]
    rows = [
        [f"{strength:.3g}", *(format_estimate(accuracy[f"{name} {strength:.3g}"], 100) for name in names)]
        for strength in config.tune_grid
    ]
    print_table(console, "Average accuracy on validation data, percent", header, rows)
    (run.folder / "tuning.md").write_text(markdown_table(header, rows))
    best = {
        name: max(
            config.tune_grid, key=lambda strength, name=name: np.nan_to_num(accuracy[f"{name} {strength:.3g}"].mean)
        )
        for name in names
    }
    console.print("chosen: " + ", ".join(f"--strength.{name} {strength:.3g}" for name, strength in best.items()))
    return dataclasses.replace(config.strength, **best)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.permuted"))
