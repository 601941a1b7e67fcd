"""How a score is shown, as its objective says: accuracies in percent, others in their own unit."""

from typing import NamedTuple

from lifelong_jax.objectives import CLASSIFICATION, Objective


class Score(NamedTuple):
    """A score in tables, on the screen and in files.

    Attributes:
      name: such as "accuracy", "squared error" or "loss".
      higher_is_better: whether a higher one is better.
    """

    name: str
    higher_is_better: bool

    @property
    def in_percent(self) -> bool:
        """Whether it is a fraction that is shown in percent."""
        return self.name == "accuracy"

    @property
    def factor(self) -> float:
        """What numbers are multiplied by."""
        return 100.0 if self.in_percent else 1.0

    @property
    def digits(self) -> int:
        """How many digits stand after the decimal point."""
        return 1 if self.in_percent else 3

    def rename(self, key: str) -> str:
        """Puts the name in the place of "accuracy".

        Args:
          key: a name in a file, or of one.

        Returns:
          The key, with underscores.

        Example:
          >>> from lifelong_jax.objectives import regression
          >>> score_of(regression()).rename("average_accuracy")
          'average_squared_error'
        """
        return key.replace("accuracy", self.name.replace(" ", "_"))


def score_of(objective: Objective) -> Score:
    """Reads off an objective what its score is.

    Args:
      objective: the recipe's.

    Returns:
      The score.

    Example:
      >>> score_of(CLASSIFICATION).in_percent
      True
    """
    return Score(objective.score, objective.higher_is_better)


ACCURACY = score_of(CLASSIFICATION)
