"""Imports of what only an extra installs."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Says which extra to install if a module that its block imports is missing.

    Args:
      extra: a name in setup.cfg, such as "plotting".

    Raises:
      ImportError: naming the missing module and the extra.

    Example:
      >>> with needs_extra("plotting"):
      ...     import no_such_module
      Traceback (most recent call last):
        ...
      ImportError: no module named 'no_such_module': pip install "lifelong-jax[plotting]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'no module named {error.name!r}: pip install "lifelong-jax[{extra}]"'
        raise ImportError(message, name=error.name) from error
