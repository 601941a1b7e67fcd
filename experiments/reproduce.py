"""Reruns published tables of continual learning on MNIST, each by its source's protocol.

The protocols and the published accuracies are in `published.py`. Finished runs are kept if the script is stopped. Where
a source tuned the strength, ours is chosen on validation data, a sixth of the training data.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import rich.console

from experiments.harness.experiment import load_or_exit
from experiments.harness.pipelines import steps_of_task
from experiments.harness.report import Estimate, estimate, fail_if_all_diverged, print_table
from experiments.harness.runs import Run, open_run, to_json
from experiments.harness.sequences import learn_starts
from experiments.harness.settings import DataSettings, RunSettings, Seeds, check_settings, parse_settings
from experiments.harness.tune import SweepLearner, average_accuracies, best_strength, sweep_strengths, warn_at_edge
from experiments.protocols import Entry, Protocol, Published, PublishedRange
from experiments.published import ROWS
from lifelong_jax import (
    Recipe,
    SweepRun,
    Task,
    evaluate,
    init_consolidation,
    init_training,
    learn_jointly,
    learn_task,
)
from lifelong_jax._tables import markdown_table
from lifelong_jax.datasets import Dataset, hold_out_validation
from lifelong_jax.losses import cross_entropy
from lifelong_jax.models import MLP, train_functions
from lifelong_jax.scenarios import joint_examples
from lifelong_jax.sweep import SweepAccuracies
from lifelong_jax.types import Params

HEADER = """# Published tables, and what this library gets

Average accuracy on MNIST after the last task, in percent. Each row follows its source's protocol, including its
importance; `experiments/published.py` has the details. *Deviations apart* is our mean minus the published one, divided
by the standard deviation of single runs (the root mean square of the source's and ours). *Errors apart* is the same
difference, divided by its standard error. *Our λ* is the factor in the penalty λ/2 Σ Ω (θ − θ*)².

![Published accuracies and ours](results.png)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Run the protocols of published tables on MNIST, and compare our accuracies with the published ones."""

    rows: Seeds = tuple(ROWS)
    """The rows of the table to run, such as 1-3 or 1,5. On two CPU cores, rows 1, 2, 5 and 6 take half an hour, each
    other one takes hours."""

    entries: tuple[str, ...] = ()
    """The methods to run, by their names in the table; by default all of each row."""

    seeds: Seeds = ()
    """Each seed sets the sequence of tasks, the initial parameters and the order of the examples. The default number of
    seeds depends on the row."""

    data_dir: str | None = None
    """Where TFDS keeps prepared data sets; by default TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    docs: str | None = None
    """The rows are added to `results.json` in this folder, and `results.md` and the pictures are made from all rows in
    it. By default, the run's own folder."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        check_settings(distinct={"rows": self.rows} | ({"seeds": self.seeds} if self.seeds else {}))
        if not set(self.rows) <= ROWS.keys():
            raise ValueError(f"rows must be among {', '.join(map(str, ROWS))}, not {self.rows}.")
        names = {entry.name for row in self.rows for entry in ROWS[row].entries}
        if not set(self.entries) <= names:
            raise ValueError(f"entries must be among {', '.join(sorted(names))}, not {self.entries}.")


# --- the runs ---------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Runs the rows, and writes the tables and the pictures."""
    console = rich.console.Console()
    dataset = load_or_exit("mnist", DataSettings(data_dir=config.data_dir))
    accuracies = []
    with open_run(config, "reproduce", console, [dataset]) as run:
        for row in config.rows:
            protocol = ROWS[row]
            chosen = tuple(entry for entry in protocol.entries if not config.entries or entry.name in config.entries)
            results = run_row(row, protocol._replace(entries=chosen), dataset, config.seeds, run, console)
            run.write_json(f"row-{row}.json", results)
            report(row, results, console)
            docs = run.folder if config.docs is None else pathlib.Path(config.docs)
            write_docs(docs, row, results)
            accuracies += [result["accuracies"] for result in results]
        console.print(f"results in {run.folder}, tables in {docs}/results.md", highlight=False, soft_wrap=True)
        fail_if_all_diverged(accuracies)


def run_row(
    row: int, protocol: Protocol, dataset: Dataset, seeds: Sequence[int], run: Run, console: rich.console.Console
) -> list[dict[str, Any]]:
    """Runs a protocol's methods. Returns each one's strength, and its accuracies on test and on validation data."""
    train, test = (part._replace(inputs=protocol.transform(part.inputs)) for part in (dataset.train, dataset.test))
    dataset = Dataset(train, test, dataset.num_classes)
    recipe_of = functools.cache(functools.partial(make_recipe, protocol))
    choosing = any(len(entry.strengths) > 1 for entry in protocol.entries)
    held_out = hold_out_validation(dataset, 1 / 6, jax.random.key(0)) if choosing else None

    def sweep(
        entry: Entry, data: Dataset, strengths: Sequence[float], num_seeds: int, max_steps: int | None, **options: str
    ) -> np.ndarray:
        rate, name = entry.learning_rate or protocol.learning_rate, f"row {row}, {entry.name}"
        learner = make_learner(entry, recipe_of(rate, entry.every, len(data.train.labels)), max_steps)
        make_tasks = functools.partial(protocol.make_tasks, data)
        init_params = functools.partial(protocol.init_params, protocol.hidden_sizes)
        given = (make_tasks, init_params, tuple(seeds) or tuple(range(num_seeds)), run, console)
        return sweep_strengths({name: learner}, strengths, *given, **options)[name]

    results = []
    for entry in protocol.entries:
        strength, validation = entry.strengths[0], {}
        if len(entry.strengths) > 1:
            steps = protocol.choosing_steps or protocol.max_steps
            matrices = sweep(entry, held_out, entry.strengths, entry.num_choosing_seeds, steps, split="validation")
            chosen_by, name = average_accuracies(matrices), f"row {row}, {entry.name}"
            strength = best_strength(chosen_by, entry.strengths, name)
            warn_at_edge(name, strength, entry.strengths, console)
            validation = dict(zip(map("{:g}".format, entry.strengths), map(percent, chosen_by), strict=True))
        matrices = sweep(entry, dataset, (strength,), protocol.num_seeds, protocol.max_steps)
        (accuracy,) = average_accuracies(matrices)
        result = {"name": entry.name, "strength": strength, "accuracies": percent(accuracy), "validation": validation}
        results.append(result | {"after_each_task": after_each_task(matrices[0])})
    return results


def make_recipe(protocol: Protocol, learning_rate: float, every: int | None, num_examples: int) -> Recipe:
    """Makes a protocol's recipe for tasks of so many examples, on which a schedule depends."""
    num_steps = steps_of_task(num_examples, protocol.num_epochs, protocol.batch_size)
    step_size = protocol.schedule(learning_rate, num_steps)

    def optimizer_fn(strength: float) -> optax.GradientTransformation:
        return protocol.pipeline(step_size, strength, every)

    network = MLP(protocol.hidden_sizes, 10, dropout=protocol.dropout)
    apply_fn, train_fn = train_functions(network) if protocol.dropout else (network.apply, None)
    recipe = Recipe(apply_fn, optimizer_fn, protocol.num_epochs, protocol.batch_size, protocol.scenario)
    return recipe._replace(train_fn=train_fn)


def after_each_task(matrices: np.ndarray) -> list[float]:
    """Computes the average accuracy on the tasks so far, after each of many tasks, in percent, the mean over seeds."""
    averages = [100 * matrices[:, count - 1, :count].mean() for count in range(1, matrices.shape[-1] + 1)]
    return [round(average, 2) for average in averages] if len(averages) >= 10 and np.isfinite(averages).all() else []


def make_learner(entry: Entry, recipe: Recipe, max_steps: int | None) -> SweepLearner:
    """Makes the learner of a method, or of joint training; on all tasks, that ends with its epochs."""
    if entry.method is not None:
        return functools.partial(learn_starts, entry.method, recipe, max_steps=max_steps)

    def learn_one(run: SweepRun) -> np.ndarray:
        arguments = (recipe, run.params, run.tasks, run.key)
        return learn_so_far(*arguments, max_steps) if entry.so_far else learn_jointly(*arguments).accuracy_matrix

    def learn_all(runs: Sequence[SweepRun]) -> SweepAccuracies:
        return SweepAccuracies(np.stack([*map(learn_one, runs)]), np.full((len(runs), len(runs[0].tasks)), np.nan))

    return learn_all


def learn_so_far(
    recipe: Recipe, params: Params, tasks: Sequence[Task], key: jax.Array, max_steps: int | None
) -> np.ndarray:
    """Takes each task's steps on the data of all tasks so far. In the accuracy matrix, only the last row is known."""
    optimizer, none = recipe.optimizer_fn(0.0), init_consolidation(params)  # the optimiser keeps its state
    learn = functools.partial(learn_task, cross_entropy(recipe.apply_fn), optimizer, num_epochs=recipe.num_epochs)
    learn = jax.jit(functools.partial(learn, batch_size=recipe.batch_size, max_steps=max_steps))
    state = init_training(optimizer, params, key)
    for count in range(1, len(tasks) + 1):
        examples = joint_examples(tasks[:count], recipe.scenario)
        state = state._replace(key=jax.random.fold_in(key, count))
        state, _ = learn(state, none, examples, weights=examples.weights)
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    matrix[-1] = evaluate(recipe.apply_fn, state.params, tasks, recipe.scenario)
    return matrix


def percent(accuracy: Estimate) -> list[float]:
    """Returns the average accuracy of each seed, in percent."""
    return [100 * value for value in accuracy.values]


# --- the report -------------------------------------------------------------------------------------------------------


def published_error(protocol: Protocol, published: Published) -> float:
    """Computes the standard error of a published mean."""
    of_mean = protocol.deviation == "standard error"
    return published.deviation if of_mean else published.deviation / math.sqrt(protocol.published_runs)


def table_of(protocol: Protocol, results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Makes a row's table: the published accuracies and ours, and how far apart they are."""
    table = [["method", "published", "ours", "runs", "deviations apart", "errors apart", "our λ"]]
    all_published = {entry.name: entry.published for entry in protocol.entries}
    for result in results:
        ours, published = estimate(result["accuracies"]), all_published[result["name"]]
        error = ours.stderr
        deviation = error * math.sqrt(len(ours.values))
        spread = error if protocol.deviation == "standard error" else deviation
        written, deviations, errors = "–", "–", "–"
        if isinstance(published, Published):
            written = f"{published.mean:.2f}"
            written += "" if math.isnan(published.deviation) else f" ± {published.deviation:.2f}"
            difference, its_error = ours.mean - published.mean, published_error(protocol, published)
            its_deviation = its_error * math.sqrt(protocol.published_runs)
            deviations = signed(difference / (math.hypot(its_deviation, deviation) / math.sqrt(2)))
            errors = signed(difference / math.hypot(its_error, error))
        elif isinstance(published, PublishedRange):
            written = f"{published.low:g} to {published.high:g}"
            deviations = "within" if published.low <= ours.mean <= published.high else "outside"
        mean = "diverged" if math.isnan(ours.mean) else f"{ours.mean:.2f}"
        mean += "" if math.isnan(spread) else f" ± {spread:.2f}"
        table.append(
            [result["name"], written, mean, str(len(ours.values)), deviations, errors, f"{result['strength']:g}"]
        )
    return table


def signed(number: float) -> str:
    """Formats a number with its sign, or NaN as a dash."""
    return "–" if math.isnan(number) else f"{round(number, 1) + 0.0:+.1f}"


def report(row: int, results: Sequence[Mapping[str, Any]], console: rich.console.Console) -> None:
    """Prints a row's table."""
    header, *rows = table_of(ROWS[row], results)
    print_table(console, f"Row {row}: {ROWS[row].title}; percent, ± {ROWS[row].deviation}", header, rows)


def write_docs(folder: pathlib.Path, row: int, results: Sequence[Mapping[str, Any]]) -> None:
    """Adds a row to `results.json`, and makes `results.md` and the pictures from all its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    by_name = {result["name"]: result for result in [*rows.get(str(row), []), *results]}
    of_row = [by_name[entry.name] for entry in ROWS[row].entries if entry.name in by_name]
    rows = to_json(dict(sorted({**rows, str(row): of_row}.items(), key=lambda item: int(item[0]))))
    Run(folder).write_json("results.json", rows)
    text = [HEADER]
    for number, of_row in rows.items():
        protocol = ROWS[int(number)]
        text.append(f"## Row {number}: {protocol.title}\n\n{protocol.source}.\n")
        runs = "one run" if protocol.published_runs == 1 else f"{protocol.published_runs} runs"
        spread = f"± is the {protocol.deviation}; the source made {runs}."
        text.append(f"{protocol.remark} {spread}\n")
        header, *table = table_of(protocol, of_row)
        text.append(markdown_table(header, table))
        text.append(f"`python -m experiments.reproduce --rows {number} --docs docs`\n")
        if any(result["validation"] for result in of_row):
            plot_strengths(of_row, folder / f"results_row_{number}.png")
            text.append(f"![Accuracy against λ, by estimator](results_row_{number}.png)\n")
        if any(result.get("after_each_task") for result in of_row):
            plot_tasks(of_row, folder / f"results_row_{number}_tasks.png")
            text.append(f"![Average accuracy on the tasks so far](results_row_{number}_tasks.png)\n")
    plot_rows(rows, folder / "results.png")
    (folder / "results.md").write_text("\n".join(text), encoding="utf-8")


def plot_rows(rows: Mapping[str, Sequence[Mapping[str, Any]]], file: pathlib.Path) -> None:
    """Draws the published accuracies and ours, with intervals of two standard errors, a panel for each row."""
    from lifelong_jax.plotting import COLORS, make_figure  # here, as matplotlib is slow to import

    num_columns = min(2, len(rows))
    num_rows = -(-len(rows) // num_columns)
    title = "Average accuracy, percent: published and ours, ± 2 standard errors"
    figure = make_figure(3.0 + 3.0 * num_columns, 2.4 * num_rows + 0.6, title)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, (number, results) in zip(axes, rows.items(), strict=False):
        protocol = ROWS[int(number)]
        all_published = {entry.name: entry.published for entry in protocol.entries}
        for place, result in enumerate(results):
            ours, published = estimate(result["accuracies"]), all_published[result["name"]]
            style = {"markersize": 4, "label": "ours" if place == 0 else None, "color": COLORS[0]}
            axis.errorbar(ours.mean, -place - 0.12, xerr=2 * np.nan_to_num(ours.stderr), fmt="o", **style)
            style = {"markersize": 4, "label": "published" if place == 0 else None, "color": "0.45"}
            if isinstance(published, Published):
                width = 2 * published_error(protocol, published)
                axis.errorbar(published.mean, -place + 0.12, xerr=np.nan_to_num(width), fmt="o", **style)
            elif isinstance(published, PublishedRange):
                axis.plot([published.low, published.high], [-place + 0.12] * 2, "|-", **style)
        axis.set_yticks(-np.arange(len(results)), [result["name"] for result in results])
        axis.set_ylim(-len(results) + 0.4, 0.6)
        axis.set_title(f"{number}: {protocol.title}", fontsize=8)
    for axis in axes[len(rows) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


def plot_strengths(results: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """Draws the accuracy on validation data against λ, a line for each method that has several strengths."""
    from lifelong_jax.plotting import COLORS, draw_over_seeds, make_figure

    figure = make_figure(6.4, 3.6, "Average accuracy on validation data against λ")
    axis = figure.subplots()
    for index, result in enumerate(result for result in results if result["validation"]):
        strengths = [float(strength) for strength in result["validation"]]
        accuracies = np.array(list(result["validation"].values()), np.float64).T
        draw_over_seeds(axis, strengths, accuracies, COLORS[index], result["name"], marker="o", markersize=3)
    axis.set_xscale("log")
    axis.set_xlabel("strength λ")
    axis.set_ylabel("average accuracy, percent")
    axis.legend(frameon=False)
    figure.savefig(file)


def plot_tasks(results: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """Draws the average accuracy on the tasks so far after each task, a line for each method."""
    from lifelong_jax.plotting import COLORS, make_figure

    figure = make_figure(6.4, 3.6, "Average accuracy on the tasks so far")
    axis = figure.subplots()
    for index, result in enumerate(result for result in results if result.get("after_each_task")):
        averages = np.array(result["after_each_task"], np.float64)
        axis.plot(np.arange(1, len(averages) + 1), averages, color=COLORS[index], label=result["name"], linewidth=1.2)
    axis.set_xlabel("tasks learned")
    axis.set_ylabel("average accuracy, percent")
    axis.legend(frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    main(parse_settings(Config, "reproduce"))
