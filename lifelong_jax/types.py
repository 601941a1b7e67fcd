"""The types that the modules share: batches, tasks, consolidations, and the functions that a user hands over."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

Params: TypeAlias = Any
"""A pytree of floating-point arrays: a nested dict, a flax State, an equinox module's arrays, a list, ..."""

Example: TypeAlias = Any
"""A pytree of arrays that describes one example, without an example axis."""

Examples: TypeAlias = Any
"""A pytree of arrays that describes several examples: every leaf is `[num_examples, ...]`."""

LossFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""`loss_fn(params, example) -> scalar`: one example's loss; a negative log-likelihood where a Fisher is asked for."""

LogitsFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""`logits_fn(params, x) -> [..., num_classes]`: one example's logits; leading axes are independent labels."""

OutputFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""`output_fn(params, x) -> array`: one example's output, of any shape."""


class Batch(NamedTuple):
    """Labelled examples.

    Attributes:
      inputs: `[num_examples, ...]`, floating.
      labels: `[num_examples]`, integers in `[0, num_classes)`.
      weights: `[num_examples]`, floating; 0 marks padding, 1 an example that counts once.
      class_mask: `[num_examples, num_classes]`, bool: which outputs of the network are active for each example, or None
        for all of them.
    """

    inputs: jax.Array
    labels: jax.Array
    weights: jax.Array
    class_mask: jax.Array | None = None


class Task(NamedTuple):
    """One task of a sequence.

    Tasks of a sequence have equal shapes, so that one compilation serves them all.

    Attributes:
      train: what the trainer sees while the task is learned.
      test: what the evaluator sees.
      permutation: `[num_features]`, integers: the order in which this task shows the features of an input, or None for
        the order in which they are. It is applied on the device, as the examples are used, so that tasks which differ
        in nothing else share their arrays.
      class_mask: `[num_classes]`, bool: which of the network's outputs are this task's classes, or None where all tasks
        have the same. Which outputs are active while it is learned and tested depends on the scenario: see
        `active_classes`.
    """

    train: Batch
    test: Batch
    permutation: jax.Array | None = None
    class_mask: jax.Array | None = None


class Consolidation(NamedTuple):
    """What is kept of the tasks learned so far: twice the size of the parameters, however many tasks there were.

    Attributes:
      anchor: a tree like the parameters: where they were, θ*.
      importance: a tree like the parameters: how much each one matters, Ω; never negative.
    """

    anchor: Params
    importance: Params
