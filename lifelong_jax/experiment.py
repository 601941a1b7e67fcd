"""What the scripts that compare methods on a sequence of tasks share: settings, learners, the choice of strengths."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import optax
import rich.console
import tyro

from lifelong_jax import methods
from lifelong_jax.comparison import Learner, compare, report_comparison
from lifelong_jax.continual import OptimizerFn, learn_jointly, learn_tasks
from lifelong_jax.datasets import Dataset, hold_out_validation, load_dataset
from lifelong_jax.methods import Method
from lifelong_jax.models import CNN, MLP
from lifelong_jax.penalty import add_quadratic_penalty, proximal_adam, proximal_quadratic_penalty
from lifelong_jax.resuming import open_run
from lifelong_jax.runs import Numbers, Run, RunSettings, Seeds, check_settings
from lifelong_jax.sweep import learn_sweep
from lifelong_jax.tasks import Scenario
from lifelong_jax.tuning import choose_strengths, sweep_strengths
from lifelong_jax.types import Example, OutputFn, Params, Task

MOMENTUM = 0.9

STRENGTHS = tuple(float(f"{10 ** (half_decade / 2):.3g}") for half_decade in range(-8, 13))
"""What --tune chooses from."""


@dataclasses.dataclass(frozen=True)
class Strength:
    """The strength of the penalty, λ, for each method that has one. `--strength` and `--tune` choose them anew."""

    l2: float
    """λ of l2."""

    ewc: float
    """λ of ewc."""

    mas: float
    """λ of mas."""

    local_mas: float
    """λ of local_mas."""

    si: float
    """λ of si."""

    rwalk: float
    """λ of rwalk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """The settings that all comparisons have; a script's own dataclass adds to them."""

    methods: tuple[Literal["finetune", "l2", "ewc", "mas", "local_mas", "si", "rwalk", "joint"], ...] = (
        "finetune",
        "l2",
        "ewc",
        "mas",
        "joint",
    )
    """What to compare: finetune (no penalty), l2 (every parameter equally important), ewc (Fisher diagonal), mas
    (output sensitivity), local_mas (the same, layer by layer), si (Synaptic Intelligence: shares in the fall of the
    loss), rwalk (an online Fisher diagonal, and such shares), joint (all tasks' data at once: the upper bound)."""

    network: Literal["mlp", "cnn"] = "mlp"
    """A multilayer perceptron, or a small convolutional network, for images."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the multilayer perceptron's hidden layers."""

    features: tuple[int, ...] = (16, 32)
    """Channels of the convolutional network's layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    optimizer: Literal["adam", "sgd", "momentum"] = "momentum"
    """Adam, plain SGD, or SGD with momentum 0.9; its state is fresh for each task."""

    learning_rate: float = 0.01
    """The optimiser's step size."""

    penalty: Literal["proximal", "coupled"] = "proximal"
    """Whether the penalty is a closed-form step after the optimiser's own, stable at any strength, or a part of the
    loss's gradient."""

    strength: Strength

    fisher: Literal["exact", "sampled", "empirical"] = "exact"
    """For ewc: labels in expectation over the model's classes, one sampled from the model, or the true ones."""

    consolidation: Literal["separate", "latest"] = "separate"
    """One penalty per task, each around its own anchor, or a single one around the latest parameters; for rwalk always
    the latter."""

    decay: float = 1.0
    """What the earlier tasks' importance is multiplied by at each new task; rwalk has averages instead."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """One sequence of tasks, one initialisation and one order of examples for each: 0-4, or 0,2,4."""

    strengths: Annotated[Numbers, tyro.conf.arg(name="strength")] = ()
    """Strengths to choose from, for every method that has one, such as 1,10,100: each is learned from all seeds on four
    fifths of the training data and tested on the rest. The best ones are then used, with all the training data."""

    tune: bool = False
    """Choose from 21 strengths over ten decades in this way."""

    data_dir: str | None = None
    """Where TFDS keeps prepared data sets; by default TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    keep_tasks: bool = True
    """Keep each task's own parameters and importance, for use with another strength or rule: see reconsolidate."""

    def __post_init__(self) -> None:
        """Refuses what would fail only after much has run."""
        names = ("hidden_sizes", "features", "num_epochs", "batch_size", "learning_rate")
        strengths = {f"strength.{name}": value for name, value in dataclasses.asdict(self.strength).items()}
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={**strengths, "strength": self.strengths, "decay": self.decay},
            distinct={"methods": self.methods, "seeds": self.seeds},
        )
        if self.tune and self.strengths:
            raise ValueError("tune chooses from its own strengths: leave out either --tune or --strength.")
        if self.strengths:
            check_settings(distinct={"strength": [f"{strength:.3g}" for strength in self.strengths]})  # as in tables
        if (self.tune or self.strengths) and not set(self.methods) & set(dataclasses.asdict(self.strength)):
            raise ValueError(f"--strength, --tune: none of the methods {self.methods} has a strength to choose.")


class Experiment(NamedTuple):
    """A sequence of tasks and a network to learn it.

    Attributes:
      name: of the script, and of its folder of results.
      title: what is learned, for tables and pictures.
      datasets: what the tasks are made of. Validation data are taken from their training data.
      make_tasks: `make_tasks(datasets, key) -> tasks`.
      task_names: short, for tables and pictures.
      scenario: "task", "domain" or "class".
      apply_fn: `apply_fn(params, x) -> [num_classes]`, one example's outputs; a flax model's `apply`.
      init_params: `init_params(key, x) -> params`: `functools.partial(init_network, model)`, say.
    """

    name: str
    title: str
    datasets: Sequence[Dataset]
    make_tasks: Callable[[Sequence[Dataset], jax.Array], Sequence[Task]]
    task_names: Sequence[str]
    scenario: Scenario
    apply_fn: OutputFn
    init_params: Callable[[jax.Array, Example], Params]


def run_experiment(settings: Settings, experiment: Experiment) -> None:
    """Lets each method learn the tasks, once per seed, choosing strengths first if asked to; reports and draws.

    Args:
      settings: a script's whole configuration.
      experiment: what it makes of them.
    """
    console = rich.console.Console()
    with open_run(settings, experiment.name, console) as run:
        optimizer_fn = make_optimizer_fn(settings)
        choose = settings.tune or settings.strengths
        strength = tune(settings, experiment, optimizer_fn, run, console) if choose else settings.strength
        learners = {
            name: make_learner(settings, experiment, optimizer_fn, name, getattr(strength, name, 0.0))
            for name in settings.methods
        }
        outcomes = compare(
            learners,
            functools.partial(experiment.make_tasks, experiment.datasets),
            experiment.init_params,
            settings.seeds,
            settings.num_epochs,
            run,
            console,
            keep_tasks=settings.keep_tasks,
        )
        report_comparison(outcomes, experiment.title, experiment.task_names, settings.num_epochs, run, console)


def load_or_exit(name: str, data_dir: str | None, **options: object) -> Dataset:
    """Loads a data set; where it is not to be had, ends the program with a message instead of a traceback.

    Args:
      name: see `load_dataset`.
      data_dir: where TFDS keeps prepared data sets.
      **options: of `load_dataset`.

    Returns:
      The data set.
    """
    try:
        return load_dataset(name, data_dir, **options)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def make_network(settings: Settings, num_outputs: int) -> nn.Module:
    """Makes the network that the settings name.

    Args:
      settings: they have the widths of its layers.
      num_outputs: one for each class.

    Returns:
      A flax module of one example.
    """
    return CNN(settings.features, num_outputs) if settings.network == "cnn" else MLP(settings.hidden_sizes, num_outputs)


def make_optimizer_fn(settings: Settings) -> OptimizerFn:
    """Makes the pipeline: the optimiser, and the penalty in its place.

    Args:
      settings: they have the optimiser, its step size, and the penalty's place.

    Returns:
      `optimizer_fn(strength) -> optimizer`. One object serves all learners: compiled functions are kept by it.
    """
    rate = settings.learning_rate
    base, step_size = {
        "adam": (optax.adam(rate), None),
        "sgd": (optax.sgd(rate), rate),
        "momentum": (optax.sgd(rate, momentum=MOMENTUM), rate / (1 - MOMENTUM)),
    }[settings.optimizer]
    if settings.penalty == "coupled":
        return lambda strength: optax.chain(add_quadratic_penalty(strength), base)
    if settings.optimizer == "adam":
        return functools.partial(proximal_adam, rate)
    return lambda strength: optax.chain(base, proximal_quadratic_penalty(step_size, strength))


def make_learner(
    settings: Settings, experiment: Experiment, optimizer_fn: OptimizerFn, name: str, strength: float
) -> Learner:
    """Makes the learner that a method's name stands for.

    Args:
      settings: they have the batch size, and the methods' own settings.
      experiment: it has the network and the scenario.
      optimizer_fn: from `make_optimizer_fn`.
      name: one of those that `settings.methods` may hold.
      strength: λ.

    Returns:
      `learn_tasks` or `learn_jointly`, all filled in but what differs from seed to seed.
    """
    options = {"scenario": experiment.scenario, "batch_size": settings.batch_size}
    if name == "joint":
        return functools.partial(learn_jointly, experiment.apply_fn, optimizer_fn, **options)
    method = make_method(settings, name)
    return functools.partial(learn_tasks, method, experiment.apply_fn, optimizer_fn, strength=strength, **options)


def make_method(settings: Settings, name: str) -> Method:
    """Makes the method that a name stands for.

    Args:
      settings: they have the methods' own settings.
      name: one of those that `settings.methods` may hold, but for joint.

    Returns:
      The method.
    """
    return {
        "finetune": methods.finetune(),
        "l2": methods.l2(settings.consolidation, settings.decay),
        "ewc": methods.ewc(settings.fisher, settings.consolidation, settings.decay),
        "mas": methods.mas(settings.consolidation, settings.decay),
        "local_mas": methods.local_mas(settings.consolidation, settings.decay),
        "si": methods.si(settings.consolidation, settings.decay),
        "rwalk": methods.rwalk(),
    }[name]


def tune(
    settings: Settings, experiment: Experiment, optimizer_fn: OptimizerFn, run: Run, console: rich.console.Console
) -> Strength:
    """Chooses each method's strength by its average accuracy on validation data, taken from the training data.

    Args:
      settings: they have the strengths and the seeds.
      experiment: what is learned.
      optimizer_fn: from `make_optimizer_fn`.
      run: where the log, `tuning.md`, `tuning.png` and `strength.json` go.
      console: where the table is printed.

    Returns:
      The strengths, the best ones for the methods that are compared.
    """
    learners = {
        field.name: functools.partial(
            learn_sweep,
            make_method(settings, field.name),
            experiment.apply_fn,
            optimizer_fn,
            scenario=experiment.scenario,
            num_epochs=settings.num_epochs,
            batch_size=settings.batch_size,
            forward_transfer=False,
        )
        for field in dataclasses.fields(Strength)
        if field.name in settings.methods
    }
    strengths = sorted(settings.strengths or STRENGTHS)
    datasets = [hold_out_validation(dataset, 0.2, jax.random.key(0)) for dataset in experiment.datasets]
    matrices = sweep_strengths(
        learners,
        strengths,
        functools.partial(experiment.make_tasks, datasets),
        experiment.init_params,
        settings.seeds,
        run,
        console,
        split="validation",
    )
    best = choose_strengths(matrices, strengths, run, console)
    console.print("chosen: " + ", ".join(f"--strength.{name} {strength:g}" for name, strength in best.items()))
    chosen = dataclasses.replace(settings.strength, **best)
    run.write_json("strength.json", dataclasses.asdict(chosen))
    return chosen
