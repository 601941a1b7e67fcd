"""Small flax networks. Nothing in the library depends on them: any function of parameters and an example will do.

They mark the ends of their layers, for `local_mas_importance`.
"""

import flax.linen as nn
import jax

from lifelong_jax.tapping import layer_output


class MLP(nn.Module):
    """A multilayer perceptron with ReLU activations.

    Attributes:
      hidden_sizes: the widths of the hidden layers.
      num_outputs: the width of the output layer.

    Example:
      >>> model = MLP(hidden_sizes=(256, 256), num_outputs=10)
      >>> variables = model.init(jax.random.key(0), jax.numpy.zeros(64))
      >>> model.apply(variables, jax.numpy.zeros(64)).shape
      (10,)
    """

    hidden_sizes: tuple[int, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Computes the outputs `[num_outputs]` of one example `x` of any shape, which is flattened."""
        x = x.reshape(-1)
        for size in self.hidden_sizes:
            x = layer_output(nn.relu(nn.Dense(size)(x)))
        return nn.Dense(self.num_outputs)(x)
