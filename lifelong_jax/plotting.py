"""Figures of what was learned and what was forgotten, all in one style.

Each function takes arrays and makes a figure: `figure.savefig("curves.png")` writes it, and a notebook shows it. The
`draw_` functions draw into the axes of a figure of your own, from `make_figure`.

Accuracies are fractions, and are drawn in percent. Another score is drawn likewise in its own unit; its name is that of
an `Objective`, `objective.score`.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lifelong_jax._extras import needs_extra

with needs_extra("plotting"):
    import matplotlib.figure
    from matplotlib.axes import Axes
    from matplotlib.ticker import MaxNLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, whose colours can be told apart with any colour vision."""


_ONE_LINE = 0.22  # inches, of a title or a legend
_TOP = 102  # of an axis in percent, so that a line at 100 is seen


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that a notebook shows if it is the last expression of a cell."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.savefig(file, dpi=100)
            return file.getvalue()


def plot_accuracy_curves(
    curves: Mapping[str, ArrayLike],
    task_names: Sequence[str],
    epochs_per_task: int,
    title: str,
    *,
    score: str = "accuracy",
) -> Figure:
    """Plots each task's test accuracy while the sequence is learned: one panel per method.

    Lines are means over seeds. Bands are one standard error wide on each side.

    Args:
      curves: for each method, `[num_seeds, num_epochs, num_tasks]`, the score after each epoch of the whole sequence;
        NaN where a task was not tested.
      task_names: the tasks' names, in the order of learning.
      epochs_per_task: the number of epochs for which each task is learned.
      title: shown above the panels.
      score: the name of the score. Accuracies are drawn in percent, other scores in their own unit.

    Returns:
      The figure.

    Example:
      >>> curves = {"EWC": np.ones((3, 4, 2))}
      >>> len(plot_accuracy_curves(curves, ["first", "second"], epochs_per_task=2, title="Two tasks").axes)
      1
    """
    factor, unit = _factor_and_unit(score)
    num_epochs = np.shape(next(iter(curves.values())))[1]
    epochs = np.arange(1, num_epochs + 1)
    figure = make_figure(2.0 * max(len(curves), 2) + 0.6, 2.7, title)
    axes = figure.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (method, curve) in zip(axes, curves.items(), strict=True):
        for task, name in enumerate(task_names):
            draw_over_seeds(axis, epochs, factor * np.asarray(curve)[:, :, task], COLORS[task % len(COLORS)], name)
        for boundary in range(1, len(task_names)):
            axis.axvline(boundary * epochs_per_task, color="0.85", linewidth=0.8, zorder=0)
        axis.set_title(method)
        axis.set_xlabel("epochs, all tasks")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _set_limits(axes[0], score)
    axes[0].set_ylabel(f"test {score}{unit}")
    handles, labels = axes[0].get_legend_handles_labels()
    _draw_legend_below(figure, dict(zip(labels, handles, strict=True)))
    return figure


def plot_accuracy_matrices(
    matrices: Mapping[str, ArrayLike],
    task_names: Sequence[str],
    title: str,
    *,
    score: str = "accuracy",
    higher_is_better: bool = True,
) -> Figure:
    """Plots each method's accuracy matrix: a row for each task learned, a column for each task tested. Bright is good.

    Args:
      matrices: for each method, `[num_tasks, num_tasks]`, such as means over seeds; NaN where a task was not tested.
      task_names: the tasks' names, in the order of learning.
      title: shown above the panels.
      score: the name of the score. Accuracies are drawn in percent, other scores in their own unit.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      The figure.

    Example:
      >>> figure = plot_accuracy_matrices({"EWC": np.eye(2)}, ["first", "second"], "Two tasks")
      >>> [axis.get_title() for axis in figure.axes]  # the second is the colour bar
      ['EWC', '']
    """
    factor, unit = _factor_and_unit(score)
    scaled = {method: factor * np.asarray(matrix, np.float64) for method, matrix in matrices.items()}
    low, high = (0, 100) if score == "accuracy" else _range(scaled.values())
    colors = {"cmap": "cividis" if higher_is_better else "cividis_r", "vmin": low, "vmax": high}
    num_tasks = len(task_names)
    names = [name.removeprefix("task ") for name in task_names]
    longest = max(map(len, names))
    figure = make_figure(2.0 * max(len(matrices), 2) + 0.9 + 0.07 * longest, 2.7 + 0.05 * longest, title)
    figure.set_layout_engine("compressed")  # panels are squares, whatever the figure's shape
    axes = figure.subplots(1, len(matrices), sharex=True, sharey=True, squeeze=False)[0]
    ticks = range(0, num_tasks, 1 + num_tasks // 11)
    for axis, (method, matrix) in zip(axes, scaled.items(), strict=True):
        image = axis.imshow(matrix, extent=(0.5, num_tasks + 0.5, num_tasks + 0.5, 0.5), **colors)
        if num_tasks <= 6:
            digits = max(0, 2 - int(np.log10(max(1, abs(low), abs(high)))))  # three in all, where there is a point
            _write_numbers(axis, matrix, digits, lambda number: (number > (low + high) / 2) == higher_is_better)
        axis.set_title(method)
        axis.set_xlabel("tested on task")
        rotation = {"rotation": 30, "ha": "right"} if longest > 4 else {}
        axis.set_xticks([tick + 1 for tick in ticks], [names[tick] for tick in ticks], **rotation)
        axis.set_yticks([tick + 1 for tick in ticks], [names[tick] for tick in ticks])
    axes[0].set_ylabel("after learning task")
    fraction = 0.15 / len(matrices)  # of the width of all panels
    figure.colorbar(image, ax=list(axes), label=f"test {score}{unit}", fraction=fraction, pad=fraction, shrink=0.8)
    return figure


def plot_average_accuracy(matrices: Mapping[str, ArrayLike], title: str, *, score: str = "accuracy") -> Figure:
    """Plots the average accuracy on the tasks learned so far against their number, one line per method.

    Lines are means over seeds. Bands are one standard error wide on each side. A method of which only the last row is
    measured, joint training on all tasks, has a dashed line.

    Args:
      matrices: for each method, accuracy matrices `[num_seeds, num_tasks, num_tasks]`; NaN where not measured.
      title: shown above the plot.
      score: the name of the score. Accuracies are drawn in percent, other scores in their own unit.

    Returns:
      The figure.

    Example:
      >>> figure = plot_average_accuracy({"ewc": [[[0.9, 0.1], [0.7, 0.9]]]}, "Two tasks")
      >>> figure.axes[0].get_lines()[0].get_ydata().tolist()
      [90.0, 80.0]
    """
    factor, unit = _factor_and_unit(score)
    figure = make_figure(6.4, 3.6, title)
    axis = figure.subplots()
    for index, (name, of_method) in enumerate(matrices.items()):
        of_seeds = factor * np.asarray(of_method, np.float64)
        num_tasks = of_seeds.shape[-1]
        numbers = np.arange(1, num_tasks + 1)
        averages = np.stack([of_seeds[:, row, : row + 1].mean(axis=-1) for row in range(num_tasks)], axis=-1)
        color = COLORS[index % len(COLORS)]
        if np.isnan(averages[:, :-1]).all() and num_tasks > 1:
            draw_over_seeds(axis, [1, num_tasks], averages[:, [-1, -1]], color, name, linestyle="--")
        else:
            draw_over_seeds(axis, numbers, averages, color, name, marker="o", markersize=3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("tasks learned")
    axis.set_ylabel(f"average {score} on them{unit}")
    _set_limits(axis, score)
    axis.legend(frameon=False, fontsize=9)
    return figure


def plot_strength_sweep(
    accuracies: Mapping[str, Mapping[str, ArrayLike]],
    strengths: Sequence[float],
    title: str,
    measured: str = "average accuracy",
    *,
    score: str = "accuracy",
) -> Figure:
    """Plots an accuracy against the penalty's strength: one panel per optimiser, one line per place of the penalty.

    Lines are means over seeds. Bands are one standard error wide on each side. A cross near the horizontal axis marks
    a strength at which training diverged for some seed.

    Args:
      accuracies: for each optimiser, and for each place of the penalty in its pipeline, `[num_strengths, num_seeds]`;
        NaN where training diverged.
      strengths: `[num_strengths]`, λ in ascending order.
      title: shown above the panels.
      measured: what the accuracies are, such as "validation accuracy", for the vertical axis.
      score: the name of the score. Accuracies are drawn in percent, other scores in their own unit.

    Returns:
      The figure.

    Example:
      >>> accuracies = {"sgd": {"coupled": [[0.8, 0.9], [0.7, np.nan]], "proximal": [[0.8, 0.9], [0.8, 0.8]]}}
      >>> figure = plot_strength_sweep(accuracies, [1.0, 10.0], "Two strengths, two seeds")
      >>> [text.get_text() for text in figure.legends[0].get_texts()]
      ['coupled', 'proximal']
    """
    factor, unit = _factor_and_unit(score)
    figure = make_figure(max(3.6 * len(accuracies), 5.4) + 0.6, 3.2, title)
    axes = figure.subplots(1, len(accuracies), sharex=True, sharey=True, squeeze=False)[0]
    places = list(dict.fromkeys(place for by_place in accuracies.values() for place in by_place))
    for axis, (optimizer, by_place) in zip(axes, accuracies.items(), strict=True):
        for place, accuracy in by_place.items():
            index = places.index(place)
            mean, error = _over_seeds(factor * np.transpose(accuracy))
            style = {"color": COLORS[index], "linestyle": ("-", "--", "-.", ":")[index % 4]}
            axis.plot(strengths, mean, linewidth=1.6, marker="o", markersize=3, label=place, **style)
            axis.fill_between(strengths, mean - error, mean + error, color=COLORS[index], alpha=0.2, linewidth=0)
            diverged = np.isnan(mean)
            crosses = np.array(strengths)[diverged], np.full(diverged.sum(), (2 + 3.5 * index) / _TOP)
            of_height = axis.get_xaxis_transform()  # 1 is the top of the panel
            axis.plot(*crosses, "x", markersize=5, color=COLORS[index], transform=of_height)
        axis.set_title(optimizer)
        axis.set_xscale("log")
        axis.set_xlabel("strength λ (crosses: diverged)")
    _set_limits(axes[0], score)
    axes[0].set_ylabel(f"{measured}{unit}")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    _draw_legend_below(figure, handles)
    return figure


def make_figure(width: float, height: float, title: str = "") -> Figure:
    """Makes an empty figure in this module's style.

    Args:
      width: in inches; at 8.6 the figure fills the width of a page and its text stays readable.
      height: in inches, with a title of one line; further lines are added to it.
      title: shown above the panels, on as many lines as it needs.

    Returns:
      The figure, with a layout in which its `subplots` do not overlap.

    Example:
      >>> axis = make_figure(5, 3, "One panel").subplots()
    """
    # pyplot would choose a backend, and keep every figure in memory.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    if title:
        inches = figure.suptitle(title, fontsize=11, wrap=True).get_window_extent().height / figure.dpi
        figure.set_figheight(height + max(0.0, inches - _ONE_LINE))
    return figure


def draw_over_seeds(axis: Axes, x: ArrayLike, values: ArrayLike, color: str, label: str, **style: Any) -> None:
    """Draws the mean over seeds as a line, with a band of one standard error on each side.

    A single point has a marker, and a bar in place of the band.

    Args:
      axis: where to draw.
      x: `[num_points]`.
      values: `[num_seeds, num_points]`; a point is left out if any seed is NaN or infinite there.
      color: of the line and the band.
      label: in the legend.
      **style: of the line, such as `linestyle` or `marker`.
    """
    x, values = np.asarray(x), np.asarray(values, np.float64)
    measured = np.isfinite(values).all(axis=0)
    mean, error = _over_seeds(values[:, measured])
    single = measured.sum() == 1
    marked = {"marker": "o", "markersize": 4} if single else {}
    axis.plot(x[measured], mean, color=color, label=label, **{"linewidth": 1.4, **marked, **style})
    if len(values) > 1 and single:
        axis.vlines(x[measured], mean - error, mean + error, color=color, alpha=0.5)
    elif len(values) > 1:
        axis.fill_between(x[measured], mean - error, mean + error, color=color, alpha=0.25, linewidth=0)


def draw_image(axis: Axes, image: ArrayLike, title: str = "") -> None:
    """Draws an image of numbers, such as the importance of each pixel's weights in a first layer. Bright is high.

    Args:
      axis: where to draw.
      image: `[height, width]`, not negative; 0 is dark, and the maximum is brightest.
      title: shown above the image.
    """
    axis.imshow(image, cmap="cividis", vmin=0)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)


def draw_low_loss(
    axis: Axes, first: ArrayLike, second: ArrayLike, losses: ArrayLike, levels: Sequence[float], color: str
) -> None:
    """Draws the regions of a plane in which a loss is low. The lower the loss, the stronger the colour.

    Args:
      axis: where to draw.
      first: `[num_columns]`, the grid's first coordinates.
      second: `[num_rows]`, the grid's second coordinates.
      losses: `[num_rows, num_columns]`, from `geometry.loss_on_plane`.
      levels: losses in ascending order; nothing is drawn where the loss is above the last level.
      color: of the regions.
    """
    alphas = np.linspace(0.45, 0.15, len(levels))
    for alpha, low, high in zip(alphas, [-np.inf, *levels], levels, strict=False):
        axis.contourf(first, second, losses, levels=[low, high], colors=[color], alpha=alpha)
    axis.contour(first, second, losses, levels=levels, colors=[color], linewidths=1)


def _over_seeds(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis; the error of a single seed is NaN."""
    values = np.asarray(values, np.float64)
    mean = values.mean(axis=0)
    if len(values) == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, values.std(axis=0, ddof=1) / np.sqrt(len(values))


def _factor_and_unit(score: str) -> tuple[float, str]:
    return (100.0, ", %") if score == "accuracy" else (1.0, "")


def _set_limits(axis: Axes, score: str) -> None:
    """Of the panels that share this axis."""
    if score == "accuracy":
        axis.set_ylim(0, _TOP)


def _range(matrices: Iterable[np.ndarray]) -> tuple[float, float]:
    measured = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    return (float(measured.min()), float(measured.max())) if measured.size else (0.0, 1.0)


def _draw_legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    inches = 0.7 + 0.09 * max(map(len, handles))  # of the widest entry
    ncols = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    num_rows = -(-len(handles) // ncols)
    figure.set_figheight(figure.get_figheight() + _ONE_LINE * (num_rows - 1))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=ncols, frameon=False)


def _write_numbers(axis: Axes, matrix: np.ndarray, digits: int, is_bright: Callable[[float], bool]) -> None:
    for (row, column), number in np.ndenumerate(matrix):
        if np.isfinite(number):
            shade = "black" if is_bright(number) else "white"
            axis.text(column + 1, row + 1, f"{number:.{digits}f}", ha="center", va="center", color=shade, fontsize=8)
