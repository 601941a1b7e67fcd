"""Diagonal importances in one byte an entry, on a logarithmic scale, or in two.

Entries of one leaf differ by many powers of 10, so steps of equal ratio keep all of them, and steps of equal size do
not. Penalties compute entry by entry what codes stand for, within the step, so that no larger copy is made.
`consolidation.compress_consolidation` compresses an importance and its anchor.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lifelong_jax._numerics import widen

Storage: TypeAlias = Literal["uint8", "bfloat16"]
"""How each entry of an importance is stored: in one byte on a logarithmic scale, or in two, as bfloat16."""

_STEPS = 8  # codes for each factor of 2
_LARGEST = 255  # the code of a leaf's largest entry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedDiagonal:
    """The form of a leaf that is a diagonal, compressed: a code for each entry, and the leaf's largest entry.

        entry = scale · 2^((code − 255) / 8), and 0 for code 0      codes of one byte
        entry = scale · code                                        codes in bfloat16

    One byte keeps entries down to 2⁻³¹·⁷⁵ of the leaf's largest, 9.6 powers of 10, each within 4.5 % of itself. Smaller
    ones are 0: as the least code they would be too large, and hold parameters that do not matter. bfloat16 keeps all
    entries within 0.4 %. The largest entry and 0 are exact. On Fisher diagonals of a small transformer and of an MLP,
    at most 0.6 % of a leaf's entries were smaller, and made 1e-11 of its sum, so that one scale a leaf is enough.

    It is a pytree; an importance has one in the place of a leaf. Codes are computed entry by entry, so that they can be
    sharded and donated as the leaf is.

    Attributes:
      codes: uint8 or bfloat16, an array like the leaf.
      scale: the largest entry, a scalar, float32 or wider. Of stacked forms, an array of their leading axes.

    Example:
      >>> form = compress(jnp.array([0.0, 1e-9, 0.1, 1.0]))
      >>> form.codes
      Array([  0,  16, 228, 255], dtype=uint8)
      >>> decompress(form).round(3)
      Array([0.   , 0.   , 0.096, 1.   ], dtype=float32)
    """

    codes: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the entries."""
        return self.scale.dtype

    @property
    def storage(self) -> Storage:
        """How the codes are stored."""
        return "bfloat16" if self.codes.dtype == jnp.bfloat16 else "uint8"


def compress(diagonal: jax.Array, storage: Storage = "uint8") -> CompressedDiagonal:
    """Compresses a diagonal form: the nearest codes, by the ratio of an entry to what its code stands for.

    Args:
      diagonal: an array like the leaf, not negative.
      storage: "uint8" or "bfloat16".

    Returns:
      The form. What `decompress` makes of it has these codes again.

    Example:
      >>> compress(jnp.array([3.0, 0.5]), "bfloat16").codes
      Array([1, 0.166992], dtype=bfloat16)
    """
    diagonal = widen(diagonal)
    scale = jnp.max(diagonal, initial=0)
    inverse_root = jax.lax.rsqrt(jnp.where(scale > 0, scale, 1))
    fractions = diagonal * inverse_root * inverse_root  # the reciprocal of a large scale would be 0
    if storage == "bfloat16":
        return CompressedDiagonal(fractions.astype(jnp.bfloat16), scale)
    positive = fractions > 0
    places = _LARGEST + _STEPS * jnp.log2(jnp.where(positive, fractions, 1))
    codes = jnp.where(positive, jnp.round(jnp.clip(places, 0, _LARGEST)), 0)
    return CompressedDiagonal(codes.astype(jnp.uint8), scale)


def decompress(form: Any) -> Any:
    """Computes the diagonal that a compressed form stands for.

    Args:
      form: the leaf's form.

    Returns:
      An array like the leaf, in the dtype of the scale, the same to the bit in every program. A form that is not
      compressed is returned as it is.

    Example:
      >>> decompress(compress(jnp.array([3.0, 1.5])))
      Array([3. , 1.5], dtype=float32)
    """
    if not isinstance(form, CompressedDiagonal):
        return form
    scale = jnp.expand_dims(form.scale, range(form.scale.ndim, form.codes.ndim))
    return scale * _fractions(form.codes).astype(form.dtype)


def stored_like(form: Any, like: Any) -> Any:
    """Stores a diagonal as another one is stored: in codes, or as an array.

    Args:
      form: the leaf's form.
      like: another one: both are diagonal, or have Kronecker factors.

    Returns:
      `form`, with codes if `like` has codes, and without if it has none. Kronecker factors are as they were.

    Example:
      >>> stored_like(jnp.ones(2), like=compress(jnp.zeros(2))).codes
      Array([255, 255], dtype=uint8)
    """
    if not isinstance(like, CompressedDiagonal):
        return decompress(form)
    same = isinstance(form, CompressedDiagonal) and form.codes.dtype == like.codes.dtype
    return form if same else compress(decompress(form), like.storage)


def widen_form(form: Any) -> Any:
    """Casts the arrays of a form to float32, unless their dtypes are at least as wide.

    Args:
      form: the leaf's form.

    Returns:
      The form. A compressed one is as it was: its scale is float32 or wider.

    Example:
      >>> widen_form(jnp.ones(2, jnp.bfloat16))
      Array([1., 1.], dtype=float32)
    """
    return form if isinstance(form, CompressedDiagonal) else jax.tree.map(widen, form)


def _fractions(codes: jax.Array) -> jax.Array:
    """Returns entries as fractions of the largest: of bytes, by products and shifts, which are exact everywhere."""
    if codes.dtype == jnp.bfloat16:
        return codes
    places = codes.astype(jnp.int32) - _LARGEST
    power = jax.lax.bitcast_convert_type(((places >> 3) + 127) << 23, jnp.float32)  # 2^⌊places / 8⌋
    for bit in (1, 2, 4):
        power *= jnp.where(places & bit != 0, np.float32(2 ** (bit / _STEPS)), np.float32(1))
    return jnp.where(codes > 0, power, 0)
