"""Training on a source of examples in steps that a run can be stopped between, and resumed after."""

import shutil
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.harness.checkpoints import restore_checkpoint, save_checkpoint
from experiments.harness.runs import Run
from lifelong_jax import Consolidation, init_training
from lifelong_jax.datasets.sources import Source
from lifelong_jax.training import TrainingState
from lifelong_jax.types import LossFn, ModelState, Params, TrainLossFn

SECONDS_BETWEEN_CHECKPOINTS = 300


class Learned(NamedTuple):
    """What `learn_resumably` returns.

    Attributes:
      state: the state after the last step.
      loss: `[num_steps]`, the loss of each step's batch.
      seconds_per_step: the median over the steps since the run was started or resumed.
    """

    state: TrainingState
    loss: np.ndarray
    seconds_per_step: float


def learn_resumably(
    run: Run,
    name: str,
    loss_fn: LossFn | TrainLossFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    consolidation: Consolidation,
    source: Source,
    key: jax.Array,
    *,
    num_epochs: int,
    batch_size: int,
    model_state: ModelState = None,
) -> Learned:
    """Trains as `learn_stream` does, with checkpoints in the run's folder: every five minutes, and when it is stopped.

    Args:
      run: the run.
      name: of this training in the run.
      loss_fn: as for `learn_stream`.
      optimizer: as for `learn_stream`.
      params: where training starts.
      consolidation: what is kept of earlier tasks.
      source: the training examples.
      key: the random key of the shuffling.
      num_epochs: passes over the examples.
      batch_size: examples per step.
      model_state: as for `init_training`.

    Returns:
      The state, the losses, and the time.

    Raises:
      KeyboardInterrupt: after a checkpoint, if the run is asked to stop.
    """
    from lifelong_jax import streaming  # here, as it is slow to import

    num_batches = -(-len(source) // min(batch_size, len(source)))
    training = init_training(optimizer, params, key, model_state)
    start = streaming.StreamState(training, 0, 0, np.zeros((num_epochs, num_batches)), np.zeros(num_epochs, np.int32))
    folder = run.folder / "checkpoints" / name
    _, start = restore_checkpoint(folder, like=start) or (0, start)
    times = [time.perf_counter()]
    saved_at = times[0]

    def after_step(state: streaming.StreamState) -> None:
        nonlocal saved_at
        times.append(time.perf_counter())
        if run.stopping.is_set() or times[-1] - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            save_checkpoint(folder, state.epoch * num_batches + state.step, state)
            saved_at = time.perf_counter()
        if run.stopping.is_set():
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"num_epochs": num_epochs, "batch_size": batch_size, "interval": 1}
    state, info = streaming.learn_stream(
        loss_fn, optimizer, start, consolidation, source, callback=after_step, **settings
    )
    shutil.rmtree(folder, ignore_errors=True)
    return Learned(state, np.asarray(info.loss).ravel(), float(np.median(np.diff(times))))
