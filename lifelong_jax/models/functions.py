"""Parameters and functions of flax modules of one example."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lifelong_jax import _checks
from lifelong_jax._extras import needs_extra
from lifelong_jax.types import Example, ModelState, Params, TrainFn

with needs_extra("models"):
    import flax.linen as nn


def init_network(model: nn.Module, key: jax.Array, x: Example) -> Params:
    """Initialises a network's parameters. It draws what `model.init` draws, but in one compiled program.

    Args:
      model: a flax module of one example. It must be hashable, as modules are whose attributes are hashable.
      key: a random key.
      x: an input, without a batch axis.

    Returns:
      The parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from lifelong_jax.models import MLP
      >>> jax.tree.map(jnp.shape, init_network(MLP((5,), 10), jax.random.key(0), jnp.zeros(64))["params"]["Dense_0"])
      {'bias': (5,), 'kernel': (64, 5)}
    """
    return _init_program()(model, key, x) if _checks.is_concrete(key) else model.init(key, x)


@functools.cache
def _init_program() -> Callable[[nn.Module, jax.Array, Example], Params]:
    # The program runs once. On a CPU, full optimisation would make its compilation four times as long, for the same
    # numbers. A program with compiler options cannot be part of another one, so init_network calls it only outside jit.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda model, key, x: model.init(key, x), static_argnums=0, compiler_options=options)


@functools.cache  # one pair for each network, so that jit compiles once
def train_functions(model: nn.Module) -> tuple[Callable[[Params, ModelState, Example], jax.Array], TrainFn]:
    """Makes a `Recipe`'s two functions of a flax module with dropout or batch normalisation.

    Args:
      model: a module of one example, hashable, whose call takes `train`: whether it is being trained. Its random keys
        are called "dropout", and the axis of its batch normalisation "batch".

    Returns:
      `apply_fn(params, model_state, x) -> outputs`, the module as it predicts, and
      `train_fn(params, model_state, x, key) -> (outputs, model_state)`, as it is trained.

    Example:
      >>> import jax.numpy as jnp
      >>> from lifelong_jax.models import MLP
      >>> model = MLP((5,), 10, dropout=0.5)
      >>> apply_fn, train_fn = train_functions(model)
      >>> params, model_state = split_variables(init_network(model, jax.random.key(0), jnp.ones(64)))
      >>> train_fn(params, model_state, jnp.ones(64), jax.random.key(1))[0].shape
      (10,)
    """

    def apply_fn(params: Params, model_state: ModelState, x: Example) -> jax.Array:
        outputs: Any = model.apply({**params, **model_state}, x)
        return outputs

    def train_fn(params: Params, model_state: ModelState, x: Example, key: jax.Array) -> tuple[jax.Array, ModelState]:
        variables, names = {**params, **model_state}, list(model_state)
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=names)

    return apply_fn, train_fn


def split_variables(variables: Params) -> tuple[Params, ModelState]:
    """Splits a flax module's variables, for the functions of `train_functions`.

    Args:
      variables: from `init_network`.

    Returns:
      The parameters, `{"params": ...}`, and the model state: the module's other collections, such as "batch_stats".

    Example:
      >>> import jax.numpy as jnp
      >>> from lifelong_jax.models import CNN
      >>> variables = init_network(CNN((2,), 10, batch_norm=True), jax.random.key(0), jnp.ones((8, 8, 1)))
      >>> [list(part) for part in split_variables(variables)]
      [['params'], ['batch_stats']]
    """
    model_state = {name: collection for name, collection in variables.items() if name != "params"}
    return {"params": variables["params"]}, model_state
