"""Figures: what is drawn where, from arrays with several seeds, with one seed, and with NaN."""

import io

import numpy as np
import pytest

from lifelong_jax import plotting

RNG = np.random.default_rng(0)
STRENGTHS = [0.1, 1.0, 10.0, 100.0]


def lines(axis, label):
    """The data of the lines with this label, `[num_points, 2]` each."""
    return [line.get_xydata() for line in axis.get_lines() if line.get_label() == label]


def assert_is_a_picture(figure):
    with io.BytesIO() as file:
        figure.savefig(file, dpi=30)
        assert file.getvalue().startswith(b"\x89PNG")


def assert_band(band, x, low, high):
    """The polygon has the low and the high edge of the band as its vertices."""
    (path,) = band.get_paths()
    for edge in (low, high):
        distances = np.abs(path.vertices[None] - np.stack([x, edge], axis=-1)[:, None]).sum(axis=-1)
        assert distances.min(axis=1).max() < 1e-12


def test_accuracy_curves_are_means_with_standard_errors():
    accuracy = RNG.uniform(size=(3, 4, 2))
    accuracy[:, :2, 1] = np.nan  # before the second task
    accuracy[1, 3, 0] = np.nan  # of one seed only
    percent = 100 * accuracy
    figure = plotting.plot_accuracy_curves({"EWC": accuracy, "MAS": accuracy[:1]}, ["a", "b"], 2, "Title")
    several, single = figure.axes
    assert figure.get_suptitle() == "Title"
    assert (several.get_title(), single.get_title()) == ("EWC", "MAS")
    (first,), (second,) = lines(several, "a"), lines(several, "b")
    np.testing.assert_allclose(first, np.stack([[1, 2, 3], percent[:, :3, 0].mean(axis=0)], axis=1))
    np.testing.assert_allclose(second, np.stack([[3, 4], percent[:, 2:, 1].mean(axis=0)], axis=1))
    error = percent[:, 2:, 1].std(axis=0, ddof=1) / np.sqrt(3)
    assert_band(several.collections[1], second[:, 0], second[:, 1] - error, second[:, 1] + error)
    assert len(several.collections) == 2
    assert not single.collections  # one seed has no standard error
    np.testing.assert_allclose(lines(single, "a")[0][:, 1], percent[0, :, 0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert several.get_ylabel() == "test accuracy, %"
    assert_is_a_picture(figure)


@pytest.mark.parametrize("num_methods", [1, 2, 3])
def test_titles_legends_and_labels_are_inside_of_the_figure(num_methods):
    methods = ["finetune", "ewc", "mas"][:num_methods]
    names = [f"task {task + 1}" for task in range(20)]
    title = f"20 permuted tasks of digits: average accuracy at the end, percent: {', '.join(methods)}"
    of_seeds = np.full((1, 20, 20), 0.5)
    sweep = {"": {method: np.full((4, 1), 0.5) for method in [*methods, "local_mas", "coupled", "decoupled"]}}
    for figure in (
        plotting.plot_accuracy_curves(dict.fromkeys(methods, of_seeds), names, 1, title),
        plotting.plot_accuracy_matrices(dict.fromkeys(methods, of_seeds[0]), names, title),
        plotting.plot_average_accuracy(dict.fromkeys(methods, of_seeds), title),
        plotting.plot_strength_sweep(sweep, STRENGTHS, title),
    ):
        figure.draw_without_rendering()
        boxes = [box.get_window_extent() for box in (*figure.texts, *figure.legends)]
        boxes += [axis.get_tightbbox() for axis in figure.axes]
        assert figure.get_suptitle() == title
        for box in boxes:
            assert box.x0 > -1 and box.y0 > -1
            assert box.x1 < figure.bbox.width + 1 and box.y1 < figure.bbox.height + 1
        title_box = figure.texts[0].get_window_extent()
        assert all(title_box.y0 >= axis.get_tightbbox().y1 - 1 for axis in figure.axes)


def test_one_epoch_is_a_point_with_a_marker_and_ticks_are_whole_numbers():
    accuracy = RNG.uniform(size=(3, 2, 2))
    accuracy[:, :1, 1] = np.nan
    (axis,) = plotting.plot_accuracy_curves({"EWC": accuracy}, ["a", "b"], 1, "").axes
    markers = {line.get_label(): line.get_marker() for line in axis.get_lines()}
    assert (markers["a"], markers["b"]) == ("None", "o")
    (bar,) = axis.collections[1].get_segments()
    mean, error = accuracy[:, 1, 1].mean(), accuracy[:, 1, 1].std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(bar, [[2, 100 * (mean - error)], [2, 100 * (mean + error)]])
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_average_accuracy_is_that_of_the_tasks_so_far():
    matrix = np.array([[0.8, 0.0, 0.0], [0.6, 1.0, 0.0], [0.3, 0.6, 0.9]])
    joint = np.full((3, 3), np.nan)
    joint[-1] = [0.7, 0.8, 0.9]
    figure = plotting.plot_average_accuracy({"ewc": [matrix, matrix], "joint": [joint, joint]}, "Title")
    ewc, of_joint = figure.axes[0].get_lines()
    np.testing.assert_allclose(ewc.get_ydata(), [80, 80, 60])
    np.testing.assert_allclose(of_joint.get_ydata(), [80, 80])
    assert of_joint.get_linestyle() == "--"
    np.testing.assert_allclose(of_joint.get_xdata(), [1, 3])


def test_accuracy_matrices_have_numbers_where_there_is_room():
    matrix = [[0.5, np.nan], [0.254, 1]]
    figure = plotting.plot_accuracy_matrices({"EWC": matrix}, ["task 1", "task 2"], "Title")
    axis = figure.axes[0]
    texts = {text.get_position(): text.get_text() for text in axis.texts}
    assert texts == {(1, 1): "50", (1, 2): "25", (2, 2): "100"}
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2"]
    assert axis.images[0].get_clim() == (0, 100)
    assert figure.axes[1].get_ylabel() == "test accuracy, %"
    assert_is_a_picture(figure)
    names = [f"task {number}" for number in range(1, 23)]
    figure = plotting.plot_accuracy_matrices({"EWC": np.eye(22), "MAS": np.eye(22)}, names, "Title")
    assert not figure.axes[0].texts
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "1",
        "4",
        "7",
        "10",
        "13",
        "16",
        "19",
        "22",
    ]


def test_a_strength_sweep_marks_where_training_diverged():
    accuracy = RNG.uniform(size=(4, 3))
    accuracy[2, 1] = np.nan
    accuracies = {"sgd": {"coupled": accuracy, "proximal": accuracy / 2}, "adam": {"proximal": accuracy[:, :1]}}
    figure = plotting.plot_strength_sweep(accuracies, STRENGTHS, "Title")
    sgd, adam = figure.axes
    assert (sgd.get_title(), sgd.get_xscale()) == ("sgd", "log")
    (mean,) = lines(sgd, "coupled")
    np.testing.assert_allclose(mean, np.stack([STRENGTHS, 100 * accuracy.mean(axis=1)], axis=1))
    assert np.isnan(mean[2, 1])  # so that the last point has no neighbour
    assert all(line.get_marker() != "None" for line in sgd.get_lines())
    crosses = [line.get_xydata() for line in sgd.get_lines() if line.get_marker() == "x"]
    np.testing.assert_allclose(np.concatenate(crosses), np.array([[10, 2], [10, 5.5]]) / [1, 102])  # of the height
    np.testing.assert_allclose(lines(adam, "proximal")[0][:, 1], 100 * accuracy[:, 0])  # this seed did not diverge
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["coupled", "proximal"]
    colours = [line.get_color() for axis in figure.axes for line in axis.get_lines() if line.get_label() == "proximal"]
    assert len(set(colours)) == 1
    assert_is_a_picture(figure)


def test_a_strength_sweep_has_bands_of_one_standard_error():
    accuracy = RNG.uniform(size=(4, 5))
    (axis,) = plotting.plot_strength_sweep({"": {"EWC": accuracy}}, STRENGTHS, "", "validation accuracy").axes
    assert axis.get_ylabel() == "validation accuracy, %"
    percent = 100 * accuracy
    mean, error = percent.mean(axis=1), percent.std(axis=1, ddof=1) / np.sqrt(5)
    assert_band(axis.collections[0], STRENGTHS, mean - error, mean + error)


def test_parts_of_a_figure_of_ones_own():
    figure = plotting.make_figure(4, 2, "Title")
    left, middle, right = figure.subplots(1, 3)
    plotting.draw_over_seeds(left, [1, 2], [[0.0, 1.0], [1.0, 3.0]], plotting.COLORS[0], "mean", linestyle="--")
    assert lines(left, "mean")[0].tolist() == [[1, 0.5], [2, 2]]
    plotting.draw_image(middle, np.arange(6.0).reshape(2, 3), "image")
    assert middle.images[0].get_clim() == (0, 5)
    x, y = np.linspace(-1, 1, 9), np.linspace(-2, 2, 11)
    plotting.draw_low_loss(right, x, y, x**2 + y[:, None] ** 2, [0.5, 1.0], plotting.COLORS[1])
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_another_score_is_drawn_in_its_own_unit():
    error = RNG.uniform(0, 300, size=(2, 4, 2))
    (axis,) = plotting.plot_accuracy_curves({"EWC": error}, ["a", "b"], 2, "", score="squared error").axes
    np.testing.assert_allclose(lines(axis, "a")[0][:, 1], error[:, :, 0].mean(axis=0))
    assert axis.get_ylabel() == "test squared error"
    assert axis.get_ylim()[1] > lines(axis, "a")[0][:, 1].max()
    (axis,) = plotting.plot_average_accuracy({"EWC": error[:, :2]}, "", score="squared error").axes
    np.testing.assert_allclose(axis.get_lines()[0].get_ydata()[0], error[:, 0, 0].mean())
    assert axis.get_ylabel() == "average squared error on them"
    of_method = {"EWC": np.where([[False], [True], [False], [False]], np.nan, error.reshape(4, 4))}
    (axis,) = plotting.plot_strength_sweep({"": of_method}, STRENGTHS, "", "squared error", score="squared error").axes
    np.testing.assert_allclose(lines(axis, "EWC")[0][:, 1], of_method["EWC"].mean(axis=1))
    assert axis.get_ylabel() == "squared error"
    (cross,) = (line for line in axis.get_lines() if line.get_marker() == "x")
    ((_, height),) = axis.transAxes.inverted().transform(cross.get_transform().transform(cross.get_xydata()))
    assert height == pytest.approx(2 / 102)


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_matrix_is_bright_where_the_score_is_good(higher_is_better):
    matrix = np.array([[-0.5, np.nan], [2.345, 3.5]])
    options = {"score": "squared error", "higher_is_better": higher_is_better}
    figure = plotting.plot_accuracy_matrices({"EWC": matrix, "MAS": matrix + 1}, ["1", "2"], "", **options)
    axis = figure.axes[0]
    (image,) = axis.images
    assert image.get_clim() == (-0.5, 4.5)
    lowest, highest = (sum(image.to_rgba(value)[:3]) for value in (-0.5, 4.5))
    assert (highest > lowest) == higher_is_better
    texts = {text.get_text(): text.get_color() for text in axis.texts}
    good, bad = ("3.50", "-0.50") if higher_is_better else ("-0.50", "3.50")
    assert texts.keys() == {"-0.50", "2.35", "3.50"}
    assert (texts[good], texts[bad]) == ("black", "white")
    assert figure.axes[2].get_ylabel() == "test squared error"


def test_matrices_of_a_score_that_was_never_measured_are_drawn():
    figure = plotting.plot_accuracy_matrices({"EWC": np.full((2, 2), np.nan)}, ["1", "2"], "", score="loss")
    assert_is_a_picture(figure)


@pytest.mark.parametrize(("largest", "written"), [(9.876, "9.88"), (98.76, "98.8"), (987.6, "988"), (98765.0, "98765")])
def test_numbers_in_matrices_fit_their_squares(largest, written):
    figure = plotting.plot_accuracy_matrices({"EWC": [[largest]]}, ["1"], "", score="squared error")
    assert [text.get_text() for text in figure.axes[0].texts] == [written]
