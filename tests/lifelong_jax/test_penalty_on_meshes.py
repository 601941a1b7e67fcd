"""A step with a penalty on a mesh: no more collectives than the step without it, everything stays where it is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lifelong_jax import (
    add_quadratic_penalty,
    init_consolidation,
    proximal_adam,
    proximal_quadratic_penalty,
    quadratic_penalty,
)
from lifelong_jax.consolidation import compress_consolidation
from tests.programs import names_of_collectives

SPECS = {
    "data-parallel": {"w": (), "b": (), "o": ()},
    "fsdp": {"w": ("data",), "b": ("data",), "o": ("data",)},
    "tensor-parallel": {"w": (None, "model"), "b": ("model",), "o": ("model",)},
}
OPTIMIZERS = {
    "coupled": lambda strength: optax.chain(add_quadratic_penalty(strength), optax.adam(1e-2)),
    "decoupled": lambda strength: optax.chain(optax.adam(1e-2), proximal_quadratic_penalty(1e-2, strength)),
    "proximal_adam": lambda strength: proximal_adam(1e-2, strength),
}


def network(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["o"]


def make_step(optimizer: Any) -> Any:
    def step(params: Any, state: Any, consolidation: Any, inputs: jax.Array) -> Any:
        loss = lambda params: jnp.mean(jnp.square(jax.vmap(network, (None, 0))(params, inputs)))  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, **consolidation._asdict())
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def make_data(place: Any, compressed: bool = False) -> tuple[Any, Any, Any]:
    draw = np.random.default_rng(0).normal
    params = {"w": draw(size=(8, 16)), "b": draw(size=16), "o": draw(size=(16, 4))}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    params = {name: place(leaf, name) for name, leaf in params.items()}
    consolidation = init_consolidation(jax.tree.map(lambda leaf: 0.5 * leaf, params))
    consolidation = consolidation._replace(importance=jax.tree.map(jnp.abs, params))
    if compressed:
        consolidation = jax.jit(compress_consolidation)(consolidation)
    return params, consolidation, draw(size=(8, 8)).astype(np.float32)


def on_mesh(layout: str, kind: AxisType = AxisType.Auto) -> Any:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    put = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    return lambda leaf, name: put(leaf, *SPECS[layout].get(name, ("data",)))


@functools.cache
def collectives_without_penalty(layout: str) -> list[str]:
    place = on_mesh(layout)
    params, consolidation, inputs = make_data(place)
    optimizer = optax.with_extra_args_support(optax.adam(1e-2))
    state = optimizer.init(params)
    return names_of_collectives(
        make_step(optimizer).lower(params, state, consolidation, place(inputs, "inputs")).compile()
    )


@pytest.mark.usefixtures("optimized", "standard_promotion")
@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize(("name", "compressed"), [*((name, False) for name in OPTIMIZERS), ("coupled", True)])
def test_a_step_with_a_penalty_has_the_collectives_of_one_without(name: str, compressed: bool, layout: str) -> None:
    place = on_mesh(layout)
    optimizer = OPTIMIZERS[name](2.0)
    params, consolidation, inputs = make_data(place, compressed)
    state = optimizer.init(params)
    step = make_step(optimizer)
    compiled = step.lower(params, state, consolidation, place(inputs, "inputs")).compile()
    assert names_of_collectives(compiled) == collectives_without_penalty(layout)
    donated = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((params, state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= donated - 64  # scalars may be copied

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    moved, _ = step(params, state, consolidation, place(inputs, "inputs"))
    same = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), moved, shardings)
    assert jax.tree.all(same)
    params, consolidation, inputs = make_data(lambda leaf, name: leaf, compressed)
    expected, _ = make_step(optimizer)(jax.tree.map(jnp.asarray, params), optimizer.init(params), consolidation, inputs)
    for leaf, other in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", SPECS)
def test_penalties_take_explicit_axes(layout: str) -> None:
    params, consolidation, _ = make_data(on_mesh(layout, AxisType.Explicit))
    plain, of_plain, _ = make_data(lambda leaf, name: jnp.asarray(leaf))
    expected = quadratic_penalty(plain, of_plain, 2.0)
    np.testing.assert_allclose(jax.jit(quadratic_penalty)(params, consolidation, 2.0), expected, rtol=1e-6)
    update, _ = add_quadratic_penalty(2.0).update(params, optax.EmptyState(), params, **consolidation._asdict())
    assert jax.tree.all(jax.tree.map(lambda u, p: jax.typeof(u).sharding == jax.typeof(p).sharding, update, params))
