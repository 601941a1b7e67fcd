"""A parameter's gradient as a product of two factors, for dense layers, convolutions and look-ups.

A dense layer or a convolution is one product per group:

    outputs[group, position, column] = Σ_row operand[group, position, row] · weight[group, row, column]

With cotangents at the outputs, one example's gradient is

    gradient[group, row, column] = Σ_position operand[group, position, row] · cotangents[group, position, column]

Positions are tokens, pixels, or steps; with one position, the gradient is an outer product. An embedding look-up is a
dense layer whose rows are tokens and whose operand is one-hot; the one-hot operand is never made.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from lifelong_jax.importance.tapping import Use


@dataclasses.dataclass(frozen=True)
class Product:
    """The factors of a gradient if the equation is a dense layer or a convolution.

    Attributes:
      name: "dense" or "convolution".
      groups: the number of independent products.
      positions: the number of terms that a gradient sums.
      rows: the number of inputs that an output of the layer sums.
      columns: the number of the layer's output features per group.
      operand: maps the equation's other operand to `[groups, positions, rows]`.
      cotangents: maps the cotangents at the equation's output to `[groups, positions, columns]`.
      restore: maps `[groups, rows, columns]` to the shape of the weight.
      precision: the precision of the equation's products.
    """

    name: str
    groups: int
    positions: int
    rows: int
    columns: int
    operand: Callable[[jax.Array], jax.Array]
    cotangents: Callable[[jax.Array], jax.Array]
    restore: Callable[[jax.Array], jax.Array]
    precision: Any


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The factors of a gradient if the equation looks up rows of a table.

    Attributes:
      rows: the number of rows of the table.
      positions: the number of rows that are looked up.
      columns: the number of entries of a row.
      operand: maps the equation's indices to `[positions]`; an index out of bounds becomes `rows`.
      cotangents: maps the cotangents at the equation's output to `[positions, columns]`.
      restore: maps `[rows, columns]` to the shape of the table.
    """

    rows: int
    positions: int
    columns: int
    operand: Callable[[jax.Array], jax.Array]
    cotangents: Callable[[jax.Array], jax.Array]
    restore: Callable[[jax.Array], jax.Array]


def find_factors(use: Use) -> Product | Lookup | str:
    """Finds the factors of a parameter's gradient in one step of the scans around its use, or why there are none."""
    name = use.equation.primitive.name
    if name not in _RULES:
        return f"used by {name}"
    if 0 in (use.equation.outvars[0].aval.size, use.equation.invars[use.position].aval.size):
        return "empty"
    return _RULES[name](use.equation, use.position)


def _dense(equation: JaxprEqn, position: int) -> Product:
    contracting, batch = equation.params["dimension_numbers"]
    weight, operand = equation.invars[position].aval.shape, equation.invars[1 - position].aval.shape
    weight_order = _batch_contracting_free(batch[position], contracting[position], len(weight))
    operand_order = _batch_contracting_free(batch[1 - position], contracting[1 - position], len(operand))
    num_batch, num_contracting = len(batch[0]), len(contracting[0])
    groups, rows, columns = _sizes(weight, weight_order, num_batch, num_contracting)
    positions = _sizes(operand, operand_order, num_batch, num_contracting)[2]

    def factor(array: jax.Array) -> jax.Array:
        return array.transpose(operand_order).reshape(groups, rows, positions).swapaxes(1, 2)

    def cotangents(array: jax.Array) -> jax.Array:  # the outputs are [batch, free of the first, free of the second]
        if position == 1:
            return array.reshape(groups, positions, columns)
        return array.reshape(groups, columns, positions).swapaxes(1, 2)

    def restore(array: jax.Array) -> jax.Array:
        return array.reshape([weight[axis] for axis in weight_order]).transpose(np.argsort(weight_order))

    return Product("dense", groups, positions, rows, columns, factor, cotangents, restore, equation.params["precision"])


def _batch_contracting_free(batch: tuple[int, ...], contracting: tuple[int, ...], num_axes: int) -> tuple[int, ...]:
    return (*batch, *contracting, *(axis for axis in range(num_axes) if axis not in (*batch, *contracting)))


def _sizes(shape: tuple[int, ...], order: tuple[int, ...], num_batch: int, num_contracting: int) -> tuple[int, ...]:
    ordered = [shape[axis] for axis in order]
    first_free = num_batch + num_contracting
    return math.prod(ordered[:num_batch]), math.prod(ordered[num_batch:first_free]), math.prod(ordered[first_free:])


def _convolution(equation: JaxprEqn, position: int) -> Product | str:
    parameters = equation.params
    if position == 0:
        return "used as the image of a convolution"
    if parameters["batch_group_count"] != 1:
        return "used by a convolution with batch groups"
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    kernel, outputs = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    (num_columns, num_channels, *window) = [kernel[axis] for axis in numbers.rhs_spec]
    (num_images, _, *sizes) = [outputs[axis] for axis in numbers.out_spec]
    spatial = range(len(window))
    padding = [
        (low, high, dilation - 1)
        for (low, high), dilation in zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    ]
    channels_last = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    positions, rows, columns = num_images * math.prod(sizes), num_channels * math.prod(window), num_columns // groups

    def patches(images: jax.Array) -> jax.Array:
        images = images.transpose(channels_last)
        images = jax.lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
        for axis in spatial:  # one spatial axis at a time, which takes sum(window) slices instead of prod(window)
            stride, dilation = parameters["window_strides"][axis], parameters["rhs_dilation"][axis]
            starts = [offset * dilation for offset in range(window[axis])]
            length = (sizes[axis] - 1) * stride + 1
            slices = [jax.lax.slice_in_dim(images, s, s + length, stride, axis=1 + axis) for s in starts]
            images = jnp.stack(slices, axis=1 + len(window) + axis)
        images = images.reshape(positions, math.prod(window), groups, num_channels)
        return jnp.moveaxis(images, 2, 0).reshape(groups, positions, rows)

    def cotangents(array: jax.Array) -> jax.Array:
        images_last = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        return jnp.moveaxis(array.transpose(images_last).reshape(positions, groups, columns), 1, 0)

    def restore(array: jax.Array) -> jax.Array:
        ordered = array.reshape(groups, math.prod(window), num_channels, columns).transpose(0, 3, 2, 1)
        return ordered.reshape(num_columns, num_channels, *window).transpose(np.argsort(numbers.rhs_spec))

    return Product(
        "convolution", groups, positions, rows, columns, patches, cotangents, restore, parameters["precision"]
    )


def _lookup(equation: JaxprEqn, position: int) -> Lookup | str:
    numbers = equation.params["dimension_numbers"]
    table, indices = equation.invars[0].aval.shape, equation.invars[1].aval.shape
    outputs = equation.outvars[0].aval
    if position != 0 or len(numbers.start_index_map) != 1:
        return "used by a gather that is no look-up of rows"
    (axis,) = numbers.start_index_map
    row = tuple(1 if number == axis else size for number, size in enumerate(table))
    if (
        numbers.collapsed_slice_dims != (axis,)
        or numbers.operand_batching_dims
        or equation.params["slice_sizes"] != row
    ):
        return "used by a gather that is no look-up of rows"
    rows, positions, columns = table[axis], math.prod(indices[:-1]), math.prod(row)
    order = (*(number for number in range(outputs.ndim) if number not in numbers.offset_dims), *numbers.offset_dims)
    clips = equation.params["mode"] == jax.lax.GatherScatterMode.CLIP

    def tokens(array: jax.Array) -> jax.Array:
        array = array.reshape(positions)
        if array.dtype.itemsize < 4:  # `rows` may be out of the range of a narrow dtype
            array = array.astype(jnp.int32)
        if clips:
            return jnp.clip(array, 0, rows - 1)
        return jnp.where((array >= 0) & (array < rows), array, rows)

    def cotangents(array: jax.Array) -> jax.Array:
        return array.transpose(order).reshape(positions, columns)

    def restore(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(rows, *(size for n, size in enumerate(table) if n != axis)), 0, axis)

    return Lookup(rows, positions, columns, tokens, cotangents, restore)


_RULES = {"dot_general": _dense, "conv_general_dilated": _convolution, "gather": _lookup}
