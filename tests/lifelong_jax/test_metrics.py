"""Metrics against matrices worked by hand."""

import math

import numpy as np
import pytest

from lifelong_jax.metrics import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_ratio,
    forgetting_since_learned,
    forward_transfer,
    intransigence,
)

MATRIX = [
    [0.9, 0.1, 0.2],
    [0.7, 0.8, 0.3],
    [0.4, 0.6, 1.0],
]


def test_average_accuracy():
    assert average_accuracy(MATRIX) == pytest.approx((0.4 + 0.6 + 1.0) / 3)


def test_forgetting():
    assert forgetting(MATRIX) == pytest.approx(((0.9 - 0.4) + (0.8 - 0.6)) / 2)


def test_forgetting_is_from_the_best_that_ever_was():
    # Task 1 was best after task 2: 0.9 there, 0.5 at last.
    assert forgetting([[0.6, 0.0, 0.0], [0.9, 0.7, 0.0], [0.5, 0.7, 0.8]]) == pytest.approx(0.4 / 2)


def test_average_incremental_accuracy():
    assert average_incremental_accuracy(MATRIX) == pytest.approx((0.9 + (0.7 + 0.8) / 2 + 2.0 / 3) / 3)


def test_what_was_measured_before_a_task_was_learned_does_not_count_as_its_best():
    unknown = np.array(MATRIX)
    unknown[np.triu_indices(3, 1)] = np.nan
    assert forgetting(unknown) == pytest.approx(forgetting(MATRIX))


def test_forgetting_since_learned():
    assert forgetting_since_learned(MATRIX) == pytest.approx(((0.9 - 0.4) + (0.8 - 0.6)) / 2)


def test_forgetting_ratio():
    expected = (0.3 / 0.9 + 0.4 / 0.6 + 0.9 / 0.8) / 3 - 1
    assert forgetting_ratio(MATRIX, [0.1, 0.2, 0.1], [1.0, 0.8, 0.9]) == pytest.approx(expected)


def test_forward_transfer():
    assert forward_transfer(MATRIX, [0.5, 0.2, 0.1]) == pytest.approx(((0.1 - 0.2) + (0.3 - 0.1)) / 2)


def test_intransigence():
    assert intransigence(MATRIX, [1.0, 0.9, 0.8]) == pytest.approx((0.1 + 0.1 - 0.2) / 3)


def test_backward_transfer():
    assert backward_transfer(MATRIX) == pytest.approx(((0.4 - 0.9) + (0.6 - 0.8)) / 2)


def test_backward_transfer_may_be_positive():
    assert backward_transfer([[0.5, 0.0], [0.75, 1.0]]) == 0.25


def test_a_single_task_can_neither_be_forgotten_nor_gain():
    assert average_accuracy([[0.5]]) == 0.5
    assert math.isnan(forgetting([[0.5]]))
    assert math.isnan(backward_transfer([[0.5]]))
    assert math.isnan(forward_transfer([[0.5]], [0.1]))


def test_what_was_not_measured_is_nan():
    only_last_row = np.full((3, 3), np.nan)
    only_last_row[-1] = [0.5, 0.6, 0.7]
    assert average_accuracy(only_last_row) == pytest.approx(0.6)
    assert math.isnan(forgetting(only_last_row))
    assert math.isnan(backward_transfer(only_last_row))


@pytest.mark.parametrize(
    ("metric", "others"),
    [
        (forgetting, []),
        (forgetting_since_learned, []),
        (forgetting_ratio, [[0.1, 0.2, 0.1], [1.0, 0.8, 0.9]]),
        (backward_transfer, []),
        (forward_transfer, [[0.5, 0.2, 0.1]]),
        (intransigence, [[1.0, 0.9, 0.8]]),
    ],
)
def test_of_a_score_of_which_a_lower_one_is_better_a_metric_is_that_of_its_negative(metric, others):
    of_negatives = metric(np.negative(MATRIX), *map(np.negative, others), higher_is_better=False)
    assert of_negatives == pytest.approx(metric(MATRIX, *others))


def test_forgetting_is_positive_and_transfer_negative_where_an_error_grew():
    errors = [[0.2, 1.0, 0.9], [0.1, 0.3, 0.8], [0.7, 0.5, 0.4]]
    lower = {"higher_is_better": False}
    assert forgetting(errors, **lower) == pytest.approx(((0.7 - 0.1) + (0.5 - 0.3)) / 2)
    assert forgetting_since_learned(errors, **lower) == pytest.approx(((0.7 - 0.2) + (0.5 - 0.3)) / 2)
    assert backward_transfer(errors, **lower) == pytest.approx(((0.2 - 0.7) + (0.3 - 0.5)) / 2)
    assert forward_transfer(errors, [1.5, 1.2, 1.0], **lower) == pytest.approx(((1.2 - 1.0) + (1.0 - 0.8)) / 2)
    assert intransigence(errors, [0.1, 0.1, 0.1], **lower) == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    ratio = forgetting_ratio(errors, 1.0, [0.1, 0.1, 0.1], **lower)
    assert ratio == pytest.approx((0.3 / 0.9 + 0.5 / 0.9 + 0.6 / 0.9) / 3 - 1)


@pytest.mark.parametrize("metric", [average_accuracy, average_incremental_accuracy, forgetting, backward_transfer])
@pytest.mark.parametrize("matrix", [[0.5, 0.5], [[0.5, 0.5]], np.zeros((0, 0))])
def test_bad_input(metric, matrix):
    with pytest.raises(ValueError, match=r"accuracy_matrix must be \[num_tasks, num_tasks\]"):
        metric(matrix)


@pytest.mark.parametrize("metric", [forward_transfer, intransigence])
def test_sizes_must_match(metric):
    with pytest.raises(
        ValueError, match=r"(initial|joint)_accuracy must be \[num_tasks\] = \(3,\), not of shape \(2,\)"
    ):
        metric(MATRIX, [0.5, 0.5])


@pytest.mark.parametrize("chance", [[0.1, 0.1], np.full((1, 3), 0.1)])
def test_chance_is_a_number_or_one_for_each_task(chance):
    with pytest.raises(ValueError, match=r"chance must be \[num_tasks\] = \(3,\), not of shape"):
        forgetting_ratio(MATRIX, chance, [1.0, 0.8, 0.9])


@pytest.mark.parametrize("joint", [0.1, 0.05])
def test_there_is_no_ratio_where_joint_training_learned_nothing(joint):
    with pytest.raises(ValueError, match=rf"joint_accuracy\[1\] is {joint}, but must be above chance, 0\.1"):
        forgetting_ratio(MATRIX, 0.1, [1.0, joint, 0.9])
    assert math.isnan(forgetting_ratio(MATRIX, 0.1, [1.0, np.nan, 0.9]))  # not measured


def test_an_error_of_joint_training_must_be_below_that_of_a_network_that_learned_nothing():
    with pytest.raises(ValueError, match=r"joint_accuracy\[1\] is 1, but must be below chance, 1:"):
        forgetting_ratio(MATRIX, 1.0, [0.1, 1.0, 0.9], higher_is_better=False)
