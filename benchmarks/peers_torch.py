"""Plain PyTorch for `benchmarks.peers`: EWC with one quadratic for all tasks, and its Fisher in four ways."""

import copy
import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from backpack import backpack, extend
from backpack.extensions import SumGradSquared
from torch.nn.functional import cross_entropy, log_softmax

BATCH_SIZE, LEARNING_RATE = 128, 1e-3


def learn(way: str, file: str, strength: float, share: float) -> dict[str, float]:
    """Makes a run. Returns the seconds of its parts, and the average accuracy."""
    torch.manual_seed(0)
    with np.load(file) as stored:
        arrays = {name: torch.from_numpy(array) for name, array in stored.items()}
    train, test = ((arrays[f"{split}_inputs"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    model, orders = make_model(arrays), arrays["permutations"]
    # Σ_t Ω_t and Σ_t Ω_t θ_t: the sum of all tasks' penalties is one quadratic.
    total, pulled = ([torch.zeros_like(p) for p in model.parameters()] for _ in range(2))
    seconds = dict.fromkeys(("training", "importance", "evaluation"), 0.0)
    for count, order in enumerate(orders, 1):
        start = time.perf_counter()
        inputs, labels = train[0][:, order], train[1]
        train_epoch(model, inputs, labels, total, pulled, strength)
        trained = time.perf_counter()
        fisher = FISHERS[way](model, inputs, labels, int(share * len(labels)))
        with torch.no_grad():
            for p, f, t, q in zip(model.parameters(), fisher, total, pulled, strict=True):
                t.add_(f)
                q.addcmul_(f, p)
        measured = time.perf_counter()
        accuracies = [accuracy(model, test[0][:, order], test[1]) for order in orders[:count]]
        ended = time.perf_counter()
        for part, value in zip(seconds, (trained - start, measured - trained, ended - measured), strict=True):
            seconds[part] += value
    return seconds | {"accuracy": sum(accuracies) / len(accuracies)}


def make_model(arrays: dict[str, torch.Tensor]) -> torch.nn.Sequential:
    """Makes the network with the given parameters."""
    sizes = [arrays["kernel_0"].shape[0], *(arrays[f"bias_{index}"].shape[0] for index in range(3))]
    layers = [torch.nn.Linear(*shape) for shape in itertools.pairwise(sizes)]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight.copy_(arrays[f"kernel_{index}"].T)
            layer.bias.copy_(arrays[f"bias_{index}"])
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])


def train_epoch(
    model: torch.nn.Sequential,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    total: list[torch.Tensor],
    pulled: list[torch.Tensor],
    strength: float,
) -> None:
    """Trains on shuffled batches, with the gradient of the penalty added by hand."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    for chosen in torch.randperm(len(labels)).split(BATCH_SIZE):
        optimizer.zero_grad()
        cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        with torch.no_grad():
            for p, t, q in zip(model.parameters(), total, pulled, strict=True):
                p.grad.addcmul_(t, p, value=strength).sub_(q, alpha=strength)
        optimizer.step()


@torch.no_grad()
def accuracy(model: torch.nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Computes the accuracy in batches of 1,000."""
    parts = zip(inputs.split(1000), labels.split(1000), strict=True)
    return sum((model(x).argmax(1) == y).sum().item() for x, y in parts) / len(labels)


def batches(*tensors: torch.Tensor, number: int, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cuts the first examples into batches."""
    return zip(*(tensor[:number].split(size) for tensor in tensors), strict=True)


def by_hooks(model: torch.nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Computes the exact Fisher from layers' inputs and outputs' cotangents, in a backward pass for each class."""
    layers, seen = [layer for layer in model if isinstance(layer, torch.nn.Linear)], {}
    hooks = [layer.register_forward_hook(lambda *call: seen.__setitem__(call[0], call[1:])) for layer in layers]
    total = [torch.zeros_like(p) for p in model.parameters()]
    for (x,) in batches(inputs, number=number, size=512):
        log_p = log_softmax(model(x), dim=1)
        squared = [seen[layer][0][0].detach().square() for layer in layers]
        for label in range(log_p.shape[1]):
            outputs = [seen[layer][1] for layer in layers]
            cotangents = torch.autograd.grad(log_p[:, label].sum(), outputs, retain_graph=True)
            weights = log_p[:, label].detach().exp()[:, None]
            for index, (a, cotangent) in enumerate(zip(squared, cotangents, strict=True)):
                weighted = weights * cotangent.square()
                total[2 * index].addmm_(weighted.T, a)
                total[2 * index + 1].add_(weighted.sum(0))
    for hook in hooks:
        hook.remove()
    return [t / number for t in total]


def by_backpack(
    model: torch.nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor, number: int
) -> list[torch.Tensor]:
    """Computes the Fisher at the true labels by BackPACK."""
    extended, loss_fn = extend(copy.deepcopy(model)), extend(torch.nn.CrossEntropyLoss(reduction="sum"))
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches(inputs, labels, number=number, size=256):
        extended.zero_grad()
        with backpack(SumGradSquared()):
            loss_fn(extended(x), y).backward()
        for t, p in zip(total, extended.parameters(), strict=True):
            t.add_(p.sum_grad_squared)
    return [t / number for t in total]


def by_torch_func(
    model: torch.nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor, number: int
) -> list[torch.Tensor]:
    """Computes the Fisher at the true labels from all examples' gradients, by torch.func."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss_fn(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    of_each = torch.func.vmap(torch.func.grad(loss_fn), in_dims=(None, 0, 0))
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches(inputs, labels, number=number, size=32):
        for t, gradient in zip(total, of_each(params, x, y).values(), strict=True):
            t.add_(gradient.square().sum(0))
    return [t / number for t in total]


def by_ones(model: torch.nn.Sequential, inputs: torch.Tensor, labels: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Computes the Fisher at the true labels in batches of one."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches(inputs, labels, number=number, size=1):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        for t, p in zip(total, model.parameters(), strict=True):
            t.addcmul_(p.grad, p.grad)
    return [t / number for t in total]


FISHERS = {"hooks": by_hooks, "backpack": by_backpack, "torch-func": by_torch_func, "batch-of-one": by_ones}
