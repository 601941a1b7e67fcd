"""What the field reads off an accuracy matrix.

`accuracy_matrix[i, j]` is the accuracy on task j's test set after task i has been learned, `[num_tasks, num_tasks]`.
An entry that was not measured is NaN, and so is every metric that needs it.
"""

import numpy as np
from numpy.typing import ArrayLike


def average_accuracy(accuracy_matrix: ArrayLike) -> float:
    """Computes the mean accuracy over all tasks, after the last one: `mean_j A[-1, j]`.

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


def forgetting(accuracy_matrix: ArrayLike) -> float:
    """Computes how far accuracy has fallen from its best: `mean_{j<T-1} (max_{i<T-1} A[i, j] − A[T-1, j])`.

    Args:
      accuracy_matrix: `[num_tasks, num_tasks]`, in [0, 1].

    Returns:
      A fraction in [-1, 1]; smaller is better. NaN for a single task, which nothing came after.

    Raises:
      ValueError: if the matrix is not square.

    Example:
      >>> forgetting([[1.0, 0.0], [0.5, 1.0]])
      0.5

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 3.
    """
    accuracy = _square(accuracy_matrix)
    if len(accuracy) == 1:
        return float("nan")
    return float(np.mean(np.max(accuracy[:-1, :-1], axis=0) - accuracy[-1, :-1]))


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
    accuracy = _square(accuracy_matrix)
    if len(accuracy) == 1:
        return float("nan")
    return float(np.mean(accuracy[-1, :-1] - np.diag(accuracy)[:-1]))


def _square(accuracy_matrix: ArrayLike) -> np.ndarray:
    matrix = np.asarray(accuracy_matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"accuracy_matrix must be [num_tasks, num_tasks], not of shape {matrix.shape}.")
    return matrix
