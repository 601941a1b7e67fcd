"""Types that the modules share: batches, tasks, consolidations, and the functions that a user passes."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import optax

Params: TypeAlias = Any
"""A pytree of floating-point arrays: a nested dict, a flax State, an equinox module's arrays, a list, ..."""

Example: TypeAlias = Any
"""A pytree of arrays: one example, without an example axis."""

Examples: TypeAlias = Any
"""A pytree of arrays `[num_examples, ...]`: several examples."""

LossFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""`loss_fn(params, example) -> scalar`: one example's loss; for a Fisher information, its negative log-likelihood, or
those of its labels."""

LogitsFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""`logits_fn(params, x) -> [..., num_classes]`: one example's logits; leading axes are independent labels."""

OutputFn: TypeAlias = Callable[[Params, Example], jax.Array]
"""`output_fn(params, x) -> array`: one example's output, of any shape."""

ModelState: TypeAlias = Any
"""A pytree of arrays that a network updates as it is trained, without gradients: running averages, say. () for none."""

TrainFn: TypeAlias = Callable[[Params, ModelState, Example, jax.Array], tuple[jax.Array, ModelState]]
"""`train_fn(params, model_state, x, key) -> (outputs, model_state)`: a network as it is trained, on one example.

`key` is the example's own in this step, for dropout. Means over the batch are taken by `jax.lax.pmean(..., "batch")`.
The model state that it returns must be the same for all examples of a batch.
"""

TrainLossFn: TypeAlias = Callable[[Params, ModelState, Example, jax.Array], tuple[jax.Array, ModelState]]
"""`loss_fn(params, model_state, example, key) -> (scalar, model_state)`: one example's loss as the network is trained.

As for `TrainFn`, `key` is the example's own, and the model state that it returns is the same for all examples.
"""

OptimizerFn: TypeAlias = Callable[[jax.Array], optax.GradientTransformation]
"""`optimizer_fn(strength) -> optimizer`: a function of λ, which may be traced: one compilation serves every λ."""

Scenario: TypeAlias = Literal["task", "domain", "class"]
"""What is known about the task at test time; see `scenarios.active_classes`."""


class Batch(NamedTuple):
    """Labelled examples.

    Attributes:
      inputs: `[num_examples, ...]`, an array of floats or integers, or a tree of such arrays.
      labels: `[num_examples, ...]`: classes, integers in `[0, num_classes)`, or what else the objective takes; see
        `objectives`.
      weights: `[num_examples]`, floating; 0 for padding, 1 for an example that counts once. None for ones.
      class_mask: `[num_examples, num_classes]`, bool: the outputs that are active for each example, or None if all are.
      label_weights: `[num_examples, ...]`, floating, with the first axes of `labels`: the weight of each of an
        example's labels in its loss, 0 for the padding of a sequence of tokens. None for ones.
    """

    inputs: Any
    labels: jax.Array
    weights: jax.Array | None = None
    class_mask: jax.Array | None = None
    label_weights: jax.Array | None = None


class Task(NamedTuple):
    """One task of a sequence.

    Tasks of a sequence agree in all but their numbers of examples. What learns, measures and evaluates a task is
    compiled once for each different number of training and of test examples; `pad_tasks` makes them equal.

    Attributes:
      train: the training examples; only the trainer sees them.
      test: the test examples; only the evaluator sees them.
      permutation: `[num_features]`, integers: feature i of this task's input is feature `permutation[i]` of the
        example; None for no permutation. It is applied on the device when examples are used, so that tasks that differ
        only in their permutations share their arrays.
      class_mask: `[num_classes]`, bool: the network's outputs that are this task's classes, or None if all tasks have
        the same classes. The scenario decides which outputs are active in training and testing; see
        `scenarios.active_classes`.
      validation: the validation examples, by whose score training stops if the recipe has a patience; None without.
    """

    train: Batch
    test: Batch
    permutation: jax.Array | None = None
    class_mask: jax.Array | None = None
    validation: Batch | None = None


class Consolidation(NamedTuple):
    """What is kept of all tasks learned so far: twice the size of the parameters, for any number of tasks.

    Attributes:
      anchor: a tree like the parameters: the values that the penalty pulls them towards, θ*.
      importance: a tree like the parameters: how much each of them matters, Ω; never negative.
    """

    anchor: Params
    importance: Params
