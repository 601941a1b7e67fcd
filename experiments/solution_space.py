"""Many parameters solve task A. Does the penalty lead to some that solve task B too? Loss contours of both tasks.

The first model has two parameters, so that a plane is its whole space. It is linear and tells two digits apart by two
measurements of the image (task A: 6 and 9, task B: 2 and 7). The second is a network that learns two permuted tasks;
its losses are drawn in planes through its solutions. Starting from task A's solution, both models learn task B without
a penalty, with every parameter equally important ("equal rigidity"), with the Fisher diagonal, and with the Fisher's
Kronecker factors. Each penalty has the best strength of the same grid.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from experiments.harness.report import Estimate, estimate, format_estimate, progress_bar, report_tables
from experiments.harness.runs import Run, compute_once, open_run
from experiments.harness.settings import RunSettings, Seeds, check_settings, parse_settings
from experiments.solution_space_models import Case, network, two_parameters
from lifelong_jax import (
    Batch,
    Consolidation,
    fisher_diagonal,
    forms,
    init_consolidation,
    init_training,
    kronecker_fisher,
    learn_task,
    proximal_quadratic_penalty,
)
from lifelong_jax.datasets import load_dataset
from lifelong_jax.geometry import Plane, loss_on_plane, penalty_on_plane, plane_coordinates, plane_through
from lifelong_jax.types import Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PENALTIES = ("plain training", "equal rigidity", "Fisher diagonal", "Kronecker factors")
ELLIPSES = ("Fisher diagonal", "Kronecker factors")
"""The penalties whose ellipses are drawn."""
ELLIPSE, ELLIPSE_PLANE = "ellipses' overlap", "Fisher diagonal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunSettings):
    """Draw the losses of two tasks around the solutions of plain training and of three penalties."""

    hidden_sizes: tuple[int, ...] = (64,)
    """Widths of the network's hidden layers."""

    num_epochs: int = 30
    """Passes over each task's training data."""

    batch_size: int = 32
    """Examples per step."""

    learning_rate: float = 0.05
    """The step size of plain SGD for the network."""

    linear_learning_rate: float = 1.0
    """The step size of plain SGD for the model of two parameters."""

    stiffness: tuple[float, ...] = tuple(float(f"{10 ** (third / 3):.3g}") for third in range(-4, 9))
    """The grid of total stiffness λ · tr Ω, in units of that of the Fisher diagonal at λ = 1."""

    low: float = 0.1
    """A loss counts as low up to this much above the loss that training on the task alone reaches."""

    grid_size: int = 41
    """Losses are computed on grids of this many points per side."""

    seeds: Seeds = (0, 1, 2, 3, 4)
    """Each seed sets the initial parameters, the order of the examples and the tasks (the 140 images of two digits, or
    the permutations). Contours are drawn for the first seed."""

    def __post_init__(self) -> None:
        """Validates before computing."""
        names = ("hidden_sizes", "num_epochs", "batch_size", "learning_rate", "linear_learning_rate", "stiffness")
        check_settings(
            positive={name: getattr(self, name) for name in (*names, "low", "grid_size")},
            distinct={"seeds": self.seeds, "stiffness": self.stiffness},
        )


class Learned(NamedTuple):
    """The results of one seed.

    Attributes:
      tasks: the training examples of A and B.
      solution: the parameters after task A.
      importances: A's importances at the solution, from `importances_of`.
      paths: for each penalty, the parameters while task B is learned, `[num_stiffness, num_epochs + 1, ...]`; of paths
        that are not drawn only the end, `[num_stiffness, 1, ...]`.
      lowest: `[2]`, the losses on A and B that training on the task alone reaches.
      above: for each penalty, `[num_stiffness, 2]`, the losses on A and B after B, minus `lowest`.
    """

    tasks: tuple[Batch, Batch]
    solution: Params
    importances: dict[str, Params]
    paths: dict[str, Params]
    lowest: np.ndarray
    above: dict[str, np.ndarray]


class Outcome(NamedTuple):
    """The results of a model over seeds.

    Attributes:
      chosen: for each penalty, the index of the stiffness at which the worse of the two losses is lowest.
      above: for each penalty, the losses on A and B, and the worse of them, minus the lowest.
      overlap: of A's low-loss region with each penalty's ellipse, their intersection over their union: in the plane
        through the end of training with the Fisher diagonal, and in that with the Kronecker factors.
    """

    chosen: dict[str, int]
    above: dict[str, dict[str, Estimate]]
    overlap: dict[str, dict[str, Estimate]]


def main(config: Config) -> None:
    """Runs the study."""
    console = rich.console.Console()
    with open_run(config, "solution_space", console, [load_dataset("digits")]) as run:
        cases = (two_parameters(config.linear_learning_rate), network(config.hidden_sizes, config.learning_rate))
        learned: dict[str, list[Learned]] = {case.name: [] for case in cases}
        outcomes = {}
        with progress_bar(console) as bar:
            line = bar.add_task("learning", total=len(cases) * len(config.seeds), status="")
            for case in cases:
                for seed in config.seeds:
                    name = f"{case.name}, seed {seed}"
                    bar.update(line, status=name)
                    tasks_key, *keys = jax.random.split(jax.random.key(seed), 4)
                    tasks = case.make_tasks(tasks_key)
                    drawn = case.is_plane or seed == config.seeds[0]
                    of_seed = compute_once(run, name, functools.partial(learn, config, case, tasks, keys, drawn))
                    importances = importances_of(case, of_seed["solution"], tasks[0])
                    result = Learned(tasks, importances=importances, **of_seed)
                    run.log_once(model=case.name, seed=seed, lowest=result.lowest, above=result.above)
                    learned[case.name].append(result)
                    bar.advance(line)
                outcomes[case.name] = summarize(config, case, learned[case.name])
        report(config, outcomes, run, console)
        draw(config, cases, learned, outcomes, run)
        console.print(f"results in {run.folder}", highlight=False, soft_wrap=True)


def learn(
    config: Config, case: Case, tasks: tuple[Batch, Batch], keys: Sequence[jax.Array], drawn: bool
) -> dict[str, Any]:
    """Learns task A, then B with each penalty at each stiffness. Returns `Learned`'s other fields."""
    params_key, a_key, b_key = keys
    start = case.init_params(params_key)
    path = train(config, case, start, init_consolidation(start), 0.0, tasks[0], a_key)
    solution = take(path, -1)
    paths, losses = {}, {}
    importances = importances_of(case, solution, tasks[0])
    for name, importance in importances.items():
        consolidation = Consolidation(solution, importance)
        strengths = [0.0]
        if name != PENALTIES[0]:
            unit = trace(importances["Fisher diagonal"]) / trace(importance)
            strengths = [unit * stiffness for stiffness in config.stiffness]
        with_each = [
            jax.device_get(train(config, case, solution, consolidation, strength, tasks[1], b_key))
            for strength in strengths
        ]
        losses[name] = np.array([[mean_loss(case, take(path, -1), task) for task in tasks] for path in with_each])
        paths[name] = jax.tree.map(lambda *leaves: np.stack(leaves)[:, 0 if drawn else -1 :], *with_each)
    lowest = np.array([mean_loss(case, solution, tasks[0]), losses[PENALTIES[0]][0, 1]])
    above = {name: loss - lowest for name, loss in losses.items()}
    return {"solution": solution, "paths": paths, "lowest": lowest, "above": above}


def importances_of(case: Case, params: Params, task: Batch) -> dict[str, Params]:
    """Computes the importance of each penalty: 0, the Fisher diagonal's mean, the diagonal, the Kronecker factors."""
    fisher, kronecker = (
        fisher_fn(case.output_fn, params, task.inputs, likelihood=case.likelihood)
        for fisher_fn in (fisher_diagonal, kronecker_fisher)
    )
    mean = optax.tree.sum(fisher) / optax.tree.size(fisher)
    equal = jax.tree.map(lambda leaf: jnp.full_like(leaf, mean), fisher)
    none = jax.tree.map(jnp.zeros_like, fisher)
    return dict(zip(PENALTIES, (none, equal, fisher, kronecker), strict=True))


def trace(importance: Params) -> float:
    """Computes the sum of an importance's diagonal."""
    return float(sum(map(forms.trace, jax.tree.leaves(importance, is_leaf=forms.is_form))))


@functools.partial(jax.jit, static_argnames=("config", "case"))
def train(
    config: Config,
    case: Case,
    params: Params,
    consolidation: Consolidation,
    strength: float,
    task: Batch,
    key: jax.Array,
) -> Params:
    """Trains, and returns the parameters at the start and after each epoch, `[num_epochs + 1, ...]`."""
    rate = case.learning_rate
    optimizer = optax.chain(optax.sgd(rate), proximal_quadratic_penalty(rate, strength))

    def epoch(state: Any, _: None) -> tuple[Any, Params]:
        state, _ = learn_task(
            case.loss_fn, optimizer, state, consolidation, task, num_epochs=1, batch_size=config.batch_size
        )
        return state, state.params

    _, after = jax.lax.scan(epoch, init_training(optimizer, params, key), length=config.num_epochs)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), params, after)


@functools.partial(jax.jit, static_argnames=("case",))
def mean_loss(case: Case, params: Params, examples: Batch) -> jax.Array:
    """Computes the mean loss over examples."""
    return jax.vmap(case.loss_fn, in_axes=(None, 0))(params, examples).mean()


def take(path: Params, index: int) -> Params:
    """Returns one point of a path."""
    return jax.tree.map(lambda leaf: leaf[index], path)


def summarize(config: Config, case: Case, learned: Sequence[Learned]) -> Outcome:
    """Chooses each penalty's stiffness, and computes estimates over seeds."""
    chosen, above = {}, {}
    for name in PENALTIES:
        of_seeds = np.stack([result.above[name] for result in learned])
        chosen[name] = int(of_seeds.max(axis=-1).mean(axis=0).argmin())
        a, b = of_seeds[:, chosen[name]].T
        above[name] = {"A": estimate(a), "B": estimate(b), "worse": estimate(np.maximum(a, b))}
    planes = {name: [plane_of(case, result, chosen, name) for result in learned] for name in ELLIPSES}
    overlaps = {
        name: {
            ellipse: estimate([overlap(config, case, *each, ellipse) for each in zip(of_seeds, learned, strict=True)])
            for ellipse in ELLIPSES
        }
        for name, of_seeds in planes.items()
    }
    return Outcome(chosen, above, overlaps)


def overlap(config: Config, case: Case, plane: Plane, result: Learned, name: str) -> float:
    """Computes the overlap of A's low-loss region with a penalty's ellipse, on a grid that contains both."""
    for reach in (1.0, 2.0):  # a grid twice as large, if the region touches the first one's edge
        first, second = around(plane, result, config, [], reach, [name])
        losses = loss_on_plane(case.loss_fn, plane, *(first, second), result.tasks[0])
        region = losses <= result.lowest[0] + config.low
        if not (region[[0, -1]].any() or region[:, [0, -1]].any()):
            break
    ellipse = penalty_around(plane, result, first, second, name) <= config.low
    return float((region & ellipse).sum() / (region | ellipse).sum())


def plane_of(case: Case, result: Learned, chosen: Mapping[str, int], name: str) -> Plane:
    """Returns the plane through A's solution, the end of plain training, and the end of training with a penalty."""
    if case.is_plane:
        return Plane(jnp.zeros(2), (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])))
    ends = (take(take(result.paths[each], chosen[each]), -1) for each in (PENALTIES[0], name))
    return plane_through(result.solution, *ends)


def around(
    plane: Plane,
    result: Learned,
    config: Config,
    paths: Sequence[np.ndarray],
    reach: float,
    names: Collection[str] = ELLIPSES,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses a grid's coordinates so that it contains the paths, and penalties' ellipses enlarged `reach` times."""
    anchor = plane_coordinates(plane, result.solution)
    inverses = [np.linalg.inv(penalty_on_plane(plane, result.importances[name])) for name in names]
    radii = reach * np.sqrt(2 * config.low * np.max([np.diag(inverse) for inverse in inverses], axis=0))
    corners = np.concatenate([*paths, [anchor - radii, anchor + radii]])
    margin = 0.1 * np.ptp(corners, axis=0)
    return tuple(np.linspace(corners.min(axis=0) - margin, corners.max(axis=0) + margin, config.grid_size).T)


def penalty_around(plane: Plane, result: Learned, first: np.ndarray, second: np.ndarray, name: str) -> np.ndarray:
    """Computes a penalty at λ = 1 on a grid in a plane."""
    offset = np.stack(np.meshgrid(first, second), axis=-1) - plane_coordinates(plane, result.solution)
    return np.einsum("...j,jk,...k", offset, penalty_on_plane(plane, result.importances[name]), offset) / 2


def report(config: Config, outcomes: Mapping[str, Outcome], run: Run, console: rich.console.Console) -> None:
    """Prints the tables; writes `summary.json` and `table.md`."""
    ends = [["model", "penalty", "stiffness", "A above lowest", "B above lowest", "the worse"]]
    ends += [
        [
            case,
            name,
            "–" if name == PENALTIES[0] else f"{config.stiffness[outcome.chosen[name]]:.3g}",
            *(format_estimate(value, digits=3) for value in outcome.above[name].values()),
        ]
        for case, outcome in outcomes.items()
        for name in PENALTIES
    ]
    overlaps = [["model", "ellipse", *(f"overlap in the plane of the {name}, %" for name in ELLIPSES)]]
    overlaps += [
        [case, name, *(format_estimate(of_plane[name], 100, 0) for of_plane in outcome.overlap.values())]
        for case, outcome in outcomes.items()
        for name in ELLIPSES
    ]
    tables = {
        "Mean training losses after task B, by penalty": ends,
        "Overlap of A's low-loss region with the penalty's ellipse": overlaps,
    }
    report_tables(tables, run, console)
    run.write_summary({"models": outcomes})


def draw(
    config: Config,
    cases: Sequence[Case],
    learned: Mapping[str, Sequence[Learned]],
    outcomes: Mapping[str, Outcome],
    run: Run,
) -> None:
    """Draws `solution_space.png`: a row for each model, a column for each penalty, and a column for the ellipse."""
    from matplotlib.lines import Line2D  # here, as matplotlib is slow to import
    from matplotlib.patches import Patch

    from lifelong_jax.plotting import COLORS, make_figure

    figure = make_figure(8.6, 5.4, title_of(outcomes))
    for case, row in zip(cases, figure.subplots(2, 5), strict=True):
        outcome = outcomes[case.name]
        for axis, name in zip(row, (*PENALTIES, ELLIPSE), strict=True):
            draw_panel(config, case, learned[case.name], outcome, name, axis)
            numbers = (
                " and ".join(f"{100 * outcome.overlap[ELLIPSE_PLANE][each].mean:.0f} %" for each in ELLIPSES)
                if name == ELLIPSE
                else ", ".join(f"{task} {outcome.above[name][task].mean:+z.2f}" for task in "AB")
            )
            axis.set_title(f"{name}\n{numbers}" if case is cases[0] else numbers, fontsize=10)
            axis.set_xlabel(case.axes[0], fontsize=9)
        row[0].set_ylabel(f"{case.name}\n{case.axes[1]}", fontsize=9)
    low = f"at most {config.low:g} above the lowest"
    handles = {
        f"loss on A {low}": Patch(color=COLORS[0], alpha=0.5),
        "the same for B": Patch(color=COLORS[1], alpha=0.5),
        "A's solution": Line2D([], [], color="black", marker="*", markersize=8, linestyle=""),
        "B's training": Line2D([], [], color="black", marker="o", markersize=4, linewidth=1),
    } | {
        f"penalty {config.low:g} at λ = 1, {name}": Line2D([], [], color=style["colors"], linestyle=style["linestyles"])
        for name, style in zip(ELLIPSES, ellipse_styles(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(run.folder / "solution_space.png")


def ellipse_styles() -> list[dict[str, str]]:
    """Returns how each of the ELLIPSES is drawn."""
    from lifelong_jax.plotting import COLORS

    return [{"colors": "black", "linestyles": "--"}, {"colors": COLORS[2], "linestyles": "-"}]


def draw_panel(
    config: Config, case: Case, learned: Sequence[Learned], outcome: Outcome, name: str, axis: "Axes"
) -> None:
    """Draws both tasks' low-loss regions, A's solution, and a penalty's paths or the ellipses."""
    from lifelong_jax.plotting import COLORS, draw_low_loss

    result = learned[0]
    third = ELLIPSE_PLANE if name in (PENALTIES[0], ELLIPSE) else name
    plane = plane_of(case, result, outcome.chosen, third)

    def paths_of(penalty: str) -> list[np.ndarray]:
        seeds = learned if case.is_plane else [result]  # each seed has a plane of its own
        return [path_in(plane, take(each.paths[penalty], outcome.chosen[penalty])) for each in seeds]

    inside = [path for each in (PENALTIES if case.is_plane else (PENALTIES[0], third)) for path in paths_of(each)]
    grid = around(plane, result, config, inside, 1.0 if case.is_plane or name == ELLIPSE else 0.4)
    for task, lowest, color in zip(result.tasks, result.lowest, COLORS, strict=False):
        losses = loss_on_plane(case.loss_fn, plane, *grid, task)
        draw_low_loss(axis, *grid, losses, [lowest + config.low, lowest + 4 * config.low], color)
    axis.plot(*plane_coordinates(plane, result.solution), "*", color="black", markersize=8)
    if name == ELLIPSE:
        for each, style in zip(ELLIPSES, ellipse_styles(), strict=True):
            penalty = penalty_around(plane, result, *grid, each)
            axis.contour(*grid, penalty, levels=[config.low], linewidths=1.6, **style)
        return
    for path in paths_of(name):
        axis.plot(*path.T, color="black", linewidth=1)
        axis.plot(*path[-1], "o", color="black", markersize=4)


def path_in(plane: Plane, path: Params) -> np.ndarray:
    """Projects a path onto a plane: `[num_points, 2]`."""
    num_points = len(jax.tree.leaves(path)[0])
    return np.stack([plane_coordinates(plane, take(path, index)) for index in range(num_points)])


def title_of(outcomes: Mapping[str, Outcome]) -> str:
    """Names the penalty at which the worse of both losses is lowest, if it is the same for both models."""
    nearest = {
        min(PENALTIES, key=lambda name, outcome=outcome: outcome.above[name]["worse"].mean)
        for outcome in outcomes.values()
    }
    if len(nearest) > 1:
        return "Losses on A and B after task B, above the lowest"
    return f"Training with the {nearest.pop()} ends nearest to where both losses are low"


if __name__ == "__main__":
    main(parse_settings(Config, "solution_space"))
