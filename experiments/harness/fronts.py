"""The losses on two texts after fine-tuning on the second: a front for each method, over its strengths."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Trial(NamedTuple):
    """A point of a front.

    Attributes:
      method: its name.
      strength: λ, or None for a method without.
    """

    method: str
    strength: float | None = None

    @property
    def name(self) -> str:
        """As files and tables write it."""
        return self.method if self.strength is None else f"{self.method} {self.strength:g}"


FROZEN, FINETUNE, JOINT = Trial("frozen"), Trial("finetune"), Trial("joint")
"""The model before; after fine-tuning without a penalty; after training on both texts."""


def fronts_of(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Groups trials by method.

    Args:
      trials: of any methods.

    Returns:
      Those that have a strength, for each method.

    Example:
      >>> fronts_of([FROZEN, Trial("ewc", 1.0), Trial("ewc", 10.0)])["ewc"][1].name
      'ewc 10'
    """
    fronts: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.strength is not None:
            fronts.setdefault(trial.method, []).append(trial)
    return fronts


def best_of(front: Sequence[Trial], losses: Mapping[Trial, np.ndarray]) -> Trial:
    """Chooses a strength: that of the lowest mean loss over both texts.

    Args:
      front: the trials of a method.
      losses: `[num_seeds, 2]` for each trial, the loss on A and on B, on validation examples.

    Returns:
      The trial.

    Example:
      >>> front = [Trial("ewc", 1.0), Trial("ewc", 10.0)]
      >>> best_of(front, {front[0]: np.array([[2.0, 1.0]]), front[1]: np.array([[1.5, 1.2]])}).strength
      10.0
    """
    return min(front, key=lambda trial: np.mean(losses[trial]))


def rise_at_half(front: Sequence[Trial], losses: Mapping[Trial, np.ndarray]) -> np.ndarray:
    """Computes how much the loss on A has risen where half of the gain on B is reached.

    A front goes from the frozen model, at infinite strength, to fine-tuning, at strength 0. It is a straight line
    between neighbouring trials.

    Args:
      front: the trials of a method.
      losses: `[num_seeds, 2]` for each trial, with `FROZEN` and `FINETUNE`: the loss on A and on B.

    Returns:
      `[num_seeds]`, in the unit of the losses.

    Example:
      >>> losses = {FROZEN: np.array([[1.0, 3.0]]), FINETUNE: np.array([[2.0, 1.0]]), Trial("ewc", 1.0): [[1.1, 2.0]]}
      >>> rise_at_half([Trial("ewc", 1.0)], losses).round(3)
      array([0.1])
    """
    points = np.stack([np.asarray(losses[trial]) for trial in (FROZEN, *front, FINETUNE)])
    half = (points[0, :, 1] + points[-1, :, 1]) / 2
    rises = []
    for seed, goal in enumerate(half):
        a, b = points[np.argsort(points[:, seed, 1]), seed].T
        rises.append(np.interp(goal, b, a) - points[0, seed, 0])
    return np.array(rises)


def draw_fronts(losses: Mapping[Trial, np.ndarray], title: str) -> Any:
    """Draws the loss on B against that on A: a line for each method.

    Args:
      losses: as for `rise_at_half`. Points are means over seeds.
      title: of the figure.

    Returns:
      The figure. The legend has the fronts in the order of their rise at half of B's gain.
    """
    from lifelong_jax.plotting import COLORS, make_figure  # here, as matplotlib is slow to import

    mean = {trial: np.mean(of_seeds, axis=0) for trial, of_seeds in losses.items()}
    fronts = fronts_of(losses)
    rise = {method: rise_at_half(front, losses).mean() for method, front in fronts.items()}
    figure = make_figure(6.6, 4.6, title)
    axis = figure.subplots()
    axis.axhline((mean[FROZEN][1] + mean[FINETUNE][1]) / 2, color="0.85", linewidth=0.8, zorder=0)
    for color, method in zip(COLORS, sorted(fronts, key=lambda method: rise[method]), strict=False):
        inner = sorted((mean[trial] for trial in fronts[method]), key=lambda point: -point[1])
        points = np.array([mean[FROZEN], *inner, mean[FINETUNE]])
        axis.plot(*points.T, color=color, linewidth=1, alpha=0.6)
        axis.plot(*points[1:-1].T, "o", color=color, markersize=4, label=f"{method}: +{rise[method]:.3f}")
    for trial, marker in {FROZEN: "s", FINETUNE: "D", JOINT: "*"}.items():
        if trial in mean:
            axis.plot(*mean[trial], marker, color="0.3", label=trial.name)
    axis.set(xlabel="loss per token on A, nats", ylabel="loss per token on B, nats")
    axis.legend(frameon=False, fontsize=9, title="rise of A at half of B's gain", title_fontsize=9)
    return figure
