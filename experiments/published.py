"""Published tables on MNIST, which `reproduce` runs: their protocols, and the published accuracies.

Importances that differ from this library's (MAS on batches, the Fisher at the predicted label, ...) are in
`published_importances.py`.
"""

import functools

import optax

from experiments.harness.pipelines import momentum_with_penalty
from experiments.protocols import (
    FINETUNE,
    Entry,
    Protocol,
    Published,
    PublishedRange,
    averaging_importance,
    glorot_init,
    in_pairs,
    in_random_pairs,
    keeping_optimizer,
    normalize,
    pad,
    pad_and_normalize,
    permuted,
    truncated_init,
    uniform_init,
    with_importance,
    with_penalty,
)
from experiments.published_importances import (
    fisher_at_prediction,
    fisher_of_500,
    mas_of_batches,
    mean_of_active,
    scaled_mas,
    squared_batch_gradient,
    sum_of_all,
    unclipped_si,
)
from lifelong_jax import methods


def decades(last: int, first: int = 1, step: int = 1) -> tuple[float, ...]:
    """Makes strengths `step` decades apart, from 10^first to 10^last."""
    return tuple(10.0**decade for decade in range(first, last + 1, step))


permuted_mnist = functools.partial(
    Protocol,
    published_runs=1,
    scenario="domain",
    transform=lambda images: images,
    make_tasks=permuted(10),
    init_params=uniform_init,
    pipeline=with_penalty(optax.adam),
    learning_rate=1e-3,
    batch_size=256,
    max_steps=None,
)
"""Makes a protocol of ten permutations, with what most of the sources have in common."""

# The source's penalties have no ½, so our strength is twice its coefficient.
HSU = Protocol(
    title="Split MNIST, task-incremental",
    source="Hsu et al. 2018, arXiv 1810.12488, table 2; settings from its code, GT-RIPL/Continual-Learning-Benchmark",
    remark="Images of 32×32, normalised; Adam keeps its state from task to task; penalties without ½.",
    deviation="standard deviation",
    published_runs=10,
    num_seeds=10,
    scenario="task",
    transform=pad_and_normalize,
    make_tasks=in_pairs,
    init_params=uniform_init,
    hidden_sizes=(400, 400),
    pipeline=with_penalty(optax.adam),
    learning_rate=1e-3,
    batch_size=128,
    num_epochs=4,
    max_steps=None,
    entries=(
        Entry("MAS", with_importance(mas_of_batches(128, mean_of_active), "latest"), (2.0,), Published(99.22, 0.21)),
        Entry("Adam alone", FINETUNE, (0.0,), Published(93.46, 2.01)),
    ),
)

ROWS = {
    1: HSU,
    2: HSU._replace(
        title="Split MNIST, task-incremental, others",
        entries=(
            Entry("EWC", with_importance(fisher_at_prediction, "separate"), (200.0,), Published(97.70, 0.81)),
            Entry("online EWC", with_importance(fisher_at_prediction, "latest"), (800.0,), Published(98.04, 1.10)),
            Entry(
                "SI",
                keeping_optimizer(methods.si()._replace(importance_fn=unclipped_si(0.1))),
                (600.0,),
                Published(98.56, 0.49),
            ),
            Entry("L2", keeping_optimizer(methods.l2("latest", 0.0)), (0.02,), Published(98.18, 0.96)),
        ),
    ),
    3: Protocol(
        title="Split MNIST, by estimator of the Fisher",
        source="van de Ven 2025, arXiv 2502.11756; settings from its code, GMvandeVen/continual-learning",
        remark="Task-incremental; pairs of classes in random order; 2,000 steps per task; Adam keeps its state; online "
        "EWC. The source chose the best λ of fourteen decades on test data. We chose the best of the powers of ten in "
        "the picture on validation data, from three seeds.",
        deviation="standard error",
        published_runs=30,
        num_seeds=10,
        scenario="task",
        transform=lambda images: images,
        make_tasks=in_random_pairs,
        init_params=uniform_init,
        hidden_sizes=(400, 400),
        pipeline=with_penalty(optax.adam),
        learning_rate=1e-3,
        batch_size=128,
        num_epochs=30,
        max_steps=2000,
        entries=(
            Entry("exact", keeping_optimizer(methods.ewc("exact", "latest")), decades(7), Published(99.12, 0.16)),
            Entry("exact, 500 examples", with_importance(fisher_of_500, "latest"), decades(8), Published(98.93, 0.15)),
            Entry(
                "sampled",
                keeping_optimizer(methods.ewc("sampled", "latest")),
                decades(10) + decades(12, first=12),
                Published(99.12, 0.12),
            ),
            Entry(
                "empirical",
                keeping_optimizer(methods.ewc("empirical", "latest")),
                decades(6) + decades(12, first=8, step=2),
                Published(99.12, 0.12),
            ),
            Entry(
                "batch-squared",
                with_importance(squared_batch_gradient, "latest"),
                decades(14, first=2, step=2),
                Published(99.11, 0.16),
            ),
            Entry("none", FINETUNE, (0.0,), Published(85.41, 0.88)),
        ),
    ),
    4: permuted_mnist(
        title="Permuted MNIST, 10 tasks",
        source="van de Ven and Tolias 2018, arXiv 1809.10635; settings from its code, GMvandeVen/continual-learning",
        remark="Images of 32×32; 5,000 steps per task; Adam keeps its state; the Fisher at the predicted label; online "
        "EWC with γ = 0.9. The source multiplies the importance by γ once more in the penalty; our λ includes that. "
        "kfac is not the source's: EWC with Kronecker factors, exact over all 60,000 examples, with a proximal step "
        "after every 50 steps; we chose its λ on validation data, from one seed. The source's joint training takes "
        "each task's steps on the data of all tasks so far.",
        deviation="standard error",
        published_runs=20,
        num_seeds=3,
        transform=pad,
        hidden_sizes=(1000, 1000),
        learning_rate=1e-4,
        batch_size=128,
        num_epochs=11,
        max_steps=5000,
        entries=(
            Entry("EWC", with_importance(fisher_at_prediction, "separate"), (500.0,), Published(94.31, 0.11)),
            Entry(
                "online EWC",
                with_importance(fisher_at_prediction, "latest", 0.9),
                (900.0,),  # γ · 1000
                Published(94.42, 0.13),
            ),
            Entry("none", FINETUNE, (0.0,), Published(78.51, 0.24)),
            Entry("kfac", keeping_optimizer(methods.kfac()), (3e4, 1e5, 3e5), None, every=50, num_choosing_seeds=1),
            Entry("joint, of the tasks so far", None, (0.0,), Published(97.59, 0.01), so_far=True),
            Entry("joint, of all tasks", None, (0.0,), None),
        ),
    ),
    5: permuted_mnist(
        title="Permuted MNIST, 17 tasks, one pass",
        source="Chaudhry et al. 2019, arXiv 1812.00420; settings from its code, facebookresearch/agem",
        remark="The source's code keeps only the last task's importance, computed on batches of 10 and not scaled. If "
        "it is scaled to [0, 1] and summed over the tasks, MAS forgets far less at the same λ. The source computes the "
        "importance on the 55,000 images that it trains on, we compute it on all 60,000.",
        deviation="standard deviation",
        published_runs=5,
        num_seeds=5,
        make_tasks=permuted(17),
        init_params=truncated_init,
        hidden_sizes=(256, 256),
        pipeline=with_penalty(optax.sgd),
        learning_rate=0.1,
        batch_size=10,
        num_epochs=1,
        max_steps=5500,  # the source trains on 55,000 of the 60,000 examples
        entries=(
            Entry(
                "MAS, of the last task",
                methods.mas("latest", 0.0)._replace(importance_fn=mas_of_batches(10, sum_of_all)),
                (0.2,),
                Published(69.85, 0.93),
            ),
            Entry("none", methods.finetune(), (0.0,), Published(47.95, 1.32), learning_rate=0.03),
            Entry("MAS, scaled and summed", methods.mas()._replace(importance_fn=scaled_mas), (0.2,), None),
        ),
    ),
    6: HSU._replace(
        title="Split MNIST, class-incremental",
        remark="As row 1, but with one output layer: all classes seen so far are candidates.",
        scenario="class",
        entries=(
            Entry(
                "EWC",
                with_importance(fisher_at_prediction, "separate"),
                (1200.0,),
                PublishedRange(19.0, 20.5),
            ),
            Entry(
                "MAS",
                with_importance(mas_of_batches(128, mean_of_active), "latest"),
                (2.0,),
                PublishedRange(19.0, 20.5),
            ),
        ),
    ),
    7: permuted_mnist(
        title="SI, permuted MNIST, 10 tasks",
        source="Zenke et al. 2017, arXiv 1703.04200; settings and accuracies from its code, ganguli-lab/pathint",
        remark="Two hidden layers of 2,000; Adam keeps its state; ξ = 0.1. Our λ is twice the source's c. The source "
        "cuts the importance off at 0 after it has summed it over the tasks, we cut off each task's.",
        deviation="standard deviation",
        num_seeds=1,
        init_params=glorot_init,
        hidden_sizes=(2000, 2000),
        num_epochs=20,
        entries=(
            Entry("c = 0", keeping_optimizer(methods.si()), (0.0,), Published(57.41)),
            Entry("c = 0.01", keeping_optimizer(methods.si()), (0.02,), Published(92.00)),
            Entry("c = 0.02", keeping_optimizer(methods.si()), (0.04,), Published(93.91)),
            Entry("c = 0.1", keeping_optimizer(methods.si()), (0.2,), Published(96.94)),
        ),
    ),
    8: permuted_mnist(
        title="Permuted MNIST, 10 tasks, with dropout",
        source="Ahn et al. 2019, NeurIPS, arXiv 1905.11614; settings from its code, csm9493/UCL",
        remark="Images normalised; dropout of one half; the importance of EWC is the mean over tasks. The source "
        "lowers the step size where the training loss does not fall, which we leave out. It trains for 100 epochs, we "
        "train for 10. We chose λ on validation data, from one seed. The source's own method, UCL, has 94.5.",
        deviation="standard error",
        published_runs=5,
        num_seeds=5,
        transform=normalize,
        hidden_sizes=(400, 400),
        num_epochs=10,
        entries=(
            Entry(
                "EWC",
                averaging_importance(methods.ewc("empirical", "latest")),
                (1e2, 1e3, 1e4, 1e5),
                Published(91.8),
                num_choosing_seeds=1,
            ),
            Entry(
                "SI",
                methods.si()._replace(importance_fn=unclipped_si(0.01)),
                (0.02, 0.2, 2.0, 20.0),
                Published(91.1),
                num_choosing_seeds=1,
            ),
            Entry("none", methods.finetune(), (0.0,), None),
        ),
        dropout=0.5,
    ),
    9: permuted_mnist(
        title="Permuted MNIST, 50 tasks",
        source="Ritter et al. 2018, arXiv 1805.07810, figure 1",
        remark="Two hidden layers of 100. The source reports above 90 for Kronecker factors, and its curves for the "
        "diagonal and for SI are far below. The rest is ours: five epochs a task of SGD with momentum 0.9, its step "
        "size a cosine from 0.03; a proximal penalty, with Kronecker factors after every 8 steps. We chose λ on "
        "validation data, from one seed; that of kfac in an earlier run.",
        deviation="standard error",
        num_seeds=1,
        make_tasks=permuted(50),
        hidden_sizes=(100, 100),
        pipeline=momentum_with_penalty,
        learning_rate=0.03,
        batch_size=128,
        num_epochs=5,
        entries=(
            Entry("kfac", methods.kfac(), (3.0,), None, every=8),
            Entry("EWC", methods.ewc("exact", "latest"), (1.0, 10.0, 100.0), None, num_choosing_seeds=1),
            Entry("SI", methods.si(), (0.02, 0.2, 2.0), None, num_choosing_seeds=1),
            Entry("none", methods.finetune(), (0.0,), None),
        ),
        schedule=optax.cosine_decay_schedule,
    ),
    10: permuted_mnist(
        title="Laplace, permuted MNIST, 10 tasks",
        source="Daxberger et al. 2021, arXiv 2106.14806, section 4.4; settings from its code, runame/laplace-redux",
        remark="Two hidden layers of 100; the step size is a cosine from 1e-3 to 1e-6; λ = 1, the posterior's own. The "
        "source has a curve, no numbers: Kronecker factors are above the diagonal. It adds a prior whose precision it "
        "fits, and sums the two factors over tasks one by one; we have no prior, and keep the nearest product. It "
        "trains for 100 epochs, we train for 20.",
        deviation="standard error",
        num_seeds=3,
        hidden_sizes=(100, 100),
        num_epochs=20,
        entries=(
            Entry("kfac", methods.kfac(), (1.0,), None),
            Entry("EWC", methods.ewc("exact", "latest"), (1.0,), None),
            Entry("none", methods.finetune(), (0.0,), None),
        ),
        schedule=lambda learning_rate, num_steps: optax.cosine_decay_schedule(learning_rate, num_steps, alpha=1e-3),
    ),
}
ROWS[11] = ROWS[4]._replace(
    title="Permuted MNIST, 10 tasks, all methods",
    source="The protocol of row 4, from van de Ven and Tolias 2018",
    remark="The methods of this library as they are, in the network and the training of row 4. We chose λ on "
    "validation data, from one seed and in 1,000 steps a task; that of kfac is from row 4.",
    entries=(
        Entry("finetune", FINETUNE, (0.0,), None),
        Entry("l2", keeping_optimizer(methods.l2()), decades(0, first=-3), None, num_choosing_seeds=1),
        Entry("ewc", keeping_optimizer(methods.ewc()), (100.0, 300.0, 1e3, 3e3), None, num_choosing_seeds=1),
        Entry("mas", keeping_optimizer(methods.mas()), decades(2, first=-1), None, num_choosing_seeds=1),
        Entry("local_mas", keeping_optimizer(methods.local_mas()), decades(2, first=-1), None, num_choosing_seeds=1),
        Entry("si", keeping_optimizer(methods.si()), (0.02, 0.2, 2.0, 20.0), None, num_choosing_seeds=1),
        Entry("rwalk", keeping_optimizer(methods.rwalk()), decades(3, first=0), None, num_choosing_seeds=1),
        *(entry._replace(strengths=(1e5,)) for entry in ROWS[4].entries if entry.name == "kfac"),
        *(entry for entry in ROWS[4].entries if entry.so_far),
    ),
    choosing_steps=1000,
)
