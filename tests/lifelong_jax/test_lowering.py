"""Every program is lowered for accelerators, on a machine without one, and is theirs: not what a CPU would run."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lifelong_jax as ll
from lifelong_jax import (
    _epochs,
    consolidation,
    evaluation,
    importance,
    losses,
    merging,
    methods,
    penalty,
    streaming,
    sweep,
)
from lifelong_jax._split_batches import find_shardings
from lifelong_jax.models import CNN, MLP, TransformerConfig, generate, transformer_functions
from lifelong_jax.platforms import lowering_for

pytestmark = pytest.mark.usefixtures("standard_promotion")

NUM = 6  # examples
KEY = jax.random.key(0)


def ones(function, *arguments):
    """Ones in the shapes that a function returns."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(function, *arguments))


MODEL, CNN_MODEL = MLP((5,), 3), CNN((2, 3), 3)
INPUTS, IMAGES, LABELS = jnp.ones((NUM, 4)), jnp.ones((NUM, 8, 8, 1)), jnp.arange(NUM) % 3
TOKENS = jnp.ones((NUM, 9), jnp.int32)
BATCH = ll.Batch(INPUTS, LABELS, jnp.ones(NUM))
INIT, APPLY = transformer_functions(TransformerConfig(16, 8, num_layers=2, num_heads=2, width=8, remat=True))
PARAMS, CNN_PARAMS = ones(MODEL.init, KEY, INPUTS[0]), ones(CNN_MODEL.init, KEY, IMAGES[0])
TRANSFORMER = ones(INIT, KEY)
KEPT = ll.Consolidation(PARAMS, PARAMS)
SMALL = jax.eval_shape(consolidation.compress_consolidation, KEPT)
ADAM = optax.adam(1e-3)
LOSS = losses.cross_entropy(MODEL.apply)


def token_losses(params, tokens):
    return optax.losses.softmax_cross_entropy_with_integer_labels(APPLY(params, tokens[:-1]), tokens[1:])


def kronecker(params):
    return ll.kronecker_fisher(MODEL.apply, params, INPUTS, num_samples=1, key=KEY)


FACTORS = ones(kronecker, PARAMS)


def coupled(strength):
    return optax.chain(ll.add_quadratic_penalty(strength), ADAM)


def proximal(strength):
    return ll.proximal_adam(1e-3, strength)


def update_with(optimizer, kept=KEPT):
    """A step of an optimiser, and what it takes."""

    def update(params, state, kept, grads):
        extra_args = {"loss_fn": LOSS, "examples": BATCH, "weights": BATCH.weights}
        extra_args |= {} if kept is None else kept._asdict()
        return optimizer.update(grads, state, params, **extra_args)

    return update, PARAMS, optimizer.init(PARAMS), kept, PARAMS


def learn_with(optimizer, **options):
    def learn(state, kept, batch):
        return ll.learn_task(LOSS, optimizer, state, kept, batch, num_epochs=2, batch_size=4, **options)

    return learn, ll.init_training(optimizer, PARAMS, KEY), KEPT, BATCH


def epoch_of_tasks(optimizer_fn, wrap_optimizer=None):
    recipe = ll.Recipe(MODEL.apply, optimizer_fn, num_epochs=1, batch_size=4)
    optimizer = _epochs.make_optimizer(optimizer_fn, wrap_optimizer, jnp.float32(1))

    def epoch(state, strength, kept, data):
        return _epochs.learn_epoch(
            recipe, wrap_optimizer, state, kept, strength, data, shardings=find_shardings(state, data.examples)
        )

    state = ll.init_training(optimizer, PARAMS, KEY)
    return epoch, state, jnp.float32(1), KEPT, _epochs.TrainingData(BATCH, jnp.arange(4))


def importance_of(method):
    recipe = ll.Recipe(MODEL.apply, coupled, num_epochs=1, batch_size=4)
    optimizer = _epochs.make_optimizer(coupled, method.wrap_optimizer, jnp.float32(1))

    def measure(state, data, key):
        return _epochs.measuring(method, recipe, state, data)(state, data, key)

    return measure, ll.init_training(optimizer, PARAMS, KEY), _epochs.TrainingData(BATCH, None), KEY


def sweep_of(method):
    """The program of a sweep, caught where it would be run."""
    found = []

    def catch(tasks, start, **static):
        found[:] = [lambda tasks, start: learn_runs(tasks, start, **static), tasks, start]
        return jnp.zeros((2, 2, 2)), jnp.zeros((2, 2))

    learn_runs = sweep._learn_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_learn_runs", catch)
        tasks = ll.permuted_tasks(BATCH, BATCH, 2, KEY)
        recipe = ll.Recipe(MODEL.apply, coupled, num_epochs=1, batch_size=4)
        ll.learn_sweep(method, recipe, [ll.SweepRun(PARAMS, tasks, KEY, strength) for strength in (1.0, 2.0)])
    return found


def step_of_stream(optimizer):
    def step(kept, state, key, indices, batch):
        shardings = find_shardings(state, batch)
        return streaming._learn_batch(LOSS, optimizer, kept, state, key, indices, batch, shardings=shardings)

    return step, KEPT, ll.init_training(optimizer, PARAMS, KEY), KEY, jnp.arange(NUM), BATCH


def batch_of_stream(total, params, batch):
    def mean_fn(params, batch, key):
        return ll.fisher_diagonal(MODEL.apply, params, batch.inputs, weights=batch.weights)

    return streaming._add(total, streaming._sum_batch(mean_fn, None, params, batch, KEY))


def marked(params, x):
    return ll.layer_output(jnp.tanh(x @ params[0])) @ params[1]


def fisher(**options):
    return lambda params, inputs: ll.fisher_diagonal(MODEL.apply, params, inputs, **options)


def into(total, inputs):
    return ll.fisher_diagonal(MODEL.apply, PARAMS, inputs, into=total)


def lora(strength):
    return penalty.add_reparametrized_penalty(lambda params: jax.tree.map(jnp.sin, params), strength)


SAMPLED = {"num_samples": 2, "key": KEY}
DENSE = [jnp.ones((4, 5)), jnp.ones((5, 3))]
PATH, WALK = ll.path_integral(coupled(1.0)), ll.riemannian_walk(coupled(1.0), interval=2)

# The name of a function, with a variant; what makes the function, and its arguments.
PROGRAMS = {
    "fisher_diagonal": lambda: (fisher(), PARAMS, INPUTS),
    "fisher_diagonal, weights": lambda: (fisher(weights=jnp.arange(6.0)), PARAMS, INPUTS),
    "fisher_diagonal, sampled": lambda: (fisher(**SAMPLED), PARAMS, INPUTS),
    "fisher_diagonal, reference": lambda: (fisher(method="reference"), PARAMS, INPUTS),
    "fisher_diagonal, bernoulli": lambda: (fisher(likelihood="bernoulli"), PARAMS, INPUTS),
    "fisher_diagonal, gaussian": lambda: (fisher(likelihood="gaussian", **SAMPLED), PARAMS, INPUTS),
    "fisher_diagonal, CNN": lambda: (lambda p, x: ll.fisher_diagonal(CNN_MODEL.apply, p, x), CNN_PARAMS, IMAGES),
    "fisher_diagonal, transformer": lambda: (
        lambda p, x: ll.fisher_diagonal(APPLY, p, x, num_samples=1, key=KEY),
        TRANSFORMER,
        TOKENS[:, :-1],
    ),
    "init_accumulation": lambda: (into, importance.init_accumulation(PARAMS), INPUTS),
    "empirical_fisher_diagonal": lambda: (lambda p, b: ll.empirical_fisher_diagonal(LOSS, p, b), PARAMS, BATCH),
    "empirical_fisher_diagonal, transformer": lambda: (
        lambda p, x: ll.empirical_fisher_diagonal(token_losses, p, x, num_samples=1, key=KEY),
        TRANSFORMER,
        TOKENS,
    ),
    "mas_importance": lambda: (lambda p, x: ll.mas_importance(MODEL.apply, p, x), PARAMS, INPUTS),
    "mas_importance, jacobian": lambda: (
        lambda p, x: ll.mas_importance(CNN_MODEL.apply, p, x, output_norm="jacobian"),
        CNN_PARAMS,
        IMAGES,
    ),
    "local_mas_importance": lambda: (lambda p, x: ll.local_mas_importance(marked, p, x), DENSE, INPUTS),
    "layer_output": lambda: (jax.vmap(marked, (None, 0)), DENSE, INPUTS),
    "kronecker_fisher": lambda: (kronecker, PARAMS),
    "kronecker_fisher, CNN": lambda: (
        lambda p, x: ll.kronecker_fisher(CNN_MODEL.apply, p, x, weight_sharing="reduce"),
        CNN_PARAMS,
        IMAGES,
    ),
    "empirical_kronecker_fisher": lambda: (lambda p, b: ll.empirical_kronecker_fisher(LOSS, p, b), PARAMS, BATCH),
    "make_forms": lambda: (
        importance.make_forms,
        jax.eval_shape(lambda like: importance.init_accumulation(PARAMS, like).mean, FACTORS),
    ),
    "importance_from_adam": lambda: (
        lambda state: importance.importance_from_adam(state, batch_size=4),
        ADAM.init(PARAMS),
    ),
    "normalize_importance": lambda: (ll.normalize_importance, PARAMS),
    "normalize_importance, factors": lambda: (ll.normalize_importance, FACTORS),
    "path_integral": lambda: update_with(PATH),
    "si_importance": lambda: (ll.si_importance, PATH.init(PARAMS), PARAMS),
    "riemannian_walk": lambda: update_with(WALK),
    "rwalk_importance": lambda: (ll.rwalk_importance, WALK.init(PARAMS), PARAMS),
    "continue_walk": lambda: (ll.continue_walk, WALK.init(PARAMS), WALK.init(PARAMS)),
    "init_consolidation": lambda: (ll.init_consolidation, PARAMS),
    "consolidate": lambda: (ll.consolidate, KEPT, PARAMS, PARAMS),
    "consolidate, codes": lambda: (ll.consolidate, SMALL, PARAMS, PARAMS),
    "consolidate, factors": lambda: (
        lambda kept, p, f: ll.consolidate(kept, p, f, rule="latest"),
        *(ll.Consolidation(PARAMS, FACTORS), PARAMS, FACTORS),
    ),
    "compress_consolidation": lambda: (consolidation.compress_consolidation, KEPT),
    "decompress_consolidation": lambda: (consolidation.decompress_consolidation, SMALL),
    "merge": lambda: (lambda *kept: ll.merge(kept, [1.0, 2.0]), KEPT, KEPT),
    "merge_models": lambda: (lambda p, f: merging.merge_models([p, p], [f, f]), PARAMS, PARAMS),
    "quadratic_penalty": lambda: (jax.grad(ll.quadratic_penalty), PARAMS, KEPT, 1.0),
    "quadratic_penalty, factors": lambda: (ll.quadratic_penalty, PARAMS, ll.Consolidation(PARAMS, FACTORS), 1.0),
    "add_quadratic_penalty": lambda: update_with(coupled(1.0)),
    "add_quadratic_penalty, codes": lambda: update_with(coupled(1.0), SMALL),
    "add_reparametrized_penalty": lambda: update_with(lora(1.0)),
    "hold_consolidation": lambda: update_with(penalty.hold_consolidation(coupled(1.0)), None),
    "set_consolidation": lambda: (
        penalty.set_consolidation,
        *(penalty.hold_consolidation(coupled(1.0)).init(PARAMS), KEPT),
    ),
    "proximal_quadratic_penalty": lambda: update_with(
        optax.chain(ADAM, ll.proximal_quadratic_penalty(1e-3, 1.0)), ll.Consolidation(PARAMS, FACTORS)
    ),
    "proximal_adam": lambda: update_with(proximal(1.0)),
    "proximal_adam, codes": lambda: update_with(proximal(1.0), SMALL),
    "learn_task": lambda: learn_with(coupled(1.0)),
    "learn_task, weights": lambda: learn_with(proximal(1.0), weights=jnp.array([1.0, 0, 1, 1, 1, 1])),
    "learn_task, si": lambda: learn_with(PATH),
    "learn_task, rwalk": lambda: learn_with(WALK),
    "learn_tasks": lambda: epoch_of_tasks(coupled),
    "learn_tasks, si": lambda: epoch_of_tasks(coupled, methods.si().wrap_optimizer),
    "learn_tasks, ewc": lambda: importance_of(methods.ewc()),
    "learn_tasks, kfac": lambda: importance_of(methods.kfac()),
    "learn_tasks, rwalk": lambda: importance_of(methods.rwalk()),
    "learn_sweep": lambda: sweep_of(methods.ewc()),
    "learn_sweep, local_mas": lambda: sweep_of(methods.local_mas()),
    "learn_stream": lambda: step_of_stream(coupled(1.0)),
    "mean_over_stream": lambda: (batch_of_stream, (PARAMS, jnp.zeros(())), PARAMS, BATCH),
    "score": lambda: (lambda p, b: evaluation.score(MODEL.apply, p, b, None, None), PARAMS, BATCH),
    "score, class mask": lambda: (
        lambda p, b, mask: evaluation.score(CNN_MODEL.apply, p, b._replace(inputs=IMAGES), None, mask),
        *(CNN_PARAMS, BATCH, jnp.array([True, True, False])),
    ),
    "kl_divergence": lambda: (
        lambda p, x: losses.kl_divergence(MODEL.apply(p, x), MODEL.apply(PARAMS, x)),
        *(PARAMS, INPUTS[0]),
    ),
    "generate": lambda: (lambda p: generate(APPLY, p, jnp.arange(3), 2, KEY), TRANSFORMER),
}
FOR_BOTH = {"fisher_diagonal", "kronecker_fisher", "learn_task", "learn_tasks", "learn_sweep", "learn_stream"}
CASES = [
    (name, platform)
    for number, name in enumerate(PROGRAMS)
    for platform in (("cuda", "tpu") if name in FOR_BOTH else (("cuda", "tpu")[number % 2],))
]


def lower(platform, function, *arguments):
    with lowering_for(platform):
        return jax.export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()


@pytest.mark.parametrize(("name", "platform"), CASES)
def test_programs_for_accelerators_need_no_device_no_wide_floats_and_no_host(name, platform, monkeypatch):
    program = PROGRAMS[name]()
    for asked in ("default_backend", "devices", "local_devices"):
        monkeypatch.setattr(jax, asked, refuse_to_say)
    lowered = lower(platform, *program)
    assert not re.search(r"[x<](f64|complex<f64>)>", lowered)
    targets = set(re.findall(r"custom_call @(\w+)", lowered))
    assert not {target for target in targets if "callback" in target.lower() or "lapack" in target}
    assert not re.search(r"stablehlo\.(send|recv|infeed|outfeed)", lowered)


def refuse_to_say(*_, **__):
    raise AssertionError("a program that is lowered for another platform asks for the devices at hand")


def test_every_public_function_of_arrays_is_lowered_above():
    described = {"explain"}  # makes no program
    public = {name for module in (importance, penalty) for name in module.__all__ if name.islower()} - described
    assert public <= {name.split(",")[0] for name in PROGRAMS}


@pytest.mark.parametrize(
    ("name", "of_accelerators"),
    [
        ("fisher_diagonal, CNN", r"stablehlo\.convolution"),  # a CPU gathers patches
        ("score, class mask", r"stablehlo\.convolution"),
        ("fisher_diagonal, CNN", rf"dot_general.*-> tensor<{NUM}x1x9x2xf32>"),  # a CPU: one gradient at a time
        ("empirical_fisher_diagonal, transformer", rf"dot_general.*-> tensor<{NUM}x1x8x32xf32>"),
        ("fisher_diagonal, reference", rf"tensor<{NUM}x4x5xf32>"),  # a CPU differentiates one example at a time
        ("add_reparametrized_penalty", r"stablehlo\.optimization_barrier"),  # a CPU drops it too early
    ],
)
def test_programs_for_accelerators_are_not_those_for_cpus(name, of_accelerators):
    program = PROGRAMS[name]()
    assert re.search(of_accelerators, lower("cuda", *program))
    assert not re.search(of_accelerators, lower("cpu", *program))
