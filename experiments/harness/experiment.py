"""What the scripts share that compare methods on a sequence of tasks: settings, learners, the choice of strengths."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import jax
import optax
import rich.console
import tyro

from experiments.harness.compare import compare
from experiments.harness.compilation import time_compilation
from experiments.harness.meshes import check_mesh, make_mesh
from experiments.harness.parallel import num_at_once
from experiments.harness.pipelines import MOMENTUM, interval_of, momentum_with_penalty, steps_of_task
from experiments.harness.report import fail_if_all_diverged, report_comparison
from experiments.harness.runs import Run, open_run
from experiments.harness.scores import score_of
from experiments.harness.sequences import learn_resumably, learn_starts
from experiments.harness.settings import (
    DataSettings,
    Numbers,
    RunSettings,
    Seeds,
    check_memory,
    check_settings,
    refuse,
)
from experiments.harness.tune import choose_strengths, sweep_strengths
from lifelong_jax import methods
from lifelong_jax._processes import is_first
from lifelong_jax.datasets.named import Dataset, hold_out_validation, load_dataset
from lifelong_jax.methods import Method
from lifelong_jax.objectives import CLASSIFICATION, Objective
from lifelong_jax.penalty import add_quadratic_penalty, proximal_adam, proximal_quadratic_penalty
from lifelong_jax.recipes import Recipe
from lifelong_jax.types import Example, OptimizerFn, Params, Scenario, Task, TrainFn

STRENGTHS = tuple(float(f"{10 ** (half_decade / 2):.3g}") for half_decade in range(-8, 13))
"""The strengths that --tune compares."""


@dataclasses.dataclass(frozen=True)
class Strength:
    """The strength of the penalty, λ, for each method that has one; `--strength` and `--tune` choose other values."""

    l2: float
    """λ of l2."""

    ewc: float
    """λ of ewc."""

    mas: float
    """λ of mas."""

    kfac: float
    """λ of kfac."""

    local_mas: float
    """λ of local_mas."""

    si: float
    """λ of si."""

    rwalk: float
    """λ of rwalk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """The settings that all comparisons have; a script's own dataclass adds to them."""

    methods: tuple[Literal["finetune", "l2", "ewc", "mas", "kfac", "local_mas", "si", "rwalk", "joint"], ...] = (
        "finetune",
        "l2",
        "ewc",
        "mas",
        "kfac",
        "joint",
    )
    """The methods to compare: finetune (no penalty), l2 (every parameter equally important), ewc (Fisher diagonal), mas
    (output sensitivity), kfac (ewc with Kronecker factors), local_mas (output sensitivity layer by layer), si (Synaptic
    Intelligence: each parameter's share in the fall of the loss), rwalk (an online Fisher diagonal and such shares),
    joint (all tasks' data at once: the upper bound)."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    optimizer: Literal["adam", "sgd", "momentum"] = "momentum"
    """The optimiser: Adam, plain SGD, or SGD with momentum 0.9. Each task begins with a fresh optimiser state."""

    learning_rate: float = 0.01
    """The optimiser's step size."""

    schedule: Literal["constant", "cosine"] = "constant"
    """The step size during a task: always the same (constant), or falling to 0 by a cosine."""

    penalty: Literal["proximal", "coupled"] = "proximal"
    """The penalty's place: a closed-form step after the optimiser's own, which is stable at any strength (proximal), or
    a term of the loss (coupled)."""

    strength: Strength

    interval: int | None = None
    """For kfac with the proximal penalty, the number of steps after which the penalty pulls, each time for all of them;
    by default, a fiftieth of a task's steps."""

    fisher: Literal["exact", "sampled", "empirical"] = "exact"
    """For ewc and kfac, the labels of the Fisher information: the expectation over the model's classes (exact), one
    label sampled from the model (sampled), or the true labels (empirical)."""

    rule: Annotated[Literal["separate", "latest"], tyro.conf.arg(name="consolidation")] = "separate"
    """The rule of consolidation: one penalty per task, each around its own anchor (separate), or a single one around
    the latest parameters (latest, which kfac and rwalk always have)."""

    decay: float = 1.0
    """The factor by which each new task multiplies the earlier tasks' importance; rwalk averages instead."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """The seeds, such as 0-4 or 0,2,4: each has its own sequence of tasks, initialisation and order of examples."""

    strength_grid: Annotated[Numbers, tyro.conf.arg(name="strength")] = ()
    """Strengths to compare for every method that has one, such as 1,10,100. Each is trained from all seeds on four
    fifths of the training data and tested on the rest. The best ones are then used, with all the training data."""

    tune: bool = False
    """Compare 21 strengths over ten decades in this way."""

    mesh: str | None = None
    """Train each network on several devices, such as data=8: they share the examples. Processes may share the devices:
    see docs/guides/resuming.md."""

    keep_tasks: bool = True
    """Keep each task's own parameters and importance, to try another strength or rule: see reconsolidate."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        names = ("num_epochs", "batch_size", "learning_rate")
        strengths = {f"strength.{name}": value for name, value in dataclasses.asdict(self.strength).items()}
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={**strengths, "strength": self.strength_grid, "decay": self.decay},
            distinct={"methods": self.methods, "seeds": self.seeds},
        )
        check_mesh(self.mesh)
        if self.mesh is not None and (self.tune or self.strength_grid):
            raise ValueError("--tune and --strength learn many networks: leave out --mesh, and give what they choose.")
        if self.interval is not None:
            check_settings(positive={"interval": self.interval})
        if self.tune and self.strength_grid:
            raise ValueError("--tune has strengths of its own: leave out either --tune or --strength.")
        if self.strength_grid:
            written = [f"{strength:.3g}" for strength in self.strength_grid]  # as in tables
            check_settings(distinct={"strength": written})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings, DataSettings):
    """The settings of comparisons on data sets of images, which are given by name, as the network is."""

    network: Literal["mlp", "cnn"] = "mlp"
    """The network: a multilayer perceptron, or a small convolutional network for images."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the multilayer perceptron's hidden layers."""

    features: tuple[int, ...] = (16, 32)
    """Channels of the convolutional network's layers."""

    dropout: float = 0.0
    """The share of the multilayer perceptron's hidden outputs that are set to 0 in training."""

    batch_norm: bool = False
    """Batch normalisation in the convolutional network."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        DataSettings.__post_init__(self)
        Settings.__post_init__(self)
        check_settings(positive={"hidden_sizes": self.hidden_sizes, "features": self.features})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}.")
        if self.dropout and self.network != "mlp":
            raise ValueError(f"--dropout is for network mlp, not {self.network}.")
        if self.batch_norm and self.network != "cnn":
            raise ValueError(f"--batch-norm is for network cnn, not {self.network}.")


class Experiment(NamedTuple):
    """A sequence of tasks, and a network that learns it.

    Attributes:
      name: the name of the script, and of its folder of results.
      title: what is learned, for tables and pictures.
      datasets: the data sets that the tasks are made of. Validation data are taken from their training data.
      make_tasks: `make_tasks(datasets, key) -> tasks`.
      task_names: short names, for tables and pictures.
      scenario: "task", "domain" or "class".
      apply_fn: `apply_fn(params, x) -> outputs`, of one example; with `train_fn`, as in `Recipe`.
      init_params: `init_params(key, x) -> params`, such as `functools.partial(init_network, model)`.
      objective: what the outputs mean, and the score.
      train_fn: as in `Recipe`; `init_params` then makes all variables of a flax module.
    """

    name: str
    title: str
    datasets: Sequence[Dataset]
    make_tasks: Callable[[Sequence[Dataset], jax.Array], Sequence[Task]]
    task_names: Sequence[str]
    scenario: Scenario
    apply_fn: Callable[..., jax.Array]
    init_params: Callable[[jax.Array, Example], Params]
    objective: Objective = CLASSIFICATION
    train_fn: TrainFn | None = None


def run_experiment(settings: Settings, experiment: Experiment) -> None:
    """Lets each method learn the tasks once per seed, after choosing strengths if asked to; reports the result.

    Args:
      settings: the script's settings.
      experiment: the tasks and the network.

    Raises:
      SystemExit: if there is no strength to choose, the network does not fit the data or the memory, or if every method
        diverged.
    """
    console = rich.console.Console(quiet=not is_first())
    choose = settings.tune or settings.strength_grid
    if choose and not set(settings.methods) & set(dataclasses.asdict(settings.strength)):
        refuse(f"--strength, --tune: none of the methods {', '.join(settings.methods)} has a strength to choose")
    at_once = num_at_once() if settings.mesh is None else 1  # the devices of a mesh learn one network together
    check_network(experiment, at_once)
    with (
        open_run(settings, experiment.name, console, experiment.datasets) as run,
        time_compilation() as compilation_seconds,
    ):
        recipes = make_recipes(settings, experiment)
        strength = tune(settings, experiment, recipes, run, console) if choose else settings.strength
        learn = functools.partial(learn_resumably, mesh=make_mesh(settings.mesh))
        learners = {
            name: functools.partial(learn, make_method(settings, name), recipes[name], getattr(strength, name, 0.0))
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
            at_once=at_once,
            keep_tasks=settings.keep_tasks,
            score=score_of(experiment.objective),
        )
        if run.writes:
            report_comparison(
                outcomes,
                experiment.title,
                experiment.task_names,
                settings.num_epochs,
                compilation_seconds(),
                run,
                console,
                score=score_of(experiment.objective),
            )
        fail_if_all_diverged(outcome.accuracy_matrix[:, -1] for outcome in outcomes.values())


def check_network(experiment: Experiment, at_once: int) -> None:
    """Ends the program unless the network takes the data, its parameters can be made, and memory holds them.

    Args:
      experiment: the tasks and the network.
      at_once: how many networks are learned at once.

    Raises:
      SystemExit: with what is wrong.
    """
    x = experiment.datasets[0].train.inputs[0]
    try:
        params = jax.tree.leaves(jax.eval_shape(experiment.init_params, jax.random.key(0), x))
        num_params = sum(leaf.size for leaf in params)
        # Parameters, step, update, anchor, importance: for each of the sequences that are learned at once.
        check_memory(f"a network of {num_params:,} parameters", 5 * 4 * num_params * at_once)
    except (OSError, ValueError) as error:
        refuse(error)


def load_or_exit(name: str, settings: DataSettings) -> Dataset:
    """Loads a data set, or ends the program with a message if that fails.

    Args:
      name: as for `load_dataset`.
      settings: where prepared data sets are, and what images become.

    Returns:
      The data set.

    Raises:
      SystemExit: if the data set cannot be found or read.
    """
    try:
        return load_dataset(
            name,
            settings.data_dir,
            image_size=settings.image_size,
            channels=settings.channels,
            skip_unreadable=settings.skip_unreadable,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def make_optimizer_fn(settings: Settings, num_steps: int, every: int | None = None) -> OptimizerFn:
    """Makes the pipeline of optimiser and penalty.

    Args:
      settings: the optimiser, its step size, and the penalty's place.
      num_steps: the number of the largest task's steps, for the schedule.
      every: for Kronecker factors, the number of steps after which the proximal penalty pulls.

    Returns:
      `optimizer_fn(strength) -> optimizer`. Learners share it, because compiled functions are cached by it.
    """
    rate: optax.ScalarOrSchedule = settings.learning_rate
    if settings.schedule == "cosine":
        rate = optax.cosine_decay_schedule(settings.learning_rate, num_steps)
    base = {
        "adam": optax.adam(rate),
        "sgd": optax.sgd(rate),
        "momentum": optax.sgd(rate, momentum=MOMENTUM),
    }[settings.optimizer]
    if settings.penalty == "coupled":
        return lambda strength: optax.chain(add_quadratic_penalty(strength), base)
    if settings.optimizer == "momentum":
        return functools.partial(momentum_with_penalty, rate, every=every)
    if settings.optimizer == "adam" and every is None:
        return functools.partial(proximal_adam, rate)
    return lambda strength: optax.chain(base, proximal_quadratic_penalty(rate, strength, every))


def make_recipes(settings: Settings, experiment: Experiment) -> dict[str, Recipe]:
    """Makes the recipes by which the methods learn. They differ in the pipeline of optimiser and penalty only.

    Args:
      settings: the optimiser, the number of epochs and the batch size.
      experiment: the tasks, the network and the scenario.

    Returns:
      The recipe of each method, by its name.
    """
    num_steps = 0
    if "kfac" in settings.methods or settings.schedule != "constant":  # others need no tasks yet
        tasks = experiment.make_tasks(experiment.datasets, jax.random.key(0))
        num_examples = max(len(task.train.labels) for task in tasks)
        num_steps = steps_of_task(num_examples, settings.num_epochs, settings.batch_size)
    shared = Recipe(
        experiment.apply_fn,
        make_optimizer_fn(settings, num_steps),
        settings.num_epochs,
        settings.batch_size,
        scenario=experiment.scenario,
        objective=experiment.objective,
        train_fn=experiment.train_fn,
    )
    every = settings.interval or interval_of(num_steps)
    with_factors = shared._replace(optimizer_fn=make_optimizer_fn(settings, num_steps, every))
    return {name: with_factors if name == "kfac" else shared for name in settings.methods}


def make_method(settings: Settings, name: str) -> Method | None:
    """Makes the method of a name.

    Args:
      settings: the methods' own settings.
      name: one of the names that `settings.methods` may have.

    Returns:
      The method; None for joint training.
    """
    return {
        "joint": None,
        "finetune": methods.finetune(),
        "l2": methods.l2(settings.rule, settings.decay),
        "ewc": methods.ewc(settings.fisher, settings.rule, settings.decay),
        "mas": methods.mas(settings.rule, settings.decay),
        "kfac": methods.kfac(settings.fisher, settings.decay),
        "local_mas": methods.local_mas(settings.rule, settings.decay),
        "si": methods.si(settings.rule, settings.decay),
        "rwalk": methods.rwalk(),
    }[name]


def tune(
    settings: Settings, experiment: Experiment, recipes: dict[str, Recipe], run: Run, console: rich.console.Console
) -> Strength:
    """Chooses each method's strength by its average score on validation data, taken from the training data.

    Seeds that are added to the run after a choice have no say in it: what was learned with it stays valid. Methods that
    are added have their strengths chosen from the same seeds as the others.

    Args:
      settings: the strengths and the seeds.
      experiment: the tasks and the network.
      recipes: from `make_recipes`.
      run: the run, for the log, `tuning.md`, `tuning.png` and `strength.json`.
      console: where the table is printed.

    Returns:
      The strengths: the best ones for the methods that are compared.
    """
    learners = {
        field.name: functools.partial(learn_starts, make_method(settings, field.name), recipes[field.name])
        for field in dataclasses.fields(Strength)
        if field.name in settings.methods
    }
    strengths = sorted(settings.strength_grid or STRENGTHS)
    seeds = settings.seeds
    if (run.folder / "strength.json").exists():
        had_a_say = {seed for split, _, seed in run.earlier_rows if split == "validation"}
        seeds = tuple(seed for seed in seeds if seed in had_a_say) or seeds
    datasets = [hold_out_validation(dataset, 0.2, jax.random.key(0)) for dataset in experiment.datasets]
    matrices = sweep_strengths(
        learners,
        strengths,
        functools.partial(experiment.make_tasks, datasets),
        experiment.init_params,
        seeds,
        run,
        console,
        split="validation",
        score=score_of(experiment.objective),
    )
    best = choose_strengths(matrices, strengths, run, console, score=score_of(experiment.objective))
    console.print("chosen: " + ", ".join(f"--strength.{name} {strength:g}" for name, strength in best.items()))
    chosen = dataclasses.replace(settings.strength, **best)
    run.write_json("strength.json", dataclasses.asdict(chosen))
    return chosen
