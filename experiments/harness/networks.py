"""The networks that settings name, and a recipe's functions of them."""

from collections.abc import Callable

import flax.linen as nn
import jax

from experiments.harness.experiment import ImageSettings
from lifelong_jax.models import CNN, MLP, train_functions
from lifelong_jax.types import TrainFn


def make_network(settings: ImageSettings, num_outputs: int) -> nn.Module:
    """Makes the network that the settings name.

    Args:
      settings: the kind of network, and the widths of its layers.
      num_outputs: the number of classes.

    Returns:
      A flax module of one example.
    """
    if settings.network == "cnn":
        return CNN(settings.features, num_outputs, settings.batch_norm)
    return MLP(settings.hidden_sizes, num_outputs, dropout=settings.dropout)


def network_functions(settings: ImageSettings, network: nn.Module) -> tuple[Callable[..., jax.Array], TrainFn | None]:
    """Makes a recipe's functions of a network.

    Args:
      settings: they say whether the network is trained otherwise than it predicts.
      network: from `make_network`.

    Returns:
      The recipe's `apply_fn` and `train_fn`.
    """
    if settings.dropout or settings.batch_norm:
        return train_functions(network)
    return network.apply, None
