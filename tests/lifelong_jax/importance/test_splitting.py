"""Importances on a mesh: many devices give the numbers of one, share its work, and hold what a gradient holds.

There are four devices. XLA_FLAGS=--xla_force_host_platform_device_count=8 makes it eight.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax import (
    empirical_fisher_diagonal,
    fisher_diagonal,
    forms,
    kronecker_fisher,
    layer_output,
    local_mas_importance,
    mas_importance,
)
from lifelong_jax.importance import init_accumulation
from lifelong_jax.importance.kronecker import make_forms
from tests.lifelong_jax.importance.models import assert_close, in_float64, normal
from tests.programs import gradient_of, names_of_collectives, program_of

KEY = jax.random.key(3)


def network(params: Any, x: jax.Array) -> jax.Array:
    x = layer_output(jnp.tanh(x @ params["first"]["w"] + params["first"]["b"]))
    return x @ params["last"]["w"] + params["last"]["b"]


def layers_of_tokens(params: Any, x: jax.Array) -> jax.Array:
    """A stack of layers, scanned and rematerialised, on a sequence of tokens."""

    @jax.checkpoint
    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ weights["up"] * weights["scale"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, params["embedding"][x], params["layers"])
    return x @ params["embedding"].T[:, :4]


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.cos(network(params, x)))


def make_params() -> Any:
    dense = lambda n, rows, columns: {"w": normal(n, rows, columns), "b": normal(n + 1, columns)}  # noqa: E731
    return {"first": dense(0, 8, 16), "last": dense(2, 16, 8)}


def make_layers(num_layers: int = 3, width: int = 8, hidden: int = 16, vocabulary: int = 12) -> Any:
    layers = {
        "up": 0.3 * normal(1, num_layers, width, hidden),
        "scale": normal(2, num_layers, hidden),
        "down": 0.3 * normal(3, num_layers, hidden, width),
    }
    return {"embedding": normal(0, vocabulary, width), "layers": layers}


IMPORTANCES = {
    "empirical": empirical_fisher_diagonal,
    "exact": fisher_diagonal,
    "sampled": functools.partial(fisher_diagonal, num_samples=2, key=KEY),
    "mas": mas_importance,
    "jacobian": functools.partial(mas_importance, output_norm="jacobian"),
    "local_mas": local_mas_importance,
    "kronecker": kronecker_fisher,
}


def compute(name: str, params: Any, inputs: Any, **options: Any) -> Any:
    function = loss_fn if name == "empirical" else network
    return IMPORTANCES[name](function, params, inputs, **options)


NUM_DEVICES = jax.device_count()
LAYOUTS = {  # the mesh, the examples' axes, and an axis of the mesh for the rows or for the columns of the parameters
    "data-parallel": ((NUM_DEVICES,), "data", None),
    "over two axes": ((2, NUM_DEVICES // 2), ("data", "model"), None),
    "tensor-parallel": ((2, NUM_DEVICES // 2), "data", "columns"),
    "fsdp": ((NUM_DEVICES,), "data", "rows"),
    "replicas of fsdp": ((2, NUM_DEVICES // 2), ("data", "model"), "rows"),
}


def spec_of(leaf: Any, shape: tuple[int, ...], how: str | None) -> PartitionSpec:
    axis = "data" if len(shape) == 1 else "model"
    if how == "columns":
        return PartitionSpec(*[None] * (leaf.ndim - 1), axis)
    return PartitionSpec(axis) if how == "rows" else PartitionSpec()


def placed(layout: str, kind: AxisType, params: Any, inputs: Any) -> tuple[Any, Any]:
    shape, axes, how = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    params = jax.tree.map(lambda leaf: put(leaf, spec_of(leaf, shape, how)), params)
    return params, put(inputs, PartitionSpec(axes))


def dense(importance: Any) -> Any:
    """Makes arrays of Kronecker factors, whose eigenvectors have arbitrary signs."""
    with jax.enable_x64(True):
        return jax.device_get(forms.tree_map(forms.diagonal, importance))


@functools.cache
def on_one_device(name: str) -> Any:
    with jax.enable_x64(True):
        return dense(compute(name, *in_float64((make_params(), normal(5, 24, 8))), microbatch_size=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", IMPORTANCES)
def test_many_devices_equal_one(name: str, layout: str) -> None:
    with jax.enable_x64(True):
        data = placed(layout, AxisType.Auto, *in_float64((make_params(), normal(5, 24, 8))))
        importance = compute(name, *data, microbatch_size=2)
    assert_close(dense(importance), on_one_device(name), 1e-12)
    if name != "kronecker":
        has_sharding_of = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)  # noqa: E731
        assert jax.tree.all(jax.tree.map(has_sharding_of, importance, data[0]))


@pytest.mark.parametrize("name", ["empirical", "sampled", "kronecker"])
@pytest.mark.parametrize("inside_jit", [False, True])
def test_types_say_how_arrays_are_sharded_where_axes_are_explicit(name: str, inside_jit: bool) -> None:
    run = functools.partial(compute, name, microbatch_size=2)
    with jax.enable_x64(True):
        data = placed("fsdp", AxisType.Explicit, *in_float64((make_params(), normal(5, 24, 8))))
        importance = (jax.jit(run) if inside_jit else run)(*data)
    assert_close(dense(importance), on_one_device(name), 1e-12)


def test_axes_can_be_made_explicit_inside_of_a_users_jit() -> None:
    with jax.enable_x64(True):
        data = in_float64((make_params(), normal(5, 24, 8)))
        params, inputs = placed("data-parallel", AxisType.Auto, *data)
        run = functools.partial(compute, "sampled")
        specs = (jax.tree.map(lambda _: PartitionSpec(), params), PartitionSpec("data"))
        with jax.set_mesh(inputs.sharding.mesh):
            compiled = jax.jit(jax.sharding.explicit_axes(run, in_sharding=specs)).lower(params, inputs).compile()
            importance = compiled(params, inputs)
    assert_close(dense(importance), on_one_device("sampled"), 1e-12)
    assert names_of_collectives(compiled) == ["all-reduce"]


@pytest.mark.parametrize("layout", ["data-parallel", "fsdp"])
@pytest.mark.parametrize("microbatch_size", [1, 16, None])
def test_numbers_are_right_where_nothing_says_how_arrays_are_sharded(layout: str, microbatch_size: int | None) -> None:
    with jax.enable_x64(True):
        data = placed(layout, AxisType.Auto, *in_float64((make_params(), normal(5, 24, 8))))
        importance = jax.jit(functools.partial(compute, "sampled", microbatch_size=microbatch_size))(*data)
    assert_close(dense(importance), on_one_device("sampled"), 1e-12)


@pytest.mark.parametrize("layout", ["data-parallel", "fsdp"])
def test_examples_that_do_not_divide_evenly_are_padded_at_weight_0(layout: str) -> None:
    inputs, weights = np.full((24, 8), np.nan, np.float32), np.zeros(24, np.float32)
    inputs[:2], weights[:2] = normal(5, 2, 8), [0.5, 2]  # fewer than there are devices
    params, sharded = placed(layout, AxisType.Auto, make_params(), inputs)
    for name in ("sampled", "mas", "local_mas"):
        expected = compute(name, make_params(), inputs[:2], weights=weights[:2])
        assert_close(dense(compute(name, params, sharded, weights=weights)), jax.device_get(expected), 1e-5)


@pytest.mark.parametrize("layout", ["fsdp", "tensor-parallel"])
def test_accumulations_keep_the_shardings_of_the_parameters(layout: str) -> None:
    with jax.enable_x64(True):
        params, inputs = placed(layout, AxisType.Auto, *in_float64((make_params(), normal(5, 24, 8))))
        total = init_accumulation(params)
        for start in (0, 8, 16):
            batch = jax.device_put(inputs[start : start + 8], inputs.sharding)
            total = compute("sampled", params, batch, into=total)
    assert_close(dense(total.mean), on_one_device("sampled"), 1e-12)
    assert total.mean["first"]["w"].sharding.is_equivalent_to(params["first"]["w"].sharding, 2)


@pytest.mark.parametrize("layout", ["tensor-parallel", "replicas of fsdp"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_are_accumulated_whole(kind: AxisType, layout: str) -> None:
    with jax.enable_x64(True):
        params, inputs = placed(layout, kind, *in_float64((make_params(), normal(5, 24, 8))))
        total = init_accumulation(params, jax.eval_shape(functools.partial(compute, "kronecker"), params, inputs))
        for _ in range(2):
            total = compute("kronecker", params, inputs, into=total)
        importance = make_forms(total.mean)
    assert_close(dense(importance), on_one_device("kronecker"), 1e-12)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_importances_are_mapped_where_every_axis_has_examples(kind: AxisType) -> None:
    with jax.enable_x64(True):
        data = in_float64((make_params(), normal(5, 24, 8)))
        params, inputs = placed("over two axes", kind, *data)
        keys = jax.random.split(KEY, 2)
        of_key = lambda data, key: fisher_diagonal(network, *data, num_samples=1, key=key)  # noqa: E731
        mapped = jax.vmap(functools.partial(of_key, (params, inputs)))(keys)
        expected = jax.vmap(functools.partial(of_key, data))(keys)
    assert_close(jax.device_get(mapped), jax.device_get(expected), 1e-12)


def convolution(kernel: jax.Array, image: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(image[None], kernel, (1, 1), "SAME", dimension_numbers=numbers).mean((0, 1, 2))


@pytest.mark.parametrize("method", ["structured", "reference"])
def test_kernels_may_be_sharded_over_their_features_and_the_examples_axis(method: str) -> None:
    """XLA's partitioner gets the gradients of each example by such a kernel wrong."""
    with jax.enable_x64(True):
        kernel, images = in_float64((normal(0, 3, 3, 2, NUM_DEVICES), normal(1, 2 * NUM_DEVICES, 5, 4, 2)))
        mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
        by_feature = NamedSharding(mesh, PartitionSpec(None, None, None, "data"))
        by_image = NamedSharding(mesh, PartitionSpec("data"))
        data = (jax.device_put(kernel, by_feature), jax.device_put(images, by_image))
        actual = mas_importance(convolution, *data, method=method, microbatch_size=1)
        expected = mas_importance(convolution, kernel, images, method=method, microbatch_size=1)
    assert_close(jax.device_get(actual), jax.device_get(expected), 1e-12)
    assert actual.sharding.is_equivalent_to(by_feature, 4)


@functools.cache
def layers_on_one_device() -> Any:
    with jax.enable_x64(True):
        params = in_float64(make_layers())
        return jax.device_get([run(params, make_tokens()) for run in runs_of_layers()])


def make_tokens(num_examples: int = 8, length: int = 5, vocabulary: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (num_examples, length)).astype(np.int32)


def runs_of_layers() -> list[Any]:
    return [
        functools.partial(fisher_diagonal, layers_of_tokens, num_samples=1, key=KEY),
        functools.partial(fisher_diagonal, layers_of_tokens, num_samples=2, key=KEY, microbatch_size=1),
        functools.partial(mas_importance, layers_of_tokens, weights=np.arange(8, dtype=np.float32)),
    ]


@pytest.mark.parametrize("spec", [PartitionSpec(None, "data"), PartitionSpec("model", "data"), PartitionSpec("data")])
def test_stacked_layers_may_be_sharded_over_any_axis(spec: PartitionSpec) -> None:
    shape = (2, 2) if "model" in spec else (4,)
    mesh = jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))
    with jax.enable_x64(True):
        params = in_float64(make_layers(num_layers=3 if spec[0] is None else 4))
        expected = layers_on_one_device()
        if spec[0] is not None:
            expected = jax.device_get([run(params, make_tokens()) for run in runs_of_layers()])
        place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
        placed = params | {"layers": jax.tree.map(place, params["layers"])}
        tokens = jax.device_put(make_tokens(), NamedSharding(mesh, PartitionSpec("data")))
        actual = [run(placed, tokens) for run in runs_of_layers()]
    assert_close(jax.device_get(actual), expected, 1e-12)


# What the compiler makes of it.


def wide(layout: str, num_examples: int) -> tuple[Any, Any]:
    """Parameters so wide that little else counts."""
    dense = lambda n, rows, columns: {"w": normal(n, rows, columns), "b": normal(n + 1, columns)}  # noqa: E731
    params = {"first": dense(0, 256, 512), "last": dense(2, 512, 16)}
    return placed(layout, AxisType.Auto, params, normal(5, num_examples, 256))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["empirical", "exact", "mas", "kronecker"])
def test_each_device_does_its_own_part_and_sums_are_added_once(name: str) -> None:
    params, inputs = wide("data-parallel", 512)
    split = program_of(functools.partial(compute, name, microbatch_size=32), params, inputs)
    whole = program_of(functools.partial(compute, name, microbatch_size=32), *jax.device_get((params, inputs)))
    # A loop over microbatches counts once, and there are as many examples in each: so look at the number of them.
    assert names_of_collectives(split) == ["all-reduce"]
    loops = [re.findall(r'"known_trip_count":\{"n":"(\d+)"', program.as_text()) for program in (split, whole)]
    assert {"16", str(16 // NUM_DEVICES)} == set(loops[1]) - set(loops[0]) | set(loops[0]) - set(loops[1])


@pytest.mark.usefixtures("optimized")
def test_work_is_split_inside_of_a_users_jit_too() -> None:
    params, inputs = wide("data-parallel", 512)
    run = jax.jit(functools.partial(compute, "empirical"))
    flops = [
        run.lower(*data).compile().cost_analysis()["flops"]
        for data in ((params, inputs), jax.device_get((params, inputs)))
    ]
    assert flops[0] < 1.1 / NUM_DEVICES * flops[1]


def memory(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
def test_fully_sharded_parameters_take_the_memory_of_their_gradient() -> None:
    params, inputs = wide("fsdp", 128)
    ours = program_of(functools.partial(compute, "empirical"), params, inputs)
    theirs = gradient_of(loss_fn, params, inputs)
    assert memory(ours) <= 1.3 * memory(theirs)
    assert ours.memory_analysis().output_size_in_bytes < 1.1 * theirs.memory_analysis().output_size_in_bytes


@pytest.mark.usefixtures("optimized")
def test_stacked_layers_take_the_memory_of_their_gradient() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    put = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    params = make_layers(num_layers=8, width=64, hidden=256, vocabulary=64)
    params = {"embedding": put(params["embedding"], "data")} | {
        "layers": jax.tree.map(lambda leaf: put(leaf, None, "data"), params["layers"])
    }
    tokens = put(make_tokens(16, 32, 64), "data")

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(layers_of_tokens(params, tokens)))

    ours = program_of(functools.partial(empirical_fisher_diagonal, loss, microbatch_size=4), params, tokens)
    assert memory(ours) <= 1.3 * memory(gradient_of(loss, params, tokens))
