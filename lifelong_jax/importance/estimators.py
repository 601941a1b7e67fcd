"""Importances that are computed after a task: Fisher diagonals, and the sensitivities of memory-aware synapses.

Each importance is a mean over examples of a quantity of one example. This module defines the outputs of each
importance, and names the cotangents that are pulled back from them (`cotangents.py`). `structured.py` or `reference.py`
computes the sum over examples.

Each importance is compiled once per function and shapes. As in any `jax.jit`, whatever else the function reads (a
global, an attribute) becomes a constant. So put a value that changes, such as the mask of a head, into the parameters
or the examples, or pass a `jax.tree_util.Partial(function, value)`, whose arrays are arguments.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lifelong_jax import _checks
from lifelong_jax._meshes import Layout, check_places, find_layout
from lifelong_jax._numerics import refuse_to_differentiate, scale_weights, vary_with
from lifelong_jax.importance import cotangents, reference, structured
from lifelong_jax.importance.accumulation import Accumulation, add_batch, divide
from lifelong_jax.importance.cotangents import Cotangents
from lifelong_jax.importance.layers import layer_outputs
from lifelong_jax.importance.meshes import sum_over_mesh
from lifelong_jax.importance.microbatches import Reduction
from lifelong_jax.types import Example, Examples, LogitsFn, LossFn, OutputFn, Params

Algorithm: TypeAlias = Literal["structured", "reference"]

_SUMS = {"structured": structured.sum_over_examples, "reference": reference.sum_over_examples}


def empirical_fisher_diagonal(
    loss_fn: LossFn,
    params: Params,
    examples: Examples,
    *,
    num_samples: int | None = None,
    key: jax.Array | None = None,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
    into: Accumulation | None = None,
) -> Any:
    """Computes the diagonal of the empirical Fisher information: the mean squared gradient at the true labels.

        importance = mean_n Σ_label (∂ loss_fn(params, examples[n])[label] / ∂params)²

    Each example's own gradient is squared, not a batch's mean gradient, so the result depends on no batch size. For
    examples that the model predicts well, it is much smaller than `fisher_diagonal`: if the true class has probability
    p, it falls like (1 − p)², and the other like 1 − p.

    An example with several labels, such as a sequence of tokens, has a choice:

    - An array of losses, one for each label: each label's gradient is squared by itself. So does the model's Fisher,
      `fisher_diagonal`: for labels drawn from the model, the gradients of different labels are uncorrelated.
    - Their sum, a scalar: its gradient is squared as a whole, with the products of the gradients of different labels.
      For true labels these do not cancel: if the labels of an example pull in one direction, the importance is larger
      by up to the number of labels.

    Any array is taken for losses, so do not return logits by mistake. It is noticed only where an example has inputs,
    one label, which is an integer, and no array of as many entries.

    The array takes a backward pass for each label, at most 4,096. With `num_samples`, each pass takes the sum of all
    losses with random signs: the products then have mean 0, so the estimate is unbiased, with a relative standard error
    of at most sqrt(2 / num_samples) for one example, and less by a root of the number of examples for their mean.

    Args:
      loss_fn: `loss_fn(params, example) -> scalar`, the negative log-likelihood of one example, without batch axis, or
        `[num_labels]`, that of each of its labels: 0 for padding. Pass the same function object in every call: another
        one is compiled again.
      params: a tree of floating-point arrays.
      examples: a tree of arrays `[num_examples, ...]`, with the labels.
      num_samples: how many draws of random signs per example, or None for a pass for each label. A scalar loss needs no
        signs, and takes one pass.
      key: the random key of the signs, which do not depend on the microbatch size.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      method: as for `fisher_diagonal`.
      into: as for `fisher_diagonal`.

    Returns:
      As for `fisher_diagonal`.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if there are no examples, if leaves differ in their number, if weights are negative, all 0 or outside
        the range of float32, if only one of `num_samples` and `key` is given, if there are too many labels for a pass
        each, if there are several losses for one label, or if `method` is unknown.

    Example:
      >>> losses_fn = lambda params, example: 0.5 * (params * example["x"] - example["y"]) ** 2
      >>> examples = {"x": jnp.array([[1.0, 2.0]]), "y": jnp.array([[0.0, 2.0]])}  # one example of two labels
      >>> empirical_fisher_diagonal(losses_fn, jnp.array(2.0), examples)  # 2² + 4²
      Array(20., dtype=float32)
      >>> loss_fn = lambda params, example: jnp.sum(losses_fn(params, example))
      >>> empirical_fisher_diagonal(loss_fn, jnp.array(2.0), examples)  # (2 + 4)²
      Array(36., dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114; on the two Fishers, Kunstner et al. 2019, arXiv 1905.12558; on
    signs, Hutchinson 1989, doi 10.1080/03610918908812806.
    """
    cotangents_fn = loss_cotangents(num_samples, key)
    check_arguments(params, "examples", examples, weights, microbatch_size, into)
    _checks.check_labels(loss_fn, "examples", params, examples)
    sum_fn = _sum_fn(method, "sum_of_squares")
    losses_fn = Partial(losses_of_labels, as_tree(loss_fn))
    return mean_over_examples(losses_fn, cotangents_fn, params, examples, key, weights, sum_fn, microbatch_size, into)


def fisher_diagonal(
    logits_fn: LogitsFn,
    params: Params,
    inputs: Examples,
    *,
    likelihood: Literal["categorical", "gaussian", "bernoulli"] = "categorical",
    num_samples: int | None = None,
    key: jax.Array | None = None,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
    into: Accumulation | None = None,
) -> Any:
    """Computes the diagonal of the Fisher information: the expected squared gradient at labels from the model itself.

        importance = mean_n E_y (∂ log p(y | logits_fn(params, inputs[n])) / ∂params)²

    The expectation is exact, or a mean over `num_samples` sampled labels per example. `likelihood` names p:

    - "categorical": y is a class, with p = softmax(logits) over the last axis. Leading axes (tokens) are independent
      labels of one example. The exact expectation takes num_labels · (num_classes − 1) backward passes; "structured"
      skips classes that have probability 0 in all examples (those outside of a head, say).
    - "gaussian": y is a vector, normally distributed around the logits with unit variance. The exact expectation takes
      a backward pass for each output. A sample is Hutchinson's estimate of the diagonal: its relative standard error is
      sqrt(2 / num_samples) for one example, and less by a root of the number of examples for their mean.
    - "bernoulli": y is a vector of independent binary outputs, with p = sigmoid(logits). The exact expectation takes a
      backward pass for each output.

    A sample takes one backward pass, whatever the likelihood. The memory does not depend on the number of passes. An
    exact expectation of more than 4,096 passes per example is refused.

    Inputs that have a batch axis by mistake, `[num_batches, batch_size, ...]`, are taken for examples with `batch_size`
    labels each, and the importance is about `batch_size` times too large. The exact expectation pulls back combinations
    of classes, so custom derivatives inside of `logits_fn` must be linear: gradients must not be clipped there.

    Args:
      logits_fn: `logits_fn(params, x) -> [..., num_classes]`, for one x without batch axis. Mask classes outside of a
        head here: `jnp.where(mask, logits, jnp.finfo(logits.dtype).min)`. Pass the same function object in every call:
        another one is compiled again.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      likelihood: "categorical", "gaussian" or "bernoulli".
      num_samples: how many labels to sample per example, or None for the exact expectation.
      key: the random key of the samples, which do not depend on the microbatch size.
      weights: `[num_examples]`, not negative; the mean divides by their sum. An example of weight 0 is absent, whatever
        it is. None weighs all examples equally.
      microbatch_size: the largest number of examples computed together; the result does not depend on it.
      method: "structured" costs about one ordinary gradient per backward pass; "reference" computes each example's
        gradient in full. Both are exact.
      into: the `Accumulation` of earlier examples, to which these are added, or None. It is donated: use the result in
        its place. See `accumulation`.

    Returns:
      A tree like `params`, in its dtypes or float32, whichever is wider; with `into`, the `Accumulation` of all
      examples so far.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if there are no inputs, if leaves differ in their number, if weights are negative, all 0 or outside
        the range of float32, if `likelihood` or `method` is unknown, if only one of `num_samples` and `key` is given,
        if the exact expectation takes too many passes, or if `into` was made for other parameters. With `into`, all
        weights may be 0.

    Example:
      >>> logits_fn = lambda params, x: params * x
      >>> fisher_diagonal(logits_fn, jnp.zeros(2), jnp.array([[1.0, 1.0], [2.0, 2.0]])).round(3)
      Array([0.625, 0.625], dtype=float32)

    Kirkpatrick et al. 2017, doi 10.1073/pnas.1611835114; Martens 2020, arXiv 1412.1193, §5.
    """
    cotangents_fn = fisher_cotangents(likelihood, num_samples, key)
    check_arguments(params, "inputs", inputs, weights, microbatch_size, into)
    sum_fn = _sum_fn(method, "sum_of_squares")
    return mean_over_examples(
        as_tree(logits_fn), cotangents_fn, params, inputs, key, weights, sum_fn, microbatch_size, into
    )


def mas_importance(
    output_fn: OutputFn,
    params: Params,
    inputs: Examples,
    *,
    output_norm: Literal["squared_l2", "jacobian"] = "squared_l2",
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
    into: Accumulation | None = None,
) -> Any:
    """Computes the importance of memory-aware synapses: how sensitive the outputs are to each parameter.

        importance = mean_n |∂ ‖output_fn(params, inputs[n])‖² / ∂params|              "squared_l2"
        importance = mean_n sqrt(Σ_o (∂ output_fn(params, inputs[n])_o / ∂params)²)    "jacobian"

    The absolute value is taken per example, so opposite examples do not cancel.

    Args:
      output_fn: `output_fn(params, x) -> array` of any shape, for one x without batch axis. Mask outputs outside of a
        head here: `jnp.where(mask, outputs, 0)`. Pass the same function object in every call: another one is
        compiled again.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      output_norm: "squared_l2" takes one backward pass per example, "jacobian" one for each output, of which there may
        be 4,096.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      method: as for `fisher_diagonal`.
      into: as for `fisher_diagonal`.

    Returns:
      As for `fisher_diagonal`.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if there are no inputs, if leaves differ in their number, if weights are negative, all 0 or outside
        the range of float32, if `output_norm` or `method` is unknown, or if there are too many outputs for "jacobian".

    Example:
      >>> mas_importance(lambda params, x: params * x, jnp.array(1.0), jnp.array([1.0, -3.0]))
      Array(10., dtype=float32)

    Aljundi et al. 2018, arXiv 1711.09601, eq. 2 ("jacobian") and §4.1 ("squared_l2").
    """
    _checks.check_choice("output_norm", output_norm, ("squared_l2", "jacobian"))
    check_arguments(params, "inputs", inputs, weights, microbatch_size, into)
    cotangents_fn = cotangents.squared_l2 if output_norm == "squared_l2" else cotangents.jacobian
    sum_fn = _sum_fn(method, "norm")
    return mean_over_examples(
        as_tree(output_fn), cotangents_fn, params, inputs, None, weights, sum_fn, microbatch_size, into
    )


def local_mas_importance(
    output_fn: OutputFn,
    params: Params,
    inputs: Examples,
    *,
    weights: jax.Array | None = None,
    microbatch_size: int | None = None,
    method: Algorithm = "structured",
    into: Accumulation | None = None,
) -> Any:
    """Computes local memory-aware synapses: how sensitive each layer's output is to that layer's own parameters.

        importance = mean_n |∂ ‖output of the layer, for inputs[n]‖² / ∂params|,    the layer's input held fixed

    For a dense layer y = relu(x @ w + b), that is 2 · mean_n y_j |x_i| for w_ij, and 2 · mean_n y_j for b_j. If inputs
    are not negative, this is Hebb's rule; the paper omits the factor 2. The importance equals `mas_importance` in the
    last layer, and in every layer whose later layers keep the norm.

    Args:
      output_fn: `output_fn(params, x) -> array` of any shape, for one x without batch axis. It marks the end of each
        layer but the last with `layer_output`. Mask outputs outside of a head here: `jnp.where(mask, outputs, 0)`.
        Pass the same function object in every call: another one is compiled again.
      params: a tree of floating-point arrays.
      inputs: a tree of arrays `[num_examples, ...]`; no labels.
      weights: as for `fisher_diagonal`.
      microbatch_size: as for `fisher_diagonal`.
      method: as for `fisher_diagonal`.
      into: as for `fisher_diagonal`.

    Returns:
      As for `fisher_diagonal`.

    Raises:
      TypeError: if a leaf of `params` is not floating-point.
      ValueError: if `output_fn` marks no layer, or the last one, or one inside of a loop or a branch; if there are no
        inputs, if leaves differ in their number, if weights are negative, all 0 or outside the range of float32, or if
        `method` is unknown.

    Example:
      >>> from lifelong_jax import layer_output
      >>> network = lambda params, x: layer_output(jax.nn.relu(x @ params[0])) @ params[1]
      >>> params = [jnp.array([[1.0, -1.0]]), jnp.array([[2.0], [3.0]])]
      >>> first, _ = local_mas_importance(network, params, jnp.array([[1.0], [3.0]]))
      >>> first  # twice the mean of 1 · 1 and 3 · 3; the second unit is silent
      Array([[10.,  0.]], dtype=float32)

    Aljundi et al. 2018, arXiv 1711.09601, §4.3.
    """
    layers_fn = Partial(layer_outputs, as_tree(output_fn))
    importance = mas_importance(
        layers_fn, params, inputs, weights=weights, microbatch_size=microbatch_size, method=method, into=into
    )
    return refuse_to_differentiate(_NO_LOCAL_DERIVATIVE, importance)


_NO_LOCAL_DERIVATIVE = (
    "local_mas_importance cannot be differentiated, because it holds each layer's input fixed. Compute it from "
    "jax.lax.stop_gradient(params), or differentiate mas_importance."
)


def mean_over_examples(
    output_fn: Partial,
    cotangents_fn: Callable[..., Cotangents],
    params: Params,
    examples: Examples,
    key: jax.Array | None,
    weights: jax.Array | None,
    sum_over_examples: Callable[..., Any],
    microbatch_size: int | None,
    into: Accumulation | None = None,
) -> Any:
    """Computes the weighted mean of what `sum_over_examples` sums, or adds to the one in `into`."""
    check_places(params=params, examples=examples, weights=weights, key=key, into=into, function=output_fn)
    layout = find_layout(params, (examples, weights), (output_fn, key, into))
    arguments = (output_fn, cotangents_fn, params, examples, key, weights, sum_over_examples, microbatch_size, into)
    return _mean_over_examples(*arguments, layout)


@functools.partial(jax.jit, static_argnums=(1, 6, 7, 9), donate_argnames=("into",))
def _mean_over_examples(
    output_fn: Partial,
    cotangents_fn: Callable[..., Cotangents],
    params: Params,
    examples: Examples,
    key: jax.Array | None,
    weights: jax.Array | None,
    sum_over_examples: Callable[..., Any],
    microbatch_size: int | None,
    into: Accumulation | None,
    layout: Layout | None,
) -> Any:
    def keyed_cotangents(key: jax.Array | None, first: ArrayLike, outputs: jax.Array, index: jax.Array) -> Cotangents:
        if not isinstance(outputs, jax.Array) or not jnp.issubdtype(outputs.dtype, jnp.floating) or outputs.size == 0:
            returned = jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", outputs)
            raise ValueError(
                f"the function must return one floating-point array, with entries, for one example, not {returned}."
            )
        example_key = None if key is None else jax.random.fold_in(key, first + index)
        return vary_with(cotangents_fn(outputs, example_key), like=outputs)

    arguments = (Partial(_of_one_example, output_fn), params, examples, key, weights, into)
    output_fn, params, examples, key, weights, into = vary_with(arguments, like=arguments)
    num_examples = jax.tree.leaves(examples)[0].shape[0]
    sum_fn = functools.partial(sum_over_examples, microbatch_size=microbatch_size)

    def sum_from(first: ArrayLike, weights: jax.Array | None, start: Any) -> Any:
        cotangents_fn = Partial(keyed_cotangents, key, first)
        return sum_over_mesh(sum_fn, layout, output_fn, cotangents_fn, params, examples, weights, start)

    if into is not None:
        return add_batch(into, functools.partial(sum_from, into.num_examples), num_examples, weights)
    weights = None if weights is None else scale_weights(weights)
    return divide(sum_from(0, weights, None), num_examples if weights is None else jnp.sum(weights))


def _of_one_example(output_fn: Callable, params: Params, example: Example) -> Any:
    with _checks.for_one_example("the function", example):
        return output_fn(params, example)


def losses_of_labels(loss_fn: Callable, params: Params, example: Example) -> Any:
    """Computes the losses of an example's labels, and refuses what are logits, as far as shapes can tell."""
    losses, leaves = loss_fn(params, example), jax.tree.leaves(example)
    sizes = {jnp.size(leaf) for leaf in leaves}
    classes = [leaf for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.integer)]
    of_one_label = bool(classes) and all(jnp.size(leaf) == 1 for leaf in classes) and max(sizes) > 1
    if of_one_label and isinstance(losses, jax.Array) and losses.size not in sizes | {1}:
        raise ValueError(
            f"loss_fn must return a scalar for an example of one label, not {losses.dtype}{list(losses.shape)}: are "
            f"these logits? If they are losses of several labels, let the example have an array of as many labels."
        )
    return losses


def as_tree(function: Callable) -> Partial:
    """Makes a function an argument of jitted functions.

    A `Partial` is a tree whose arrays are traced. A plain function becomes part of the tree's structure.
    """
    return function if isinstance(function, Partial) else Partial(function)


def fisher_cotangents(likelihood: str, num_samples: int | None, key: jax.Array | None) -> Callable[..., Cotangents]:
    """Returns the cotangents of a likelihood, after checking the arguments that name them."""
    _checks.check_choice("likelihood", likelihood, tuple(cotangents.EXACT))
    _check_sampling(num_samples, key, "sample labels, or neither for the exact expectation")
    return cotangents.EXACT[likelihood] if num_samples is None else cotangents.sampled(likelihood, num_samples)


def loss_cotangents(num_samples: int | None, key: jax.Array | None) -> Callable[..., Cotangents]:
    """Returns the cotangents of losses, after checking the arguments that name them."""
    _check_sampling(num_samples, key, "draw signs of labels, or neither for a pass for each label")
    return cotangents.of_losses(num_samples)


def _check_sampling(num_samples: int | None, key: jax.Array | None, purpose: str) -> None:
    _checks.check_positive_integer("num_samples", num_samples, optional=True)
    if (num_samples is None) != (key is None):
        raise ValueError(
            f"num_samples and key go together: give both to {purpose}; num_samples is {num_samples} and key is "
            f"{'not ' if key is not None else ''}None."
        )


def check_arguments(
    params: Params,
    name: str,
    examples: Examples,
    weights: jax.Array | None,
    microbatch_size: int | None,
    into: Accumulation | None,
) -> None:
    """Checks the arguments that all estimators share."""
    _checks.check_params("params", params)
    _checks.check_examples(name, examples, weights, may_be_padding=into is not None)
    _checks.check_positive_integer("microbatch_size", microbatch_size, optional=True)
    if into is not None and not isinstance(into, Accumulation):
        raise TypeError(f"into must be an Accumulation, from init_accumulation(params), not a {type(into).__name__}.")


@functools.cache  # one function object per setting, so jit compiles once per setting
def _sum_fn(method: Algorithm, reduction: Reduction) -> Callable[..., Params]:
    _checks.check_choice("method", method, tuple(_SUMS))
    return functools.partial(_SUMS[method], reduction=reduction)
