"""Would another strength, or another rule, have remembered more? The last task anew, from what was kept of the others.

A sequence of tasks is learned once, and each task's own parameters and importance are kept on disk. From these files,
each rule of consolidation makes what it would have made, and the last task alone is learned again, at each strength,
from the parameters that the task before it left. With the rule and the strength of the first time, that gives the
numbers of the first time.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
import optax
import rich.console

from lifelong_jax import (
    LearnedSequence,
    Method,
    Progress,
    Task,
    init_consolidation,
    learn_tasks,
    methods,
    permuted_tasks,
    proximal_quadratic_penalty,
)
from lifelong_jax.checkpoint import load_consolidation
from lifelong_jax.comparison import Learner, Outcome, compare
from lifelong_jax.datasets import hold_out_validation
from lifelong_jax.experiment import load_or_exit
from lifelong_jax.models import MLP, init_network
from lifelong_jax.plotting import plot_strength_sweep
from lifelong_jax.resuming import KeptTasks, ResumableSequence, open_run, parse_settings
from lifelong_jax.runs import (
    Estimate,
    Run,
    RunSettings,
    Seeds,
    check_settings,
    estimate,
    format_estimate,
    markdown_table,
    print_table,
)
from lifelong_jax.types import Params

RULES = ("separate", "latest")
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Learn the last of several tasks again, at other strengths and by other rules, from what was kept of the rest."""

    dataset: str = "digits"
    """digits (bundled), or the name of an image-classification data set that TFDS has prepared, such as mnist."""

    data_dir: str | None = None
    """Where TFDS keeps prepared data sets; by default TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    method: Literal["ewc", "mas"] = "ewc"
    """Which importance: Fisher diagonal (ewc) or output sensitivity (mas)."""

    rule: Literal["separate", "latest"] = "separate"
    """The rule of consolidation of the first time."""

    strength: float = 100.0
    """λ of the first time."""

    strengths: tuple[float, ...] = tuple(float(f"{10 ** (half_decade / 2):.3g}") for half_decade in range(0, 9))
    """λ of the other times, for the last task."""

    num_tasks: int = 5
    """How many permuted tasks."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the network's hidden layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of SGD with momentum 0.9, with the penalty's proximal step."""

    seeds: Seeds = (0, 1, 2)
    """One sequence of tasks, one initialisation and one order of examples for each."""

    def __post_init__(self) -> None:
        """Refuses what would fail only after much has run."""
        names = ("num_tasks", "hidden_sizes", "num_epochs", "batch_size", "learning_rate")
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={"strength": self.strength, "strengths": self.strengths},
            distinct={"strengths": self.strengths, "seeds": self.seeds},
        )
        if self.num_tasks < 2:
            raise ValueError("num_tasks must be at least 2: a task that others came before is learned again.")


def main(config: Config) -> None:
    """Learns the tasks once, and the last one many times.

    Args:
      config: the whole configuration.
    """
    console = rich.console.Console()
    dataset = load_or_exit(config.dataset, config.data_dir)
    dataset = hold_out_validation(dataset, 0.2, jax.random.key(0))  # what is chosen from it is not chosen on test data
    model = MLP(config.hidden_sizes, dataset.num_classes)
    method = {"ewc": methods.ewc, "mas": methods.mas}[config.method](rule=config.rule)

    def optimizer_fn(strength: jax.Array) -> optax.GradientTransformation:
        rate = config.learning_rate
        base = optax.sgd(rate, momentum=MOMENTUM)
        return optax.chain(base, proximal_quadratic_penalty(rate / (1 - MOMENTUM), strength))

    def learner(method: Method, strength: float) -> Learner:
        return functools.partial(
            learn_tasks, method, model.apply, optimizer_fn, strength=strength, batch_size=config.batch_size
        )

    again = {
        learner_name(rule, strength): functools.partial(learn_last_task, learner(ruled, strength), ruled)
        for rule, ruled in ((rule, method._replace(rule=rule)) for rule in RULES)
        for strength in config.strengths
    }
    with open_run(config, "reconsolidate", console) as run:
        compare_learners = functools.partial(
            compare,
            make_tasks=lambda key: permuted_tasks(dataset.train, dataset.test, config.num_tasks, key),
            init_params=functools.partial(init_network, model),
            seeds=config.seeds,
            num_epochs=config.num_epochs,
            run=run,
            console=console,
        )
        compare_learners({"first": learner(method, config.strength)}, keep_tasks=True)
        report(config, compare_learners(again), run, console)


def learn_last_task(
    learn: Learner,
    method: Method,
    params: Params,
    tasks: Sequence[Task],
    key: jax.Array,
    *,
    num_epochs: int,
    report: Callable[[Progress], None],
    checkpoints: ResumableSequence,
) -> LearnedSequence:
    """Learns the last task after the others as they were learned the first time, consolidated by the method's rule."""
    first = ResumableSequence(checkpoints.run, method="first", seed=checkpoints.seed)
    like = init_consolidation(params)
    kept = [load_consolidation(first.task_file(task), like=like) for task in range(len(tasks) - 1)]
    checkpoints = KeptTasks(kept, method, num_epochs, checkpoints)
    return learn(params, tasks, key, num_epochs=num_epochs, report=report, checkpoints=checkpoints)


def learner_name(rule: str, strength: float) -> str:
    """Names a learner as it stands in the log."""
    return f"{rule} {strength:.3g}"


def report(config: Config, outcomes: dict[str, Outcome], run: Run, console: rich.console.Console) -> None:
    """Prints the table; writes `summary.json`, `table.md` and `reconsolidate.png`."""
    views = {
        "all tasks": lambda last_row: last_row.mean(axis=-1),
        "the earlier tasks": lambda last_row: last_row[:, :-1].mean(axis=-1),
        "the last task": lambda last_row: last_row[:, -1],
    }
    accuracy = {
        view: {
            rule: [
                estimate(view_of(outcomes[learner_name(rule, strength)].accuracy_matrix[:, -1]))
                for strength in config.strengths
            ]
            for rule in RULES
        }
        for view, view_of in views.items()
    }
    run.write_summary({"strengths": config.strengths, "accuracy": accuracy})
    header = ["strength", *(f"{view}, {rule}" for view in accuracy for rule in RULES)]
    columns = [column for of_view in accuracy.values() for column in of_view.values()]
    rows = [
        [f"{strength:.3g}", *(format_estimate(column[index], 100) for column in columns)]
        for index, strength in enumerate(config.strengths)
    ]
    setting = f"The last of {config.num_tasks} permuted tasks of {config.dataset} learned again, {config.method}"
    print_table(console, f"{setting}: validation accuracy, percent", header, rows)
    (run.folder / "table.md").write_text(markdown_table(header, rows))
    title = f"{setting}: best {', '.join(best(rule, accuracy['all tasks'][rule], config.strengths) for rule in RULES)}"
    plot_strength_sweep(accuracy, config.strengths, title, run.folder / "reconsolidate.png")
    epochs, times = config.num_epochs, len(RULES) * len(config.strengths)
    console.print(f"{times} times {epochs} epochs a seed, where from the start it had been {config.num_tasks * epochs}")
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def best(rule: str, accuracy: Sequence[Estimate], strengths: Sequence[float]) -> str:
    """Says which strength was best."""
    index = int(np.argmax(np.nan_to_num([of_strength.mean for of_strength in accuracy])))
    return f"{rule} {format_estimate(accuracy[index], 100)} % at λ = {strengths[index]:.3g}"


if __name__ == "__main__":
    main(parse_settings(Config, "reconsolidate"))
