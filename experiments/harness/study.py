"""What the studies of single networks share: the loop over seeds, and functions that learn and measure one task."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from experiments.harness.pipelines import momentum_with_penalty
from experiments.harness.report import progress_bar
from experiments.harness.runs import Run, compute_once
from lifelong_jax.importance.estimators import fisher_diagonal, mas_importance
from lifelong_jax.losses import cross_entropy
from lifelong_jax.tasks import with_permutation
from lifelong_jax.training import TrainingState, init_training, learn_task
from lifelong_jax.types import Batch, Consolidation, Params


def measure_seeds(
    measure: Callable[[jax.Array], Any],
    seeds: Sequence[int],
    run: Run,
    console: rich.console.Console,
    logged: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Measures each seed once in a run, and logs it.

    Args:
      measure: `measure(key) -> measured`, a dict or a NamedTuple of arrays and numbers, of equal shapes for all seeds.
      seeds: integers, from which the random keys are made.
      run: the run, which keeps each seed's arrays.
      console: where the progress is shown.
      logged: the names that go into the log; None for all.

    Returns:
      The arrays by name, each `[num_seeds, ...]`.
    """
    measured = []
    with progress_bar(console) as bar:
        line = bar.add_task("", total=len(seeds), status="")
        for seed in seeds:
            bar.update(line, status=f"seed {seed}")
            of_seed = compute_once(run, f"seed {seed}", functools.partial(measure, jax.random.key(seed)))
            run.log_once(seed=seed, **{name: of_seed[name] for name in logged or of_seed})
            measured.append(of_seed)
            bar.advance(line)
    return {name: np.stack([of_seed[name] for of_seed in measured]) for name in measured[0]}


@functools.partial(jax.jit, static_argnames=("model", "batch_size"))
def learn_permuted(
    model: nn.Module,
    params: Params,
    consolidation: Consolidation,
    batch: Batch,
    permutation: jax.Array,
    key: jax.Array,
    *,
    strength: float,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
) -> Params:
    """Learns a task whose features are permuted, by SGD with momentum 0.9 and the penalty's proximal step.

    The model and the batch size are static; all else is traced, so that one compilation serves every task and strength.

    Args:
      model: a flax module of one example.
      params: where training starts.
      consolidation: what is kept of earlier tasks.
      batch: training examples.
      permutation: `[num_features]`; see `permute_features`.
      key: the random key of shuffling.
      strength: λ.
      num_epochs: passes over the examples.
      batch_size: examples per step.
      learning_rate: the step size.

    Returns:
      The parameters after the last step.
    """
    optimizer = momentum_with_penalty(learning_rate, strength)
    loss_fn = cross_entropy(with_permutation(model.apply, permutation))

    def epoch(_: int, state: TrainingState) -> TrainingState:
        return learn_task(loss_fn, optimizer, state, consolidation, batch, num_epochs=1, batch_size=batch_size)[0]

    return jax.lax.fori_loop(0, num_epochs, epoch, init_training(optimizer, params, key)).params


@functools.partial(jax.jit, static_argnames=("model",))
def is_correct(model: nn.Module, params: Params, batch: Batch, permutation: jax.Array) -> jax.Array:
    """Returns whether each example of a permuted task is classified correctly.

    Args:
      model: a flax module of one example.
      params: its parameters.
      batch: examples.
      permutation: `[num_features]`; see `permute_features`.

    Returns:
      `[num_examples]`, bool.
    """
    logits = jax.vmap(with_permutation(model.apply, permutation), in_axes=(None, 0))(params, batch.inputs)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch.labels.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model",))
def both_importances(model: nn.Module, params: Params, batch: Batch, permutation: jax.Array) -> tuple[Params, Params]:
    """Computes EWC's and MAS's importance on a permuted task.

    Args:
      model: a flax module of one example.
      params: its parameters.
      batch: examples; the labels are not used.
      permutation: `[num_features]`; see `permute_features`.

    Returns:
      The Fisher diagonal, and MAS's importance of the squared norm: trees like `params`.
    """
    logits_fn = with_permutation(model.apply, permutation)
    return fisher_diagonal(logits_fn, params, batch.inputs), mas_importance(logits_fn, params, batch.inputs)
