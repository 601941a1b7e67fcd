"""The platform that programs are made for: some algorithms are faster on a CPU, and others on an accelerator.

The choice is made when a program is traced, so a program for another platform needs to be traced for it.
"""

import contextlib
from typing import Literal, TypeAlias, get_args

import jax

Platform: TypeAlias = Literal["cpu", "cuda", "rocm", "tpu"]

_lowered_for = jax.make_user_context(None)  # jax.jit traces again where it changes


def lowering_for(platform: Platform) -> contextlib.AbstractContextManager[None]:
    """Makes what is traced within the context a program for a platform, also where there is no such device.

    Without it, programs are for the platform of `jax.config.jax_default_device`, or of JAX's default backend. All
    programs compute the same importances, up to rounding, but by other algorithms: microbatches are larger on
    accelerators, and convolutions and products are not split up as a CPU likes them.

    Args:
      platform: one of the platforms of `jax.export`: "cpu", "cuda", "rocm" or "tpu".

    Returns:
      A context.

    Raises:
      ValueError: if `platform` is none of the above.

    Example:
      >>> import jax.numpy as jnp
      >>> from lifelong_jax import fisher_diagonal
      >>> importance_fn = jax.jit(lambda params, inputs: fisher_diagonal(lambda w, x: w * x, params, inputs))
      >>> with lowering_for("tpu"):
      ...     exported = jax.export.export(importance_fn, platforms=["tpu"])(jnp.zeros(2), jnp.ones((3, 2)))
      >>> exported.platforms
      ('tpu',)
    """
    if platform not in get_args(Platform):
        raise ValueError(f"platform must be one of {', '.join(map(repr, get_args(Platform)))}, not {platform!r}.")
    return _lowered_for(platform)


def is_for_cpu() -> bool:
    """Returns whether what is traced now is a program for a CPU.

    Returns:
      Whether it is: in `lowering_for`, by its platform.

    Example:
      >>> with lowering_for("cuda"):
      ...     is_for_cpu()
      False
    """
    if _lowered_for.value is not None:
        return _lowered_for.value == "cpu"
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() == "cpu"
    return (device if isinstance(device, str) else device.platform) == "cpu"
