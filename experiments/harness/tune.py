"""Sweeps over strengths and seeds, and the choice of the best strength on validation data."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
import rich.console

from experiments.harness.parallel import map_as_finished, num_at_once
from experiments.harness.report import Estimate, estimate, format_score, print_table, progress_bar
from experiments.harness.runs import Run
from experiments.harness.scores import ACCURACY, Score
from experiments.harness.sequences import ResumableSequence, start_of_seed
from experiments.harness.settings import check_settings
from lifelong_jax import metrics
from lifelong_jax._tables import markdown_table
from lifelong_jax.sweep import SweepAccuracies, SweepRun
from lifelong_jax.types import Example, Params, Task

SweepLearner: TypeAlias = Callable[[Sequence[SweepRun]], SweepAccuracies]
"""`learner(runs) -> accuracies`: `learn_sweep` with a method and a recipe."""

RUNS_PER_PROGRAM = 16  # on an accelerator, whose units a single small network leaves idle


def sweep_strengths(
    learners: Mapping[str, SweepLearner],
    strengths: Sequence[float],
    make_tasks: Callable[[jax.Array], Sequence[Task]],
    init_params: Callable[[jax.Array, Example], Params],
    seeds: Sequence[int],
    run: Run,
    console: rich.console.Console,
    *,
    split: str | None = None,
    score: Score = ACCURACY,
) -> dict[str, np.ndarray]:
    """Lets each learner learn the same sequences of tasks, one for each seed, at each strength, with a progress bar.

    A seed sets the tasks, the initial parameters and the shuffling, as in `compare`. On an accelerator, 16 runs are one
    program. On a CPU, where `vmap` removes no arithmetic, each run is a program, and as many run at once as there are
    cores, because a small network's steps are too short to share (`python -m benchmarks.sweep`). What is finished is
    logged, and is not computed again when the run is resumed.

    Args:
      learners: the learners by name.
      strengths: λ, for each learner.
      make_tasks: `make_tasks(key) -> tasks`.
      init_params: `init_params(key, x) -> params`, x one example's input, such as
        `functools.partial(init_network, model)`.
      seeds: integers.
      run: the run, for the log.
      console: where the progress bar is shown.
      split: the split's name in the log; "validation" if strengths are chosen by it.
      score: what the learners measure.

    Returns:
      Each learner's accuracy matrices, `[num_strengths, num_seeds, num_tasks, num_tasks]`; NaN where training diverged.

    Raises:
      ValueError: if there are no strengths or seeds, or two are equal in the log, which has three digits.
      KeyboardInterrupt: if the run is asked to stop, once the runs that have begun are finished and logged.
    """
    check_settings(distinct={"strengths": [f"{strength:.3g}" for strength in strengths], "seeds": seeds})
    runs_per_program = 1 if jax.default_backend() == "cpu" else RUNS_PER_PROGRAM
    start_of = functools.partial(start_of_seed, make_tasks, init_params, max_padding=math.inf)
    start_of = functools.lru_cache(maxsize=1)(start_of)
    matrices = {}
    with progress_bar(console) as bar:
        line = bar.add_task("", total=len(learners) * len(strengths) * len(seeds), status="")
        for name, learner in learners.items():
            start = time.perf_counter()
            sequences = {
                (seed, strength): ResumableSequence(
                    run, method=f"{name} {strength:.3g}", seed=seed, split=split, score=score.name
                )
                for seed in seeds
                for strength in strengths
            }
            measured = {place: sequence.result() for place, sequence in sequences.items()}
            bar.update(line, description=name, advance=sum(result is not None for result in measured.values()))
            # A resumed run has the same chunks: another number of runs in a program might round differently.
            chunks = (
                (chunk, [start_of(seed)._replace(strength=strength) for seed, strength in chunk])
                for chunk in _chunks(sequences, runs_per_program)
                if any(measured[place] is None for place in chunk)
            )
            begun = itertools.takewhile(lambda _: not run.stopping.is_set(), chunks)
            for (chunk, _), accuracies in map_as_finished(
                lambda c, learner=learner: learner(c[1]), begun, num_at_once()
            ):
                for index, place in enumerate(chunk):
                    if measured[place] is None:
                        measured[place] = {key: array[index] for key, array in accuracies._asdict().items()}
                        sequences[place].finish(**measured[place])
                        average = metrics.average_accuracy(measured[place]["accuracy_matrix"])
                        status = f"strength {place[1]:.3g}, seed {place[0]}: {score.name} {average:.3f}"
                        bar.update(line, advance=1, status=status)
            if run.stopping.is_set():
                raise KeyboardInterrupt
            of_learner = [[measured[seed, strength]["accuracy_matrix"] for seed in seeds] for strength in strengths]
            matrices[name] = np.array(of_learner)
            best = _at_best(average_accuracies(matrices[name]), strengths, score)
            console.print(f"{name}: {best}, in {time.perf_counter() - start:.0f} s", highlight=False)
    return matrices


def average_accuracies(matrices: np.ndarray) -> list[Estimate]:
    """Computes the average accuracy, or another score, at each strength, over seeds.

    Args:
      matrices: `[num_strengths, num_seeds, num_tasks, num_tasks]`.

    Returns:
      An estimate for each strength, NaN if a seed diverged.
    """
    return [estimate([metrics.average_accuracy(matrix) for matrix in of_strength]) for of_strength in matrices]


def choose_strengths(
    matrices: Mapping[str, np.ndarray],
    strengths: Sequence[float],
    run: Run,
    console: rich.console.Console,
    *,
    score: Score = ACCURACY,
) -> dict[str, float]:
    """Chooses each learner's strength by its average score; prints the table; writes `tuning.md` and `tuning.png`.

    Args:
      matrices: from `sweep_strengths`, on validation data.
      strengths: λ, ascending.
      run: the run, for the files.
      console: where the table is printed.
      score: what was measured.

    Returns:
      The best strength for each learner.

    Raises:
      SystemExit: if a learner diverged at every strength.
    """
    from lifelong_jax.plotting import plot_strength_sweep  # here, as matplotlib is slow to import

    averages = {name: average_accuracies(of_learner) for name, of_learner in matrices.items()}
    header = ["strength", *averages]
    rows = [
        [f"{strength:.3g}", *(format_score(of_learner[index], score) for of_learner in averages.values())]
        for index, strength in enumerate(strengths)
    ]
    title = f"Average {score.name} on validation data{', percent' * score.in_percent} (–: diverged)"
    print_table(console, title, header, rows)
    (run.folder / "tuning.md").write_text(markdown_table(header, rows), encoding="utf-8")
    curves = {name: [average.values for average in of_learner] for name, of_learner in averages.items()}
    measured = f"average validation {score.name}"
    figure = plot_strength_sweep({"": curves}, strengths, title, measured, score=score.name)
    figure.savefig(run.folder / "tuning.png")
    best = {name: best_strength(of_learner, strengths, name, score) for name, of_learner in averages.items()}
    for name, strength in best.items():
        warn_at_edge(name, strength, strengths, console)
    return best


def warn_at_edge(name: str, strength: float, strengths: Sequence[float], console: rich.console.Console) -> None:
    """Prints a warning if a chosen strength is the lowest or the highest of several.

    Args:
      name: the learner's name.
      strength: the one that was chosen.
      strengths: those that were compared.
      console: where the warning is printed.

    Example:
      >>> warn_at_edge("ewc", 10.0, [1.0, 10.0], rich.console.Console())
      warning: ewc: 10 is the highest strength that was compared; a higher one may be better
    """
    for edge, which in ((min(strengths), "lowest"), (max(strengths), "highest")):
        if strength == edge and len(strengths) > 1:
            comparative = f"{which.removesuffix('est')}er"
            text = f"warning: {name}: {strength:.3g} is the {which} strength that was compared; a {comparative} one"
            console.print(f"{text} may be better", highlight=False, soft_wrap=True)


def best_strength(
    averages: Sequence[Estimate], strengths: Sequence[float], name: str = "training", score: Score = ACCURACY
) -> float:
    """Chooses the strength at which the score is best.

    Args:
      averages: from `average_accuracies`, on validation data.
      strengths: λ.
      name: the learner's name, for the message.
      score: what was measured.

    Returns:
      One of the strengths at which training did not diverge.

    Raises:
      SystemExit: if it diverged at every strength.

    Example:
      >>> best_strength([estimate([0.5]), estimate([0.7]), estimate([np.nan])], [1.0, 10.0, 100.0])
      10.0
    """
    best = _best(averages, score)
    if best is None:
        raise SystemExit(f"error: {name} diverged at every strength: lower the learning rate.")
    return float(strengths[best])


def _best(averages: Sequence[Estimate], score: Score) -> int | None:
    means = np.array([average.mean for average in averages])
    if np.isnan(means).all():
        return None
    return int(np.nanargmax(means) if score.higher_is_better else np.nanargmin(means))


def _at_best(averages: Sequence[Estimate], strengths: Sequence[float], score: Score) -> str:
    best = _best(averages, score)
    if best is None:
        return "diverged at every strength"
    shown = f"{score.name} {format_score(averages[best], score)}{' %' * score.in_percent}"
    return f"average {shown} at strength {strengths[best]:.3g}"


def _chunks(places: Iterable[tuple[int, float]], size: int) -> Iterator[tuple[tuple[int, float], ...]]:
    iterator = iter(places)
    return iter(lambda: tuple(itertools.islice(iterator, size)), ())
