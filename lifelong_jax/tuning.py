"""Many runs of a sequence of tasks, strengths by seeds, and the choice of the best strength on validation data."""

import functools
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
import rich.console

from lifelong_jax import metrics
from lifelong_jax.plotting import plot_strength_sweep
from lifelong_jax.resuming import ResumableSequence
from lifelong_jax.runs import (
    Estimate,
    Run,
    check_settings,
    estimate,
    format_estimate,
    markdown_table,
    print_table,
    progress_bar,
)
from lifelong_jax.sweep import SweepAccuracies, SweepRun
from lifelong_jax.types import Example, Params, Task

SweepLearner: TypeAlias = Callable[[Sequence[SweepRun]], SweepAccuracies]
"""`learner(runs) -> accuracies`: `learn_sweep`, all else filled in."""

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
) -> dict[str, np.ndarray]:
    """Lets each learner learn the same sequences of tasks, one for each seed, at each strength, with a progress bar.

    A seed sets the tasks, the initial parameters and the shuffling, as in `compare`. On an accelerator, 16 runs are one
    program. On a CPU, where `vmap` removes no arithmetic, the program is one run's, and as many run at once as there
    are cores: a small network's steps are too short to share (`benchmarks/sweep.py`). They run in threads, where
    `jax.config` holds, and no `with jax.enable_x64(...)` or the like. What is finished is logged, and is not computed
    again when the run is resumed.

    Args:
      learners: by name.
      strengths: λ, for each learner.
      make_tasks: `make_tasks(key) -> tasks`.
      init_params: `init_params(key, x) -> params`, x one example's input: `functools.partial(init_network, model)`,
        say.
      seeds: integers.
      run: where each sequence is logged.
      console: where the progress bar is shown.
      split: what the log calls it; "validation" where strengths are chosen.

    Returns:
      For each learner, the accuracy matrices, `[num_strengths, num_seeds, num_tasks, num_tasks]`; NaN where training
      diverged.

    Raises:
      ValueError: if there are no strengths or seeds, or one stands twice; in the log, a strength has three digits.
      KeyboardInterrupt: if the run is asked to stop, once the runs that have begun are finished and logged.
    """
    check_settings(distinct={"strengths": [f"{strength:.3g}" for strength in strengths], "seeds": seeds})
    on_cpu = jax.default_backend() == "cpu"
    runs_per_program = 1 if on_cpu else RUNS_PER_PROGRAM
    at_once = _num_cores() if on_cpu else 1
    start_of = functools.lru_cache(maxsize=1)(functools.partial(_start, make_tasks, init_params))
    matrices = {}
    with progress_bar(console) as bar:
        line = bar.add_task("", total=len(learners) * len(strengths) * len(seeds), status="")
        for name, learner in learners.items():
            start = time.perf_counter()
            sequences = {
                (seed, strength): ResumableSequence(run, method=f"{name} {strength:.3g}", seed=seed, split=split)
                for seed in seeds
                for strength in strengths
            }
            measured = {place: sequence.result() for place, sequence in sequences.items()}
            bar.update(line, description=name, advance=sum(result is not None for result in measured.values()))
            # Chunks stay the same when the run is resumed: another number of runs at once might round differently.
            chunks = (
                (chunk, [start_of(seed)._replace(strength=strength) for seed, strength in chunk])
                for chunk in _chunks(sequences, runs_per_program)
                if any(measured[place] is None for place in chunk)
            )
            begun = itertools.takewhile(lambda _: not run.stopping.is_set(), chunks)
            for chunk, accuracies in _as_finished(learner, begun, at_once):
                for index, place in enumerate(chunk):
                    if measured[place] is None:
                        measured[place] = {key: array[index] for key, array in accuracies._asdict().items()}
                        sequences[place].finish(**measured[place])
                        accuracy = metrics.average_accuracy(measured[place]["accuracy_matrix"])
                        status = f"strength {place[1]:.3g}, seed {place[0]}: accuracy {accuracy:.3f}"
                        bar.update(line, advance=1, status=status)
            if run.stopping.is_set():
                raise KeyboardInterrupt
            of_learner = [[measured[seed, strength]["accuracy_matrix"] for seed in seeds] for strength in strengths]
            matrices[name] = np.array(of_learner)
            best = _at_best(average_accuracies(matrices[name]), strengths)
            console.print(f"{name}: {best}, in {time.perf_counter() - start:.0f} s", highlight=False)
    return matrices


def average_accuracies(matrices: np.ndarray) -> list[Estimate]:
    """Computes the average accuracy at each strength, over seeds.

    Args:
      matrices: `[num_strengths, num_seeds, num_tasks, num_tasks]`.

    Returns:
      An estimate for each strength, of NaN where a seed diverged.
    """
    return [estimate([metrics.average_accuracy(matrix) for matrix in of_strength]) for of_strength in matrices]


def choose_strengths(
    matrices: Mapping[str, np.ndarray], strengths: Sequence[float], run: Run, console: rich.console.Console
) -> dict[str, float]:
    """Chooses each learner's strength by its average accuracy; prints the table; writes `tuning.md` and `tuning.png`.

    Args:
      matrices: from `sweep_strengths`, on validation data.
      strengths: λ, ascending.
      run: where the files go.
      console: where the table is printed.

    Returns:
      The best strength for each learner.

    Raises:
      SystemExit: if a learner diverged at every strength.
    """
    accuracies = {name: average_accuracies(of_learner) for name, of_learner in matrices.items()}
    header = ["strength", *accuracies]
    rows = [
        [f"{strength:.3g}", *(format_estimate(of_learner[index], 100) for of_learner in accuracies.values())]
        for index, strength in enumerate(strengths)
    ]
    title = "Average accuracy on validation data, percent (–: diverged)"
    print_table(console, title, header, rows)
    (run.folder / "tuning.md").write_text(markdown_table(header, rows))
    plot_strength_sweep({"": accuracies}, strengths, "Average accuracy on validation data", run.folder / "tuning.png")
    return {name: best_strength(of_learner, strengths, name) for name, of_learner in accuracies.items()}


def best_strength(accuracies: Sequence[Estimate], strengths: Sequence[float], name: str = "training") -> float:
    """Chooses the strength at which the accuracy is best.

    Args:
      accuracies: from `average_accuracies`, on validation data.
      strengths: λ.
      name: of what learned.

    Returns:
      One of the strengths, none at which it diverged.

    Raises:
      SystemExit: if it diverged at every one.

    Example:
      >>> best_strength([estimate([0.5]), estimate([0.7]), estimate([np.nan])], [1.0, 10.0, 100.0])
      10.0
    """
    best = _best(accuracies)
    if best is None:
        raise SystemExit(f"error: {name} diverged at every strength: lower the learning rate.")
    return float(strengths[best])


def _num_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best(accuracies: Sequence[Estimate]) -> int | None:
    means = np.array([accuracy.mean for accuracy in accuracies])
    return None if np.isnan(means).all() else int(np.nanargmax(means))


def _at_best(accuracies: Sequence[Estimate], strengths: Sequence[float]) -> str:
    best = _best(accuracies)
    if best is None:
        return "diverged at every strength"
    return f"average accuracy {format_estimate(accuracies[best], 100)} % at strength {strengths[best]:.3g}"


def _start(
    make_tasks: Callable[[jax.Array], Sequence[Task]], init_params: Callable[[jax.Array, Example], Params], seed: int
) -> SweepRun:
    tasks_key, params_key, learning_key = jax.random.split(jax.random.key(seed), 3)
    tasks = make_tasks(tasks_key)
    return SweepRun(init_params(params_key, tasks[0].train.inputs[0]), tasks, learning_key, 0.0)


def _chunks(places: Iterable[tuple[int, float]], size: int) -> Iterator[tuple[tuple[int, float], ...]]:
    iterator = iter(places)
    return iter(lambda: tuple(itertools.islice(iterator, size)), ())


def _as_finished(
    learner: SweepLearner, chunks: Iterable[tuple[tuple[tuple[int, float], ...], Sequence[SweepRun]]], at_once: int
) -> Iterator[tuple[tuple[tuple[int, float], ...], SweepAccuracies]]:
    """Yields each chunk's places with their accuracies, in the order in which chunks finish, some of them at once."""
    finished: queue.SimpleQueue = queue.SimpleQueue()

    def learn(places: tuple[tuple[int, float], ...], runs: Sequence[SweepRun]) -> None:
        try:
            finished.put((places, learner(runs), None))
        except Exception as error:  # of any kind: it is raised again where it is seen
            finished.put((places, None, error))

    running = 0
    for chunk in itertools.chain(chunks, itertools.repeat(None)):
        if chunk is None and running == 0:
            return
        if chunk is not None:
            # Daemons: after an error, or a second Ctrl-C, the process is not to wait for what else runs.
            threading.Thread(target=learn, args=chunk, daemon=True).start()
            running += 1
        if chunk is None or running == at_once:
            places, accuracies, error = finished.get()
            running -= 1
            if error is not None:
                raise error
            yield places, accuracies
