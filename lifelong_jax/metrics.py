"""What the field reads off an accuracy matrix.

`accuracy_matrix[i, j]` is the accuracy on task j's test set after task i has been learned, `[num_tasks, num_tasks]`.
An entry that was not measured is NaN, and so is every metric that needs it. T is the number of tasks.

Forgetting has three definitions in use: from a task's best accuracy on (`forgetting`), from the accuracy at the end of
its own training on (`forgetting_since_learned`), and in relation to joint training (`forgetting_ratio`).
"""

import numpy as np
from numpy.typing import ArrayLike


def average_accuracy(accuracy_matrix: ArrayLike) -> float:
    """Computes the mean accuracy over all tasks, after the last one: `mean_j A[T-1, j]`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].

    Returns:
      A fraction in [0, 1].

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> average_accuracy([[1.0, 0.0], [0.5, 1.0]])
      0.75

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 2.
    """
    return float(np.mean(_square(accuracy_matrix)[-1]))


def average_incremental_accuracy(accuracy_matrix: ArrayLike) -> float:
    """Computes the mean, over the sequence, of the accuracy on the tasks so far: `mean_i mean_{j<=i} A[i, j]`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].

    Returns:
      A fraction in [0, 1].

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> average_incremental_accuracy([[1.0, 0.0], [0.5, 1.0]])
      0.875

    Rebuffi et al. 2017, arXiv 1611.07725, section 4.1.
    """
    accuracy = _square(accuracy_matrix)
    return float(np.mean([np.mean(row[: index + 1]) for index, row in enumerate(accuracy)]))


def forgetting(accuracy_matrix: ArrayLike) -> float:
    """Computes how far accuracy has fallen from its best: `mean_{j<T-1} (max_{j<=i<T-1} A[i, j] − A[T-1, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].

    Returns:
      A fraction in [-1, 1]; smaller is better. NaN for a single task, which nothing came after.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> forgetting([[1.0, 0.0], [0.5, 1.0]])
      0.5

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 3; here a task's best is since its own turn.
    """
    accuracy = _square(accuracy_matrix)
    last = len(accuracy) - 1
    return _mean([np.max(accuracy[task:last, task]) - accuracy[last, task] for task in range(last)])


def forgetting_since_learned(accuracy_matrix: ArrayLike) -> float:
    """Computes how far accuracy has fallen since the task's own training: `mean_{j<T-1} (A[j, j] − A[T-1, j])`.

    It is backward transfer, with the other sign.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].

    Returns:
      A fraction in [-1, 1]; smaller is better. NaN for a single task.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> forgetting_since_learned([[0.7, 0.0, 0.0], [0.9, 1.0, 0.0], [0.6, 0.5, 1.0]])
      0.3

    Aljundi et al. 2018, arXiv 1711.09601, section 5.
    """
    accuracy = _square(accuracy_matrix)
    return _mean(np.diag(accuracy)[:-1] - accuracy[-1, :-1])


def forgetting_ratio(accuracy_matrix: ArrayLike, chance: ArrayLike, joint_accuracy: ArrayLike) -> float:
    """Computes what is left of the way from chance to joint training: `mean_j (A[T-1, j] − c_j) / (m_j − c_j) − 1`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].
      chance: c, a number or `[num_tasks]`: the accuracy of a random classifier.
      joint_accuracy: m, `[num_tasks]`: the accuracy on each task of a network trained on all of them at once.

    Returns:
      At most about 0, which is no forgetting; -1 where accuracy has fallen to chance.

    Raises:
      ValueError: if the matrix is not square, or the others' sizes do not match.

    Example:
      >>> forgetting_ratio([[1.0, 0.0], [0.5, 1.0]], chance=0.5, joint_accuracy=[1.0, 1.0])
      -0.5

    Serrà et al. 2018, arXiv 1801.01423, section 4.1.
    """
    accuracy = _square(accuracy_matrix)
    chance = _of_each_task("chance", chance if np.ndim(chance) else np.full(len(accuracy), chance), accuracy)
    joint_accuracy = _of_each_task("joint_accuracy", joint_accuracy, accuracy)
    return _mean((accuracy[-1] - chance) / (joint_accuracy - chance) - 1)


def backward_transfer(accuracy_matrix: ArrayLike) -> float:
    """Computes what learning later tasks has done to earlier ones: `mean_{j<T-1} (A[T-1, j] − A[j, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].

    Returns:
      A fraction in [-1, 1]; larger is better, negative means forgetting. NaN for a single task.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> backward_transfer([[1.0, 0.0], [0.5, 1.0]])
      -0.5

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 3.
    """
    return -forgetting_since_learned(accuracy_matrix)


def forward_transfer(accuracy_matrix: ArrayLike, initial_accuracy: ArrayLike) -> float:
    """Computes what earlier tasks do for one that is yet to be learned: `mean_{j>0} (A[j-1, j] − b_j)`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].
      initial_accuracy: b, `[num_tasks]`: the accuracy on each task with the parameters that training began with.

    Returns:
      A fraction in [-1, 1]; larger is better. NaN for a single task.

    Raises:
      ValueError: if the matrix is not square, or the other's size does not match.

    Example:
      >>> forward_transfer([[1.0, 0.75], [0.5, 1.0]], initial_accuracy=[0.5, 0.5])
      0.25

    Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 4.
    """
    accuracy = _square(accuracy_matrix)
    initial_accuracy = _of_each_task("initial_accuracy", initial_accuracy, accuracy)
    return _mean(np.diag(accuracy, 1) - initial_accuracy[1:])


def intransigence(accuracy_matrix: ArrayLike, joint_accuracy: ArrayLike) -> float:
    """Computes how much worse a task is learned in its turn than jointly with the others: `mean_j (m_j − A[j, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].
      joint_accuracy: m, `[num_tasks]`: the accuracy on each task of a network trained on all of them at once.

    Returns:
      A fraction in [-1, 1]; smaller is better.

    Raises:
      ValueError: if the matrix is not square, or the other's size does not match.

    Example:
      >>> intransigence([[1.0, 0.0], [0.5, 0.5]], joint_accuracy=[1.0, 1.0])
      0.25

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 5, of all tasks; its reference for task j is trained on the tasks up to
    j, and this one on all. In the class-incremental scenario A[j, j] is measured among the classes up to j and m_j
    among all, so that it can be negative with nothing learned better.
    """
    accuracy = _square(accuracy_matrix)
    return _mean(_of_each_task("joint_accuracy", joint_accuracy, accuracy) - np.diag(accuracy))


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


def _mean(values: ArrayLike) -> float:
    # Of no values, NaN, and no warning.
    return float(np.mean(values)) if len(values) else float("nan")
