"""Merging: one network made of several that were trained from the same start, each on data of its own."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax import _checks, forms
from lifelong_jax._numerics import wide_dtype, widen
from lifelong_jax.compression import decompress
from lifelong_jax.types import Params


def merge_models(
    params_list: Sequence[Params],
    importances: Sequence[Params],
    *,
    floor: float | jax.Array = 0.3,
    weights: Sequence[float | jax.Array] | None = None,
) -> Params:
    """Averages the parameters of several networks, each weighted by how much it matters to its network.

        params = Σ_k weights_k (importances_k + floor · mean) params_k / Σ_k weights_k (importances_k + floor · mean)

    `mean` is the mean of all importances over all their entries, a number. So `floor` has no unit: the result does not
    change if all importances are multiplied by a number. With Fisher diagonals, the merged parameters are the mode of
    the product of the networks' Gaussian posteriors; `floor` adds the same precision to each parameter.

    Floor 0 trusts each ratio of importances, however small both are. The larger the floor, the nearer the result is to
    the plain average. It is the plain average where all importances are equal, and where all are 0.

    Each network's importances count by their size. If networks learned data of different kinds, one may outweigh the
    other everywhere, so pass each through `normalize_importance` first, unless their sizes mean something.

    Two copies of a network (64-64-64-10, bundled digits, Adam) learned two tasks. Their average accuracy on both, in
    percent, is a mean over four seeds; its standard error is 2 or less. A plain average has no importances:

        tasks                      plain   normalised, floor 0   0.1    0.3    1      not, floor 0   0.3
        5 classes and the others   94.2    94.5                  94.4   94.6   94.6   93.4           93.8
        8 classes and the others   93.4    92.0                  93.0   93.5   93.4   87.3           91.6
        rotations by 40 and −40°   41.3    63.6                  63.4   61.7   55.9   63.6           61.5

    Args:
      params_list: the networks' parameters, one or more trees of one structure. They should come from one pretrained
        network: parameters of networks that began apart do not correspond.
      importances: for each network, a tree like its parameters: `fisher_diagonal` on the data that it learned last,
        say; diagonal, in codes or not. Where all trees have None, nothing is merged, and None is returned.
      floor: how much is added to each importance, in means of all of them.
      weights: for each network, how much it counts; not negative, and not all 0. None for ones.

    Returns:
      A tree like `params_list[0]`, in its dtypes.

    Raises:
      TypeError: if a leaf is not floating-point.
      ValueError: if there are no networks, if there is not one importance, and one weight, for each, if trees differ in
        structure or shapes, or if there are Kronecker factors; outside of jit, if an importance is NaN, infinite or
        negative, a parameter is NaN or infinite, or `floor` or a weight is out of range.

    Example:
      >>> ours, theirs = jnp.array([0.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 1.0])
      >>> merge_models([ours, theirs], [jnp.array([3.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 0.0])], floor=0.0)
      Array([0.25, 0.5 , 0.5 ], dtype=float32)

    Matena and Raffel 2022, arXiv 2111.09832.
    """
    counts = [1.0] * len(params_list) if weights is None else weights
    if not params_list or not len(params_list) == len(importances) == len(counts):
        raise ValueError(
            f"merge_models needs one or more networks, and an importance and a weight for each, but has "
            f"{len(params_list)}, {len(importances)} and {len(counts)}."
        )
    _checks.check_not_negative("floor", floor)
    for index, (params, importance, weight) in enumerate(zip(params_list, importances, counts, strict=True)):
        name, its_importance = f"params_list[{index}]", f"importances[{index}]"
        _checks.check_not_negative(f"weights[{index}]", weight)
        _checks.check_params(name, params)
        _checks.check_params(its_importance, importance)
        _checks.check_same_structure(name, params, "params_list[0]", params_list[0])
        _checks.check_same_structure(its_importance, importance, name, params)
        its_forms = jax.tree.leaves(importance, is_leaf=forms.is_form)
        if any(isinstance(form, forms.KroneckerFactors) for form in its_forms):
            raise ValueError(
                f"{its_importance} has Kronecker factors, by which a mean of parameters has no closed form: take "
                f"forms.tree_map(forms.diagonal, importance)."
            )
        _checks.check_importance(its_importance, importance)
        _checks.check_finite(name, params)
    if all(map(_checks.is_concrete, counts)) and not np.any([np.asarray(count) > 0 for count in counts]):
        raise ValueError("weights are all 0: at least one network must count.")
    return _merge(list(params_list), list(importances), jnp.asarray(floor, float), jnp.asarray(counts, float))


@jax.jit
def _merge(params_list: list[Params], importances: list[Params], floor: jax.Array, weights: jax.Array) -> Params:
    num_models = len(params_list)
    importances = [forms.tree_map(decompress, importance) for importance in importances]
    weights = weights / jnp.max(weights)
    leaves = [widen(leaf).astype(weights.dtype) for leaf in jax.tree.leaves(importances)]
    largest = functools.reduce(jnp.maximum, [jnp.max(leaf, initial=0) for leaf in leaves], jnp.zeros((), weights.dtype))
    largest = jnp.where(largest > 0, largest, 1)  # all are divided by it, so that no sum overflows
    summed = functools.reduce(jnp.add, [jnp.sum(leaf / largest) for leaf in leaves], jnp.zeros((), weights.dtype))
    added = floor * summed / max(1, sum(leaf.size for leaf in leaves))

    def of_leaf(*arrays: jax.Array) -> jax.Array:
        dtype = wide_dtype(*arrays[:num_models])
        models, its_importances = [array.astype(dtype) for array in arrays[:num_models]], arrays[num_models:]
        scale, least, plain = (array.astype(dtype) for array in (largest, added, weights))
        precisions = [w * (widen(f).astype(dtype) / scale + least) for w, f in zip(plain, its_importances, strict=True)]
        total = functools.reduce(jnp.add, precisions)
        merged = models[0]
        for weight, precision, model in zip(plain[1:], precisions[1:], models[1:], strict=True):
            share = jnp.where(total > 0, precision / jnp.where(total > 0, total, 1), weight / jnp.sum(plain))
            merged += share * (model - models[0])
        return merged.astype(arrays[0].dtype)

    return jax.tree.map(of_leaf, *params_list, *importances)
