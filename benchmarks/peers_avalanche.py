"""Avalanche for `benchmarks.peers`: its EWC and its MAS."""

import time

import numpy as np
import torch

from benchmarks.peers_torch import BATCH_SIZE, LEARNING_RATE, make_model

# The registry's torchvision wants two of its compiled functions, which nothing here calls.
library = torch.library.Library("torchvision", "DEF")
for function in ("nms", "qnms"):
    library.define(f"{function}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from avalanche.benchmarks import tensors_benchmark  # noqa: E402
from avalanche.evaluation.metrics import accuracy_metrics  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin  # noqa: E402
from avalanche.training.supervised import EWC, MAS  # noqa: E402


def learn(way: str, file: str, strength: float, share: float) -> dict[str, float]:
    """Makes a run. Returns the seconds of its parts, and the average accuracy."""
    torch.manual_seed(0)
    with np.load(file) as stored:
        arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
    orders = arrays["permutations"]
    tensors = {
        split: [(arrays[f"{split}_inputs"][:, order], arrays[f"{split}_labels"]) for order in orders]
        for split in ("train", "test")
    }
    benchmark = tensors_benchmark(tensors["train"], tensors["test"], task_labels=[0] * len(orders))
    model = make_model(arrays)
    settings = {
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True),
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_mb_size": BATCH_SIZE,
        "train_epochs": 1,
        "eval_mb_size": 1000,
        "evaluator": EvaluationPlugin(accuracy_metrics(stream=True)),
    }
    strategy = (
        EWC(**settings, ewc_lambda=strength)
        if way == "avalanche-ewc"
        else MAS(**settings, lambda_reg=strength, alpha=0.5)
    )
    importance = time_importance(strategy.plugins)
    seconds = dict.fromkeys(("training", "importance", "evaluation"), 0.0)
    for count, experience in enumerate(benchmark.train_stream, 1):
        start = time.perf_counter()
        strategy.train(experience)
        trained = time.perf_counter()
        metrics = strategy.eval(benchmark.test_stream[:count])
        seconds["evaluation"] += time.perf_counter() - trained
        seconds["training"] += trained - start - importance[-1]
    (accuracy,) = (value for name, value in metrics.items() if name.startswith("Top1_Acc_Stream/eval"))
    return seconds | {"importance": sum(importance), "accuracy": accuracy}


def time_importance(plugins: list) -> list[float]:
    """Times what the method does after each task. Returns the list that the seconds are added to."""
    (plugin,) = (plugin for plugin in plugins if type(plugin).__name__ in ("EWCPlugin", "MASPlugin"))
    compute, seconds = plugin.after_training_exp, []

    def timed(*arguments: object, **options: object) -> None:
        start = time.perf_counter()
        compute(*arguments, **options)
        seconds.append(time.perf_counter() - start)

    plugin.after_training_exp = timed
    return seconds
