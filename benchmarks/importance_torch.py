"""Times sums of squared per-example gradients in PyTorch, on the MLP of `benchmarks.importance`.

    pip install torch==2.13.0 backpack-for-pytorch
    python -m benchmarks.importance_torch

Neither package is a dependency of the project. All passes take turns, each at the fastest of several batch sizes. A
ratio is the time of a pass divided by that of an ordinary gradient of the summed loss over the same examples, in the
same turn. The table has medians over the turns.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from backpack import backpack, extend
from backpack.extensions import SumGradSquared

NUM_EXAMPLES = 2048


def seconds(run: Callable[[int], object], batch_size: int) -> float:
    """Times one run."""
    start = time.perf_counter()
    run(batch_size)
    return time.perf_counter() - start


def main() -> None:
    """Prints a Markdown table."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(784, 1000),
        torch.nn.ReLU(),
        torch.nn.Linear(1000, 1000),
        torch.nn.ReLU(),
        torch.nn.Linear(1000, 10),
    )
    summed_loss = torch.nn.CrossEntropyLoss(reduction="sum")
    extended, extended_loss = extend(copy.deepcopy(model)), extend(copy.deepcopy(summed_loss))  # extended in place
    inputs, labels = torch.randn(NUM_EXAMPLES, 784), torch.randint(0, 10, (NUM_EXAMPLES,))
    params = {name: p.detach() for name, p in model.named_parameters()}

    def one_loss(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return summed_loss(torch.func.functional_call(model, params, (x[None],)), y[None])

    per_example = torch.func.vmap(torch.func.grad(one_loss), in_dims=(None, 0, 0))

    def batches(size: int) -> zip:
        return zip(inputs.split(size), labels.split(size), strict=True)

    def gradient(size: int) -> None:
        model.zero_grad()
        for x, y in batches(size):
            summed_loss(model(x), y).backward()

    def torch_func(size: int) -> None:
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for x, y in batches(size):
            for name, g in per_example(params, x, y).items():
                total[name] += g.square().sum(dim=0)

    def sum_grad_squared(size: int) -> None:
        total = [torch.zeros_like(p) for p in extended.parameters()]
        for x, y in batches(size):
            extended.zero_grad()
            with backpack(SumGradSquared()):
                extended_loss(extended(x), y).backward()
            for t, p in zip(total, extended.parameters(), strict=True):
                t += p.sum_grad_squared

    sizes = {gradient: (64, 256, 512), torch_func: (8, 32, 128), sum_grad_squared: (64, 256, 512)}
    best = {
        way: min(candidates, key=lambda size, way=way: min(seconds(way, size), seconds(way, size)))
        for way, candidates in sizes.items()
    }
    turns = [{way: seconds(way, best[way]) for way in best} for _ in range(7)]
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| pass | batch size | ratio to a gradient |\n| --- | --- | --- |")
    for way, name in (
        (torch_func, "torch.func: vmap(grad)"),
        (sum_grad_squared, "BackPACK: SumGradSquared"),
    ):
        print(f"| {name} | {best[way]} | {statistics.median(t[way] / t[gradient] for t in turns):.2f} |")


if __name__ == "__main__":
    main()
