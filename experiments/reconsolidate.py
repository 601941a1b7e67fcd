"""Would another strength, or another rule of consolidation, have forgotten less? Only the last task is learned again.

A sequence of tasks is learned once, and the parameters and the importance after each task are kept on disk. From these
files, the earlier tasks are consolidated again by each rule. The last task is then learned again at each strength, from
the parameters that the task before it ended with. The rule and the strength of the first run give its numbers again.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
import rich.console

from experiments.harness.compare import compare
from experiments.harness.experiment import load_or_exit
from experiments.harness.parallel import num_at_once
from experiments.harness.pipelines import interval_of, momentum_with_penalty, steps_of_task
from experiments.harness.report import Estimate, Outcome, estimate, fail_if_all_diverged, format_estimate, report_tables
from experiments.harness.runs import Run, open_run
from experiments.harness.sequences import ResumableSequence, learn_resumably
from experiments.harness.settings import (
    DatasetName,
    DataSettings,
    Seeds,
    check_num_tasks,
    check_settings,
    parse_settings,
)
from lifelong_jax import Recipe, SequenceState, methods, permuted_tasks
from lifelong_jax.checkpoint import load_consolidation
from lifelong_jax.consolidation import Rule
from lifelong_jax.continual import go_on_after
from lifelong_jax.datasets import hold_out_validation
from lifelong_jax.methods import Method
from lifelong_jax.models import MLP, init_network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DataSettings):
    """Learn the last of several tasks again, at other strengths and by other rules of consolidation."""

    dataset: DatasetName = "digits"

    method: Literal["ewc", "mas", "kfac"] = "ewc"
    """The importance: the Fisher diagonal (ewc), the output's sensitivity (mas), or the Fisher with Kronecker factors
    (kfac), which has the rule "latest" only."""

    rule: Literal["separate", "latest"] = "separate"
    """The rule of consolidation in the first run."""

    strength: float = 100.0
    """λ in the first run."""

    strengths: tuple[float, ...] = tuple(float(f"{10 ** (half_decade / 2):.3g}") for half_decade in range(0, 9))
    """Values of λ at which the last task is learned again."""

    num_tasks: int = 5
    """Number of permuted tasks."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the network's hidden layers."""

    num_epochs: int = 20
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.01
    """The step size of SGD with momentum 0.9, with the penalty's proximal step."""

    seeds: Seeds = (0, 1, 2)
    """Each seed sets the sequence of tasks, the initial parameters and the order of the examples."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        super().__post_init__()
        names = ("hidden_sizes", "num_epochs", "batch_size", "learning_rate")
        check_settings(
            positive={name: getattr(self, name) for name in names},
            not_negative={"strength": self.strength, "strengths": self.strengths},
            distinct={"strengths": self.strengths, "seeds": self.seeds},
        )
        check_num_tasks(self.num_tasks, self.num_epochs)
        if self.method == "kfac" and self.rule != "latest":
            raise ValueError("method kfac needs --rule latest.")
        if self.num_tasks < 2:
            raise ValueError("num_tasks must be at least 2, because the last task needs earlier ones.")


def main(config: Config) -> None:
    """Learns all tasks once, then the last one again by each rule and at each strength."""
    console = rich.console.Console()
    dataset = load_or_exit(config.dataset, config)
    dataset = hold_out_validation(dataset, 0.2, jax.random.key(0))  # so that no choice is made on test data
    model = MLP(config.hidden_sizes, dataset.num_classes)
    makers = {"ewc": methods.ewc, "mas": methods.mas, "kfac": methods.kfac}
    method = makers[config.method]()._replace(rule=config.rule)

    num_steps = steps_of_task(len(dataset.train.labels), config.num_epochs, config.batch_size)
    every = interval_of(num_steps) if config.method == "kfac" else None
    optimizer_fn = functools.partial(momentum_with_penalty, config.learning_rate, every=every)
    recipe = Recipe(model.apply, optimizer_fn, config.num_epochs, config.batch_size)
    again = {
        learner_name(rule, strength): functools.partial(
            learn_resumably, ruled, recipe, strength, prepare=functools.partial(start_with_last_task, ruled, recipe)
        )
        for rule, ruled in ((rule, method._replace(rule=rule)) for rule in rules_of(config))
        for strength in config.strengths
    }
    with open_run(config, "reconsolidate", console, [dataset]) as run:
        compare_learners = functools.partial(
            compare,
            make_tasks=lambda key: permuted_tasks(dataset.train, dataset.test, config.num_tasks, key),
            init_params=functools.partial(init_network, model),
            seeds=config.seeds,
            num_epochs=config.num_epochs,
            run=run,
            console=console,
            at_once=num_at_once(),
        )
        first = functools.partial(learn_resumably, method, recipe, config.strength)
        learned = compare_learners({"first": first}, keep_tasks=True)
        fail_if_all_diverged([learned["first"].accuracy_matrix[:, -1]])  # nothing was kept to go on from
        outcomes = compare_learners(again)
        report(config, outcomes, run, console)
        fail_if_all_diverged(outcome.accuracy_matrix[:, -1] for outcome in outcomes.values())


def start_with_last_task(
    method: Method, recipe: Recipe, start: SequenceState, sequence: ResumableSequence
) -> SequenceState:
    """Makes the state before the last task: the earlier tasks of the first run, consolidated by the method's rule."""
    first = ResumableSequence(sequence.run, method="first", seed=sequence.seed)
    num_kept = len(start.accuracy_matrix) - 1
    kept = [load_consolidation(first.task_file(task), like=start.consolidation) for task in range(num_kept)]
    return go_on_after(kept, method, recipe, start)


def rules_of(config: Config) -> tuple[Rule, ...]:
    """Returns the rules that are compared."""
    return ("latest",) if config.method == "kfac" else ("separate", "latest")


def learner_name(rule: str, strength: float) -> str:
    """Returns the name of a learner in the log."""
    return f"{rule} {strength:.3g}"


def report(config: Config, outcomes: dict[str, Outcome], run: Run, console: rich.console.Console) -> None:
    """Prints the table; writes `summary.json`, `table.md` and `reconsolidate.png`."""
    from lifelong_jax.plotting import plot_strength_sweep  # here, as matplotlib is slow to import

    rules = rules_of(config)
    views = {
        "all tasks": lambda last_row: last_row.mean(axis=-1),
        "the earlier tasks": lambda last_row: last_row[:, :-1].mean(axis=-1),
        "the last task": lambda last_row: last_row[:, -1],
    }
    last_rows = {
        rule: [outcomes[learner_name(rule, strength)].accuracy_matrix[:, -1] for strength in config.strengths]
        for rule in rules
    }
    values = {view: {rule: list(map(of_row, last_rows[rule])) for rule in rules} for view, of_row in views.items()}
    accuracy = {
        view: {rule: list(map(estimate, rows)) for rule, rows in by_rule.items()} for view, by_rule in values.items()
    }
    run.write_summary({"strengths": config.strengths, "accuracy": accuracy})
    header = ["strength", *(f"{view}, {rule}" for view in accuracy for rule in rules)]
    columns = [column for by_rule in accuracy.values() for column in by_rule.values()]
    rows = [
        [f"{strength:.3g}", *(format_estimate(column[index], 100) for column in columns)]
        for index, strength in enumerate(config.strengths)
    ]
    setting = f"The last of {config.num_tasks} permuted tasks of {config.dataset} learned again, {config.method}"
    report_tables({f"{setting}: validation accuracy, percent": [header, *rows]}, run, console)
    title = f"{setting}: best {', '.join(best(rule, accuracy['all tasks'][rule], config.strengths) for rule in rules)}"
    figure = plot_strength_sweep(values, config.strengths, title, "validation accuracy")
    figure.savefig(run.folder / "reconsolidate.png")
    epochs, runs = config.num_epochs, len(rules) * len(config.strengths)
    console.print(f"{runs} runs of {epochs} epochs per seed, instead of {config.num_tasks * epochs} from the start")
    console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def best(rule: str, accuracy: Sequence[Estimate], strengths: Sequence[float]) -> str:
    """Describes the best strength of a rule, and the accuracy there."""
    index = int(np.argmax(np.nan_to_num([of_strength.mean for of_strength in accuracy])))
    return f"{rule} {format_estimate(accuracy[index], 100)} % at λ = {strengths[index]:.3g}"


if __name__ == "__main__":
    main(parse_settings(Config, "reconsolidate"))
