"""RWalk: an online Fisher information and a score of the path, gathered while training, as a wrapper.

It is used as `path_integral` is, which see; in addition, the update takes the batch:

    optimizer = riemannian_walk(optax.chain(add_quadratic_penalty(λ), optax.adam(lr)))
    updates, state = optimizer.update(
        grads, state, params, loss_fn=loss_fn, examples=batch, **consolidation._asdict()
    )

RWalk's importance is that for all tasks so far, so a task's state takes over from the last one's:

    consolidation = consolidate(consolidation, params, rwalk_importance(state, params), rule="latest", decay=0.0)
    state = continue_walk(optimizer.init(params), state)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from lifelong_jax import _checks, _path
from lifelong_jax.consolidation import normalize_importance
from lifelong_jax.importance import empirical_fisher_diagonal
from lifelong_jax.per_example import zeros_like_sum
from lifelong_jax.types import Examples, LossFn, Params


class RiemannianWalkState(NamedTuple):
    """What `riemannian_walk` keeps: four times the size of the parameters, and the state of what it wraps.

    Attributes:
      count: steps made in the current interval, an int32 scalar.
      checkpoint: the parameters where the interval began.
      path: each parameter's share in the fall of the loss in this interval.
      score: s, of the intervals that ended; that of earlier tasks is in it.
      share: what this task counts in `score`: 1 if it is the first, else ½.
      damping: ε, for the interval that the task's end cuts short.
      fisher: F, the moving average of the empirical Fisher diagonals of batches.
      started: whether `fisher` holds a batch's yet.
      fidelity: whether the updates are applied as they were returned.
      inner_state: the wrapped optimiser's state.
    """

    count: jax.Array
    checkpoint: Params
    path: Params
    score: Params
    share: jax.Array
    damping: jax.Array
    fisher: Params
    started: jax.Array
    fidelity: _path.Fidelity
    inner_state: optax.OptState


def riemannian_walk(
    optimizer: optax.GradientTransformation,
    *,
    interval: int = 10,
    alpha: float = 0.2,
    damping: float = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a whole optimiser, the penalty included, and gathers what `rwalk_importance` needs.

    At the beginning of each interval of steps, with the empirical Fisher diagonal of that step's batch (eq. 6):

        fisher ← alpha · mean_n (∂ loss_fn(params, examples[n]) / ∂params)² + (1 − alpha) · fisher

    in each step, as in `path_integral`, path ← path − updates · Δ; and at the interval's end (eq. 7):

        score ← score + max(0, path) / (½ · fisher · (params − checkpoint)² + damping)
        checkpoint ← params,    path ← 0

    The Fisher is of single examples, which an optimiser does not see in a batch's gradient: `update` takes the batch,
    and once per interval computes one gradient more. (The authors' code, Avalanche and FACIL square the mean gradient
    of the batch: where noise prevails that is about 1 / batch size of it, and where it does not, something else.) The
    paper's alpha is 0.9, but the authors' code first averages over an interval's batches; with one batch per interval,
    0.2 averages over about as many.

    Args:
      optimizer: any optax transform that needs nothing before or after it, as for `path_integral`.
      interval: Δt, steps per interval: 10 for MNIST and 50 for CIFAR in the paper.
      alpha: α, what a new batch counts in the moving average, above 0 and at most 1. The first one counts wholly.
      damping: ε, above 0; 1e-3 in the authors' code.

    Returns:
      An optimiser that makes the same updates, and hands extra arguments on. Its `update` takes `loss_fn`, `examples`
      and `weights` as for `empirical_fisher_diagonal`, `weights` for ones by default: what the gradient was computed
      from. `learn_task` hands them over.

    Raises:
      ValueError: if `interval` is not a positive integer, if `alpha` or `damping` is out of bounds; from `init` and
        `update`, as for `path_integral`; from `update`, if `loss_fn` or `examples` is missing.
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
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: Params) -> RiemannianWalkState:
        inner_state = _path.init_inner("riemannian_walk", optimizer, params)
        return RiemannianWalkState(
            count=jnp.zeros((), jnp.int32),
            checkpoint=jax.tree.map(jnp.copy, params),
            path=zeros_like_sum(params),
            score=zeros_like_sum(params),
            share=jnp.ones((), jnp.float32),
            damping=jnp.asarray(damping, jnp.result_type(float)),
            fisher=zeros_like_sum(params),
            started=jnp.zeros((), bool),
            fidelity=_path.init_fidelity(),
            inner_state=inner_state,
        )

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
        _path.check_update("riemannian_walk", updates, params)
        if loss_fn is None or examples is None:
            raise ValueError(
                "riemannian_walk needs the loss and the batch: call optimizer.update(grads, state, params, "
                "loss_fn=loss_fn, examples=batch, **consolidation._asdict())."
            )
        grads = updates
        fisher, started = jax.lax.cond(
            state.count == 0,
            _average_fisher,
            _keep_fisher,
            *(state.fisher, state.started, jnp.asarray(alpha), params, Partial(loss_fn), examples, weights),
        )
        extra_args |= {"loss_fn": loss_fn, "examples": examples, "weights": weights}
        updates, inner_state = optimizer.update(grads, state.inner_state, params, **extra_args)
        moved = _path.apply(params, updates)
        path = _path.add_contribution(state.path, grads, params, moved)

        count = (state.count + 1) % interval
        # A loop of one round or none: a `cond` would copy in every step what it leaves as it is.
        rounds = ((count == 0) | _path.unknown(state.fidelity)).astype(jnp.int32)
        state = state._replace(count=count, path=path, fisher=fisher, started=started, inner_state=())
        state, *_ = jax.lax.fori_loop(0, rounds, _end_step, (state, params, moved))
        # The count as it was: under vmap, what comes out of the loop differs from run to run, and so would the `cond`.
        return updates, state._replace(count=count, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rwalk_importance(opt_state: optax.OptState, params: Params) -> Params:
    """Computes RWalk's importance after a task: of the Fisher information and of the path, in equal parts.

        importance = fisher / max(fisher) + score / max(score)

    The maxima are over all the parameters; the paper scales both to [0, 1]. The score is that of all the steps: an
    interval which the task's end cut short counts.

    It is the importance for *all* tasks so far, if each task's state took over the last one's by `continue_walk`: for
    `consolidate(..., rule="latest", decay=0)`, which puts it in the earlier one's place. The paper's penalty has no ½:
    its λ is half our strength. What it does with examples replayed from earlier tasks is left out.

    Args:
      opt_state: the optimiser's state after the task's last step; the optimiser is `riemannian_walk(...)`.
      params: the parameters after that step.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider; entries in [0, 2].

    Raises:
      TypeError: if `opt_state` is not that of a `riemannian_walk` which nothing comes before or after.
      ValueError: if `params` is unlike the parameters in the state, or, outside of jit, if the updates were not applied
        as `riemannian_walk` returned them.

    Example:
      >>> loss_fn = lambda params, x: 0.5 * jnp.sum((params - x) ** 2)
      >>> optimizer = riemannian_walk(optax.sgd(0.5))
      >>> params, examples = jnp.array([2.0, 0.0]), jnp.array([[-1.0, 1.0], [1.0, -1.0]])
      >>> updates, state = optimizer.update(params, optimizer.init(params), params, loss_fn=loss_fn, examples=examples)
      >>> rwalk_importance(state, optax.apply_updates(params, updates)).round(3)
      Array([2. , 0.2], dtype=float32)

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 8, and the averages after it.
    """
    state = _path.find_state("riemannian_walk", RiemannianWalkState, opt_state)
    _path.check_end("riemannian_walk", params, state.checkpoint, state.fidelity)
    fisher, score = (normalize_importance(tree, "max") for tree in (state.fisher, _score_at(state, params)))
    return jax.tree.map(jnp.add, fisher, score)


def continue_walk(opt_state: optax.OptState, previous: optax.OptState) -> optax.OptState:
    """Hands RWalk's memory of earlier tasks from one task's optimiser state to the next one's.

        score = ½ (score of the tasks before) + ½ (score of the task that now begins)

    and the moving average of the Fisher diagonals goes on. The rest of the state is fresh.

    Args:
      opt_state: a fresh state, `optimizer.init(params)`, for the task that begins.
      previous: the state in which the last task ended, at the same parameters.

    Returns:
      The state to begin with. None of its arrays is also in `previous`.

    Raises:
      TypeError: if `opt_state` is not that of a `riemannian_walk` which nothing comes before or after.

    Example:
      >>> optimizer = riemannian_walk(optax.sgd(0.5))
      >>> last = optimizer.init(jnp.array(2.0))._replace(score=jnp.array(3.0))
      >>> state = continue_walk(optimizer.init(jnp.array(2.0)), last)
      >>> state.score, state.share
      (Array(1.5, dtype=float32), Array(0.5, dtype=float32))

    Chaudhry et al. 2018, arXiv 1801.10112, eq. 6 and after eq. 8.
    """
    ended = _path.find_state("riemannian_walk", RiemannianWalkState, previous)

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

    _path.find_state("riemannian_walk", RiemannianWalkState, opt_state)
    return jax.tree.map(carry, opt_state, is_leaf=lambda node: isinstance(node, RiemannianWalkState))


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
    any_present = jnp.any(weights > 0)
    weights = jnp.where(any_present, weights, jnp.ones_like(weights))
    batch_fisher = empirical_fisher_diagonal(loss_fn, params, examples, weights=weights)
    # A batch of padding alone does not count.
    rate = jnp.where(any_present, jnp.where(started, alpha, jnp.ones_like(alpha)), jnp.zeros_like(alpha))
    averaged = jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), fisher, batch_fisher)
    return averaged, started | any_present


def _keep_fisher(fisher: Params, started: jax.Array, *others: Any) -> tuple[Params, jax.Array]:
    return fisher, started


def _end_step(_: jax.Array, carry: tuple[RiemannianWalkState, Params, Params]) -> tuple[Any, Params, Params]:
    """What happens where an interval ends, or it is not yet known whether updates are applied as they are returned."""
    state, params, moved = carry
    looked = _path.look(state.fidelity, params, state.checkpoint, moved)
    fidelity = jax.tree.map(functools.partial(jnp.where, _path.unknown(state.fidelity)), looked, state.fidelity)
    going_on = state._replace(fidelity=fidelity)
    ended = state._replace(
        checkpoint=moved,
        path=jax.tree.map(jnp.zeros_like, state.path),
        score=_score_at(state, moved),
        fidelity=fidelity._replace(distance=jnp.zeros_like(fidelity.distance)),
    )
    return jax.tree.map(functools.partial(jnp.where, state.count == 0), ended, going_on), params, moved


def _score_at(state: RiemannianWalkState, params: Params) -> Params:
    """The score when the current interval ends at `params`."""

    def of_leaf(
        score: jax.Array, path: jax.Array, fisher: jax.Array, checkpoint: jax.Array, theta: jax.Array
    ) -> jax.Array:
        divergence = fisher * jnp.square(_path.difference(theta, checkpoint)) / 2
        ratio = jnp.maximum(path, 0) / (divergence + state.damping.astype(path.dtype))
        return score + state.share.astype(score.dtype) * ratio

    return jax.tree.map(of_leaf, state.score, state.path, state.fisher, state.checkpoint, params)
