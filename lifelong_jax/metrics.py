"""Metrics of continual learning, from an accuracy matrix.

`accuracy_matrix[i, j]` is the accuracy on task j's test set after task i has been learned, `[num_tasks, num_tasks]`.
An entry that was not measured is NaN, and so is every metric that needs it. T is the number of tasks.

Three definitions of forgetting are in use: since a task's best accuracy (`forgetting`), since the end of its own
training (`forgetting_since_learned`), and relative to joint training (`forgetting_ratio`).

The matrix may hold another score in place of the accuracy, in its own unit: the `score` of an `Objective`. Where a
lower one is better, such as a squared error or a loss, pass `higher_is_better=False`. Forgetting is positive where the
score got worse, and transfer where it got better, in either direction.
"""

import numpy as np
from numpy.typing import ArrayLike


def average_accuracy(accuracy_matrix: ArrayLike) -> float:
    """Computes the mean accuracy on all tasks after the last one: `mean_j A[T-1, j]`, or the mean of another score.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.

    Returns:
      A fraction in [0, 1], or a mean in the unit of the score.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> average_accuracy([[1.0, 0.0], [0.5, 1.0]])
      0.75

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 2.
    """
    return float(np.mean(_square(accuracy_matrix)[-1]))


def average_incremental_accuracy(accuracy_matrix: ArrayLike) -> float:
    """Computes the mean accuracy on the tasks so far, averaged over the sequence: `mean_i mean_{j<=i} A[i, j]`.

    Of another score, it is the mean likewise.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.

    Returns:
      A fraction in [0, 1], or a mean in the unit of the score.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 1.0]])
      0.875

    Rebuffi et al. 2017, arXiv 1611.07725, section 4.1.
    """
    accuracy = _square(accuracy_matrix)
    return float(np.mean([np.mean(row[: index + 1]) for index, row in enumerate(accuracy)]))


def forgetting(accuracy_matrix: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Computes the loss of accuracy since its best: `mean_{j<T-1} (max_{j<=i<T-1} A[i, j] − A[T-1, j])`.

    If a lower score is better: `mean_{j<T-1} (A[T-1, j] − min_{j<=i<T-1} A[i, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      A difference of scores, for fractions in [-1, 1]; smaller is better. NaN for a single task.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> forgetting([[1.0, 0.0], [0.5, 1.0]])
      0.5
      >>> forgetting([[0.25, 2.0], [0.75, 0.5]], higher_is_better=False)  # squared errors
      0.5

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 3; here the best accuracy is since the task was learned.
    """
    accuracy = _square(accuracy_matrix)
    last, best = len(accuracy) - 1, np.max if higher_is_better else np.min
    best_so_far = np.array([best(accuracy[task:last, task]) for task in range(last)])
    return _mean(_gain(accuracy[last, :last], best_so_far, higher_is_better))


def forgetting_since_learned(accuracy_matrix: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Computes the loss of accuracy since the task's own training: `mean_{j<T-1} (A[j, j] − A[T-1, j])`.

    If a lower score is better: `mean_{j<T-1} (A[T-1, j] − A[j, j])`. It is backward transfer with the opposite sign.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      A difference of scores, for fractions in [-1, 1]; smaller is better. NaN for a single task.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> forgetting_since_learned([[0.7, 0.0, 0.0], [0.9, 1.0, 0.0], [0.6, 0.5, 1.0]])
      0.3

    Aljundi et al. 2018, arXiv 1711.09601, section 5.
    """
    accuracy = _square(accuracy_matrix)
    return _mean(_gain(accuracy[-1, :-1], np.diag(accuracy)[:-1], higher_is_better))


def forgetting_ratio(
    accuracy_matrix: ArrayLike, chance: ArrayLike, joint_accuracy: ArrayLike, *, higher_is_better: bool = True
) -> float:
    """Computes forgetting relative to joint training and chance: `mean_j (A[T-1, j] − c_j) / (m_j − c_j) − 1`.

    The formula holds for either direction: a ratio of differences has no sign.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.
      chance: c, a number or `[num_tasks]`: the accuracy of a random classifier, or the score of a network
        that learned nothing.
      joint_accuracy: m, `[num_tasks]`: the accuracy on each task of a network trained on all of them at once.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      About 0 for no forgetting; -1 if all accuracies have fallen to chance.

    Raises:
      ValueError: if the matrix is not square, another size does not match, or a joint accuracy is not better than
        chance.

    Example:
      >>> forgetting_ratio([[1.0, 0.0], [0.5, 1.0]], chance=0.5, joint_accuracy=[1.0, 1.0])
      -0.5

    Serrà et al. 2018, arXiv 1801.01423, section 4.1.
    """
    accuracy = _square(accuracy_matrix)
    chance = _of_each_task("chance", chance if np.ndim(chance) else np.full(len(accuracy), chance), accuracy)
    joint_accuracy = _of_each_task("joint_accuracy", joint_accuracy, accuracy)
    learned_nothing = joint_accuracy <= chance if higher_is_better else joint_accuracy >= chance
    for task in np.flatnonzero(learned_nothing):
        side = "above" if higher_is_better else "below"
        raise ValueError(
            f"joint_accuracy[{task}] is {joint_accuracy[task]:g}, but must be {side} chance, {chance[task]:g}: there "
            f"is no ratio to what joint training did not learn. Train jointly for longer, or leave the task out."
        )
    return _mean((accuracy[-1] - chance) / (joint_accuracy - chance) - 1)


def backward_transfer(accuracy_matrix: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Computes the effect of later tasks on earlier ones: `mean_{j<T-1} (A[T-1, j] − A[j, j])`.

    If a lower score is better: `mean_{j<T-1} (A[j, j] − A[T-1, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      A difference of scores, for fractions in [-1, 1]; larger is better, negative means forgetting. NaN for a single
      task.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> backward_transfer([[1.0, 0.0], [0.5, 1.0]])
      -0.5

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 3.
    """
    return -forgetting_since_learned(accuracy_matrix, higher_is_better=higher_is_better)


def forward_transfer(
    accuracy_matrix: ArrayLike, initial_accuracy: ArrayLike, *, higher_is_better: bool = True
) -> float:
    """Computes the effect of earlier tasks on later ones before these are learned: `mean_{j>0} (A[j-1, j] − b_j)`.

    If a lower score is better: `mean_{j>0} (b_j − A[j-1, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.
      initial_accuracy: b, `[num_tasks]`: the accuracy on each task with the initial parameters.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      A difference of scores, for fractions in [-1, 1]; larger is better. NaN for a single task.

    Raises:
      ValueError: if the matrix is not square, or another size does not match.

    Example:
      >>> forward_transfer([[1.0, 0.75], [0.5, 1.0]], initial_accuracy=[0.5, 0.5])
      0.25

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 4.
    """
    accuracy = _square(accuracy_matrix)
    initial_accuracy = _of_each_task("initial_accuracy", initial_accuracy, accuracy)
    return _mean(_gain(initial_accuracy[1:], np.diag(accuracy, 1), higher_is_better))


def intransigence(accuracy_matrix: ArrayLike, joint_accuracy: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Computes how much worse each task is learned in the sequence than jointly: `mean_j (m_j − A[j, j])`.

    If a lower score is better: `mean_j (A[j, j] − m_j)`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`: fractions, or another score.
      joint_accuracy: m, `[num_tasks]`: the accuracy on each task of a network trained on all of them at once.
      higher_is_better: whether a higher score is better; False for a squared error or a loss.

    Returns:
      A difference of scores, for fractions in [-1, 1]; smaller is better.

    Raises:
      ValueError: if the matrix is not square, or another size does not match.

    Example:
      >>> intransigence([[1.0, 0.0], [0.5, 0.5]], joint_accuracy=[1.0, 1.0])
      0.25

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 5, as a mean over all tasks. Their m_j is of a network trained on the
    tasks up to j; here it is trained on all. In the scenario "class", A[j, j] is measured among the classes up to task
    j, but m_j among all classes, so that the result can be negative although nothing was learned better.
    """
    accuracy = _square(accuracy_matrix)
    joint_accuracy = _of_each_task("joint_accuracy", joint_accuracy, accuracy)
    return _mean(_gain(np.diag(accuracy), joint_accuracy, higher_is_better))


def _square(accuracy_matrix: ArrayLike) -> np.ndarray:
    matrix = np.asarray(accuracy_matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"accuracy_matrix must be [num_tasks, num_tasks], not of shape {matrix.shape}.")
    return matrix


def _of_each_task(name: str, values: ArrayLike, accuracy: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.shape != accuracy.shape[:1]:
        raise ValueError(f"{name} must be [num_tasks] = {accuracy.shape[:1]}, not of shape {values.shape}.")
    return values


def _gain(before: np.ndarray, after: np.ndarray, higher_is_better: bool) -> np.ndarray:
    return after - before if higher_is_better else before - after


def _mean(values: np.ndarray) -> float:
    # np.mean would warn if there are no values.
    return float(np.mean(values)) if len(values) else float("nan")
