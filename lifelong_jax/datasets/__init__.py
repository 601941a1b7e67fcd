"""Image-classification data sets by name, texts, and the sources of their examples."""

from lifelong_jax.datasets.letters import render_letters
from lifelong_jax.datasets.named import (
    Dataset,
    hold_out_validation,
    load_dataset,
    make_batch,
    open_dataset,
    scale_bytes,
)
from lifelong_jax.datasets.sources import Source
from lifelong_jax.datasets.texts import next_token_example, text_source

__all__ = [
    "Dataset",
    "Source",
    "hold_out_validation",
    "load_dataset",
    "make_batch",
    "next_token_example",
    "open_dataset",
    "render_letters",
    "scale_bytes",
    "text_source",
]
