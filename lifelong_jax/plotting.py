"""Pictures of what was learned and what was forgotten. One style for all of them."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from lifelong_jax.runs import Estimate

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which people with any colour vision can tell apart."""


def plot_accuracy_curves(
    curves: Mapping[str, np.ndarray],
    task_names: Sequence[str],
    epochs_per_task: int,
    title: str,
    file: str | pathlib.Path,
) -> None:
    """Draws each task's test accuracy as the sequence is learned, methods side by side.

    Lines are means over seeds, bands one standard error to both sides.

    Args:
      curves: for each method, `[num_seeds, num_epochs, num_tasks]`: fractions after each epoch of the whole sequence;
        NaN before a task's turn.
      task_names: the tasks' names, in their order.
      epochs_per_task: how many epochs each task is learned for.
      title: above the picture.
      file: where the PNG goes.
    """
    num_epochs = next(iter(curves.values())).shape[1]
    epochs = np.arange(1, num_epochs + 1)
    figure = make_figure(2.0 * len(curves) + 0.6, 2.7, title)
    axes = figure.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (method, accuracy) in zip(axes, curves.items(), strict=True):
        for task, name in enumerate(task_names):
            draw_over_seeds(axis, epochs, accuracy[:, :, task], COLORS[task % len(COLORS)], name)
        for boundary in range(1, len(task_names)):
            axis.axvline(boundary * epochs_per_task, color="0.85", linewidth=0.8, zorder=0)
        axis.set_title(method)
        axis.set_xlabel("epochs, all tasks")
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("test accuracy")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(task_names), 7), frameon=False)
    figure.savefig(file)


def plot_accuracy_matrices(
    matrices: Mapping[str, np.ndarray], task_names: Sequence[str], title: str, file: str | pathlib.Path
) -> None:
    """Draws each method's accuracy matrix: a row for each task learned, a column for each task tested.

    Args:
      matrices: for each method, `[num_tasks, num_tasks]`, fractions, means over seeds; NaN where not measured.
      task_names: the tasks' names, in their order.
      title: above the picture.
      file: where the PNG goes.
    """
    num_tasks = len(task_names)
    names = [name.removeprefix("task ") for name in task_names]
    longest = max(map(len, names))
    figure = make_figure(2.0 * len(matrices) + 0.9 + 0.07 * longest, 2.7 + 0.05 * longest, title)
    axes = figure.subplots(1, len(matrices), sharex=True, sharey=True, squeeze=False)[0]
    ticks = range(0, num_tasks, 1 + num_tasks // 11)
    for axis, (method, matrix) in zip(axes, matrices.items(), strict=True):
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis", extent=(0.5, num_tasks + 0.5, num_tasks + 0.5, 0.5))
        if num_tasks <= 6:
            for (row, column), accuracy in np.ndenumerate(matrix):
                if np.isfinite(accuracy):
                    shade = "black" if accuracy > 0.5 else "white"
                    text = f"{100 * accuracy:.0f}"
                    axis.text(column + 1, row + 1, text, ha="center", va="center", color=shade, fontsize=8)
        axis.set_title(method)
        axis.set_xlabel("tested on task")
        rotation = {"rotation": 30, "ha": "right"} if longest > 4 else {}
        axis.set_xticks([tick + 1 for tick in ticks], [names[tick] for tick in ticks], **rotation)
        axis.set_yticks([tick + 1 for tick in ticks], [names[tick] for tick in ticks])
    axes[0].set_ylabel("after learning task")
    figure.colorbar(image, ax=list(axes), label="test accuracy", shrink=0.8)
    figure.savefig(file)


def plot_strength_sweep(
    accuracies: Mapping[str, Mapping[str, Sequence[Estimate]]],
    strengths: Sequence[float],
    title: str,
    file: str | pathlib.Path,
) -> None:
    """Draws average accuracy against the penalty's strength: a panel for each optimiser, a line for each place.

    Lines are means over seeds, bands one standard error to both sides; a cross at the foot marks a strength at which
    training diverged for some seed.

    Args:
      accuracies: for each optimiser and each place of the penalty, an estimate for each strength: a fraction, NaN where
        training diverged.
      strengths: λ, ascending.
      title: above the picture.
      file: where the PNG goes.
    """
    figure = make_figure(3.6 * len(accuracies) + 0.6, 3.2, title)
    axes = figure.subplots(1, len(accuracies), sharex=True, sharey=True, squeeze=False)[0]
    places = list(dict.fromkeys(place for lines in accuracies.values() for place in lines))
    for axis, (optimizer, lines) in zip(axes, accuracies.items(), strict=True):
        for place, estimates in lines.items():
            index = places.index(place)
            mean, error = (np.array([getattr(e, field) for e in estimates]) for field in ("mean", "stderr"))
            style = {"color": COLORS[index], "linestyle": ("-", "--", "-.", ":")[index % 4]}
            axis.plot(strengths, mean, linewidth=1.6, label=place, **style)
            axis.fill_between(strengths, mean - error, mean + error, color=COLORS[index], alpha=0.2, linewidth=0)
            diverged = np.isnan(mean)
            heights = np.full(diverged.sum(), 0.02 + 0.035 * index)
            axis.plot(np.array(strengths)[diverged], heights, "x", markersize=5, color=COLORS[index])
        axis.set_title(optimizer)
        axis.set_xscale("log")
        axis.set_xlabel("strength λ (crosses: diverged)")
        axis.set_ylim(0, 1.02)
    axes[0].set_ylabel("average accuracy, all tasks")
    handles = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file)


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that notebooks show, where it is a cell's last expression."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.savefig(file, dpi=100)
            return file.getvalue()


def make_figure(width: float, height: float, title: str = "") -> Figure:
    """Makes a figure in this module's style, for a picture of one's own: `figure.savefig(file)`; notebooks show it.

    Args:
      width: in inches; 8.6 fills a page of text, with readable letters.
      height: in inches.
      title: above the picture: what it shows.

    Returns:
      The figure, whose `subplots` are laid out without overlap.
    """
    # Not by pyplot: it would choose a backend, and keep every figure in memory.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def draw_over_seeds(axis: Axes, x: ArrayLike, values: ArrayLike, color: str, label: str, **style: Any) -> None:
    """Draws the mean over seeds as a line, with a band of one standard error to both sides.

    Args:
      axis: where.
      x: `[num_points]`.
      values: `[num_seeds, num_points]`; points where a seed is NaN are left out.
      color: of both.
      label: in the legend.
      **style: of the line, such as `linestyle` or `marker`.
    """
    x, values = np.asarray(x), np.asarray(values, np.float64)
    measured = np.isfinite(values).all(axis=0)
    x, values = x[measured], values[:, measured]
    mean = values.mean(axis=0)
    axis.plot(x, mean, color=color, label=label, **{"linewidth": 1.4, **style})
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(x, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)


def draw_image(axis: Axes, image: ArrayLike, title: str = "") -> None:
    """Draws a number for each pixel: the importance of what a first layer does with it, say. Bright is much.

    Args:
      axis: where.
      image: `[height, width]`, not negative; black is 0 and the brightest pixel its maximum.
      title: above it.
    """
    axis.imshow(image, cmap="cividis", vmin=0)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def draw_low_loss(
    axis: Axes, first: ArrayLike, second: ArrayLike, losses: ArrayLike, levels: Sequence[float], color: str
) -> None:
    """Draws the regions of a plane in which a loss is low, the lower the darker.

    Args:
      axis: where.
      first: `[num_columns]`, the grid's first coordinates.
      second: `[num_rows]`, its second coordinates.
      losses: `[num_rows, num_columns]`; see `geometry.loss_on_plane`.
      levels: losses, ascending; where it is above the last, nothing is drawn.
      color: of the task.
    """
    alphas = np.linspace(0.45, 0.15, len(levels))
    for alpha, low, high in zip(alphas, [-np.inf, *levels], levels, strict=False):
        axis.contourf(first, second, losses, levels=[low, high], colors=[color], alpha=alpha)
    axis.contour(first, second, losses, levels=levels, colors=[color], linewidths=1)
