"""RWalk: an online Fisher information and a score of the path, gathered while training, by a wrapper.

Use it like `path_integral`; in addition, the update takes the loss and the batch:

    optimizer = riemannian_walk(optax.chain(add_quadratic_penalty(λ), optax.adam(lr)))
    updates, state = optimizer.update(
        grads, state, params, loss_fn=loss_fn, examples=batch, **consolidation._asdict()
    )

RWalk's importance covers all tasks so far, so a task's state takes over the last one's scores:

    consolidation = consolidate(consolidation, params, rwalk_importance(state, params), rule="latest", decay=0.0)
    state = continue_walk(optimizer.init(params), state)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from lifelong_jax import _checks
from lifelong_jax._numerics import vary_with, widened_zeros, with_extra_args
from lifelong_jax.importance import _steps
from lifelong_jax.importance.estimators import empirical_fisher_diagonal
from lifelong_jax.importance.normalization import normalize_importance
from lifelong_jax.types import Examples, LossFn, Params


class RiemannianWalkState(NamedTuple):
    """The state of `riemannian_walk`: four times the size of the parameters, and the wrapped optimiser's state.

    Attributes:
      count: the number of steps made in the current interval, an int32 scalar.
      checkpoint: the parameters at the start of the interval.
      path: each parameter's share in the decrease of the loss in this interval.
      score: s, the sum over the intervals that ended, earlier tasks included.
      share: the weight of this task's intervals in `score`: 1 for the first task, ½ for any other.
      damping: ε, needed for the interval that the task's end cuts short.
      fisher: F, the moving average of the empirical Fisher diagonals of batches.
      started: whether `fisher` has averaged any batch.
      fidelity: whether the updates are applied as they were returned.
      inner_state: the wrapped optimiser's state.
    """

    count: jax.Array  # type: ignore[assignment]  # the name of optax's own counters
    checkpoint: Params
    path: Params
    score: Params
    share: jax.Array
    damping: jax.Array
    fisher: Params
    started: jax.Array
    fidelity: _steps.Fidelity
    inner_state: optax.OptState


def riemannian_walk(
    optimizer: optax.GradientTransformation,
    *,
    interval: int = 10,
    alpha: float = 0.2,
    damping: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a whole optimiser, the penalty included, and gathers what `rwalk_importance` needs.

    At the start of each interval of steps, the empirical Fisher diagonal of that step's batch is averaged in (eq. 6):

        fisher ← alpha · mean_n (∂ loss_fn(params, examples[n]) / ∂params)² + (1 − alpha) · fisher

    In each step, as in `path_integral`, path ← path − grads · Δ. At the end of the interval (eq. 7):

        score ← score + max(0, path) / (½ · fisher · (params − checkpoint)² + damping)
        checkpoint ← params,    path ← 0

    The Fisher diagonal needs the gradients of single examples, and a batch's gradient does not contain them. So
    `update` takes the batch, and computes these gradients once per interval. (The authors' code, Avalanche and FACIL
    square the batch's mean gradient: about 1 / batch size of the diagonal if noise dominates the gradients, and another
    quantity otherwise.) The paper's alpha is 0.9, but the authors' code first averages over an interval's batches. With
    one batch per interval, 0.2 averages over about as many batches.

    Args:
      optimizer: a complete optax pipeline, as for `path_integral`.
      interval: Δt, the number of steps per interval: 10 for MNIST and 50 for CIFAR in the paper.
      alpha: α, the weight of a new batch in the moving average, above 0 and at most 1. The first batch has weight 1.
      damping: ε, above 0; 1e-3 in the authors' code.

    Returns:
      An optimiser that makes the same updates, and passes extra arguments on. Its `update` also takes the loss and the
      examples that the gradient was computed from: `loss_fn`, `examples` and, unless they are ones, `weights`, as for
      `empirical_fisher_diagonal`. `learn_task` passes them.

    Raises:
      ValueError: if `interval` is not a positive integer, or if `alpha` or `damping` is out of bounds; from `init` and
        `update`, as for `path_integral`; from `update`, also if `loss_fn` or `examples` is missing.
      TypeError: from `init`, if a leaf of the parameters is not floating-point.

    Example:
      >>> loss_fn = lambda params, x: 0.5 * (params - x) ** 2
      >>> optimizer = riemannian_walk(optax.sgd(0.5), interval=1)
      >>> params, examples = jnp.array(2.0), jnp.array([-1.0, 1.0])
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params, loss_fn=loss_fn, examples=examples)
      >>> state.fisher, state.score.round(3)  # (3² + 1²) / 2, and 2 / (½ · 5 · 1² + 0.001)
      (Array(5., dtype=float32), Array(0.8, dtype=float32))

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 6 and 7.
    """
    _checks.check_positive_integer("interval", interval)
    _checks.check_positive("alpha", alpha, at_most=1)
    _checks.check_positive("damping", damping)
    optimizer = with_extra_args(optimizer)

    def init_fn(params: Params) -> RiemannianWalkState:
        inner_state = _steps.init_inner("riemannian_walk", optimizer, params)
        return _init_state(params, damping, inner_state)

    def update_fn(
        updates: optax.Updates,
        state: RiemannianWalkState,
        params: Params | None = None,
        *,
        loss_fn: LossFn | None = None,
        examples: Examples | None = None,
        weights: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RiemannianWalkState]:
        _steps.check_update("riemannian_walk", updates, params)
        if loss_fn is None or examples is None:
            raise ValueError(
                "riemannian_walk needs the loss and the batch: call optimizer.update(grads, state, params, "
                "loss_fn=loss_fn, examples=batch, **consolidation._asdict())."
            )
        grads = updates
        # Inside of `jax.shard_map`, a shard has the Fisher information of its own examples: both branches' must vary.
        averaged = vary_with((state.fisher, state.started), like=(state.fisher, params, examples, weights))
        others = (jnp.asarray(alpha), params, Partial(loss_fn), examples, weights)
        fisher, started = jax.lax.cond(state.count == 0, _average_fisher, _keep_fisher, *averaged, *others)
        extra_args |= {"loss_fn": loss_fn, "examples": examples, "weights": weights}
        updates, inner_state = optimizer.update(grads, state.inner_state, params, **extra_args)
        moved = _steps.apply(params, updates)
        path = _steps.add_contribution(state.path, grads, params, moved)
        state = state._replace(path=path, fisher=fisher, started=started, inner_state=())
        return updates, _count_step(state, interval, params, moved)._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rwalk_importance(opt_state: optax.OptState, params: Params) -> Params:
    """Computes the importance of RWalk after a task: the Fisher information and the score of the path, in equal parts.

        importance = fisher / max(fisher) + score / max(score)

    The maxima are over all parameters, because the paper scales both terms to [0, 1]. The score covers all steps,
    including an interval that the task's end cuts short.

    If each task's state took over the last one's scores by `continue_walk`, this is the importance for *all* tasks so
    far. Pass it to `consolidate(..., rule="latest", decay=0)`, which replaces the earlier importance by it. The paper's
    penalty has no factor ½, so its λ is half our strength. The paper also replays examples of earlier tasks, which this
    does not.

    Args:
      opt_state: the state of a `riemannian_walk` optimiser after the task's last step.
      params: the parameters after that step.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider; entries in [0, 2].

    Raises:
      TypeError: if `opt_state` is not the state of a `riemannian_walk` that is outermost.
      ValueError: if `params` differs from the parameters in the state in structure or shapes; outside of jit, also if
        the updates were not applied as `riemannian_walk` returned them.

    Example:
      >>> loss_fn = lambda params, x: 0.5 * jnp.sum((params - x) ** 2)
      >>> optimizer = riemannian_walk(optax.sgd(0.5))
      >>> params, examples = jnp.array([2.0, 0.0]), jnp.array([[-1.0, 1.0], [1.0, -1.0]])
      >>> updates, state = optimizer.update(params, optimizer.init(params), params, loss_fn=loss_fn, examples=examples)
      >>> rwalk_importance(state, optax.apply_updates(params, updates)).round(3)
      Array([2. , 0.2], dtype=float32)

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 8, and the averages that follow it.
    """
    state = _steps.find_state("riemannian_walk", RiemannianWalkState, opt_state)
    _steps.check_end("riemannian_walk", params, state.checkpoint, state.fidelity)
    fisher, score = (normalize_importance(tree, "max") for tree in (state.fisher, _score_at(state, params)))
    return jax.tree.map(jnp.add, fisher, score)


def continue_walk(opt_state: optax.OptState, previous: optax.OptState) -> optax.OptState:
    """Carries RWalk's memory of earlier tasks over to the optimiser state of the next task.

        score = ½ (score of the tasks before) + ½ (score of the next task)

    The moving average of the Fisher diagonals goes on. The rest of the state is fresh.

    Args:
      opt_state: a fresh state for the next task, `optimizer.init(params)`.
      previous: the state in which the last task ended, at the same parameters.

    Returns:
      The state to start the next task with. It shares no array with `previous`.

    Raises:
      TypeError: if `opt_state` or `previous` is not the state of a `riemannian_walk` that is outermost.

    Example:
      >>> optimizer = riemannian_walk(optax.sgd(0.5))
      >>> last = optimizer.init(jnp.array(2.0))._replace(score=jnp.array(3.0))
      >>> state = continue_walk(optimizer.init(jnp.array(2.0)), last)
      >>> state.score, state.share
      (Array(1.5, dtype=float32), Array(0.5, dtype=float32))

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 6 and after eq. 8.
    """
    ended = _steps.find_state("riemannian_walk", RiemannianWalkState, previous)

    def carry(fresh: Any) -> Any:
        if not isinstance(fresh, RiemannianWalkState):
            return fresh
        score = jax.tree.map(lambda score: score / 2, _score_at(ended, fresh.checkpoint))
        return fresh._replace(
            score=score,
            share=jnp.full((), 0.5, jnp.float32),
            fisher=jax.tree.map(jnp.copy, ended.fisher),
            started=jnp.copy(ended.started),
        )

    _steps.find_state("riemannian_walk", RiemannianWalkState, opt_state)
    return jax.tree.map(carry, opt_state, is_leaf=lambda node: isinstance(node, RiemannianWalkState))


def _init_state(params: Params, damping: float, inner_state: optax.OptState) -> RiemannianWalkState:
    return RiemannianWalkState(
        count=jnp.zeros((), jnp.int32),
        checkpoint=jax.tree.map(jnp.copy, params),
        path=widened_zeros(params),
        score=widened_zeros(params),
        share=jnp.ones((), jnp.float32),
        damping=jnp.asarray(damping, jnp.result_type(float)),
        fisher=widened_zeros(params),
        started=jnp.zeros((), bool),
        fidelity=_steps.init_fidelity(),
        inner_state=inner_state,
    )


def _average_fisher(
    fisher: Params,
    started: jax.Array,
    alpha: jax.Array,
    params: Params,
    loss_fn: LossFn,
    examples: Examples,
    weights: jax.Array | None,
) -> tuple[Params, jax.Array]:
    if weights is None:
        weights = jnp.ones(jax.tree.leaves(examples)[0].shape[:1])
    has_examples = jnp.any(weights > 0)
    weights = jnp.where(has_examples, weights, jnp.ones_like(weights))
    batch_fisher = empirical_fisher_diagonal(loss_fn, params, examples, weights=weights)
    # A batch that is all padding has rate 0.
    rate = jnp.where(has_examples, jnp.where(started, alpha, jnp.ones_like(alpha)), jnp.zeros_like(alpha))
    averaged = jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), fisher, batch_fisher)
    return averaged, started | has_examples


def _keep_fisher(fisher: Params, started: jax.Array, *others: Any) -> tuple[Params, jax.Array]:
    return fisher, started


def _count_step(state: RiemannianWalkState, interval: int, params: Params, moved: Params) -> RiemannianWalkState:
    """Counts a step from `params` to `moved`; ends the interval if it is the last, and updates the fidelity."""
    count = (state.count + 1) % interval
    # A loop of one round or none, because a `cond` would copy the whole state in every step.
    num_rounds = ((count == 0) | _steps.is_unknown(state.fidelity)).astype(jnp.int32)
    carry = (state._replace(count=count), params, moved)
    state, *_ = jax.lax.fori_loop(0, num_rounds, _end_step, vary_with(carry, like=carry))
    # The count from before the loop: under vmap, the loop's result is batched, and then `update_fn` would compute both
    # branches of its `cond` in every step.
    return state._replace(count=count)


def _end_step(_: jax.Array, carry: tuple[RiemannianWalkState, Params, Params]) -> tuple[Any, Params, Params]:
    """Updates the fidelity if it is unknown, and ends the interval if this is its last step."""
    state, params, moved = carry
    updated = _steps.update_fidelity(state.fidelity, params, state.checkpoint, moved)
    fidelity = jax.tree.map(functools.partial(jnp.where, _steps.is_unknown(state.fidelity)), updated, state.fidelity)
    continued = state._replace(fidelity=fidelity)
    ended = state._replace(
        checkpoint=moved,
        path=jax.tree.map(jnp.zeros_like, state.path),
        score=_score_at(state, moved),
        fidelity=fidelity._replace(distance=jnp.zeros_like(fidelity.distance)),
    )
    return jax.tree.map(functools.partial(jnp.where, state.count == 0), ended, continued), params, moved


def _score_at(state: RiemannianWalkState, params: Params) -> Params:
    """Computes the score if the current interval ends at `params`."""

    def of_leaf(
        score: jax.Array, path: jax.Array, fisher: jax.Array, checkpoint: jax.Array, theta: jax.Array
    ) -> jax.Array:
        divergence = fisher * jnp.square(_steps.difference(theta, checkpoint)) / 2
        ratio = jnp.maximum(path, 0) / (divergence + state.damping.astype(path.dtype))
        return score + state.share.astype(score.dtype) * ratio

    return jax.tree.map(of_leaf, state.score, state.path, state.fisher, state.checkpoint, params)
