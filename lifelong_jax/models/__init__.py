"""Networks of one example, without a batch axis: small ones for images, AlexNet, transformers; pretrained weights.

The rest of the library works with any function of parameters and an example. The networks for images mark the outputs
of their layers for `local_mas_importance`. A transformer's layers are in a scan, where there are no marks.
"""

from lifelong_jax.models.alexnet import AlexNet, load_pretrained
from lifelong_jax.models.functions import init_network, split_variables, train_functions
from lifelong_jax.models.gpt2 import load_gpt2
from lifelong_jax.models.images import CNN, MLP, Conv, convolve, convolve_by_patches, convolve_by_xla
from lifelong_jax.models.transformer import Transformer, TransformerConfig, generate, transformer_functions

__all__ = [
    "CNN",
    "MLP",
    "AlexNet",
    "Conv",
    "Transformer",
    "TransformerConfig",
    "convolve",
    "convolve_by_patches",
    "convolve_by_xla",
    "generate",
    "init_network",
    "load_gpt2",
    "load_pretrained",
    "split_variables",
    "train_functions",
    "transformer_functions",
]
