"""Sharded arrays change no number, and the importance is sharded as the parameters are."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from lifelong_jax import (
    add_quadratic_penalty,
    consolidate,
    fisher_diagonal,
    forms,
    init_consolidation,
    init_training,
    kronecker_fisher,
    learn_task,
    mas_importance,
    path_integral,
    riemannian_walk,
)
from tests.lifelong_jax.importance.models import assert_close, made, normal

METHODS = ("structured", "reference")
MASK = np.array([True, True, False, True])


def place(mesh: jax.sharding.Mesh, tree: Any, *axes: Any) -> Any:
    """Shards all arrays of a tree over axes of a mesh; replicates them if there are none."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))


# Examples and weights that are sharded over an explicit axis.


def masked_output(mask: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    return jnp.where(mask, made("mlp").output_fn(params, x), 0)


def sampled(output_fn: Any, params: Any, examples: Any, **options: Any) -> Any:
    return fisher_diagonal(output_fn, params, examples, num_samples=2, key=jax.random.key(3), **options)


def run_all(params: Any, examples: Any, weights: Any, mask: Any) -> dict[str, Any]:
    return {
        method: sampled(
            Partial(masked_output, mask), params, examples, weights=weights, method=method, microbatch_size=2
        )
        for method in METHODS
    }


@functools.cache
def sharding_problem() -> tuple[tuple[Any, ...], dict[str, Any]]:
    data = (made("mlp").params, normal(5, 12, 6), np.arange(12, dtype=np.float32), MASK)
    return data, jax.device_get(run_all(*data))


@functools.cache
def sharded_results(inside_jit: bool, sharded: str) -> dict[str, Any]:
    (params, examples, weights, mask), _ = sharding_problem()
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    axes = ("data",) if sharded == "both" else ()
    placed = (place(mesh, params), place(mesh, examples, *axes), place(mesh, weights, "data"), place(mesh, mask))
    return jax.device_get((jax.jit(run_all) if inside_jit else run_all)(*placed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside_jit", [False, True])
@pytest.mark.parametrize("sharded", ["both", "weights"])
def test_sharded_examples(method: str, inside_jit: bool, sharded: str) -> None:
    _, expected = sharding_problem()
    assert_close(sharded_results(inside_jit, sharded)[method], expected[method], 1e-5)


# Parameters, and the features of examples, that are sharded over explicit axes.

SHARDINGS = {
    "replicated": {"w": (), "b": (), "o": ()},
    "tensor-parallel": {"w": (None, "model"), "b": ("model",), "o": ("model", None)},
    "over the data axis": {"w": ("data", None), "b": ("data",), "o": ("data", None)},
}


def network(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    return jnp.dot(hidden, params["o"], out_sharding=PartitionSpec() if on_mesh else None)  # explicit axes need it


def make_params() -> Any:
    return {"w": normal(0, 8, 6), "b": normal(1, 6), "o": normal(2, 6, 4)}


def importances(params: Any, inputs: Any) -> dict[str, Any]:
    sampling = {"num_samples": 2, "key": jax.random.key(3)}
    return {
        "structured": fisher_diagonal(network, params, inputs),
        "reference": fisher_diagonal(network, params, inputs, method="reference"),
        "sampled": fisher_diagonal(network, params, inputs, **sampling),
        "mas": mas_importance(network, params, inputs),
        "kronecker": kronecker_fisher(network, params, inputs),
    }


def dense(tree: Any) -> Any:
    """Makes arrays of Kronecker factors, whose eigenvectors have arbitrary signs."""
    return jax.device_get(tree | {"kronecker": forms.tree_map(forms.diagonal, tree["kronecker"])})


def shardings(tree: Any) -> list[Any]:
    return [[axes for axes in enumerate(leaf.sharding.spec) if axes[1]] for leaf in jax.tree.leaves(tree)]


@functools.cache
def unsharded_importances() -> dict[str, Any]:
    return dense(importances(make_params(), normal(5, 12, 8)))


@pytest.mark.parametrize(
    ("params", "examples"),
    [
        ("replicated", (None, "model")),
        ("tensor-parallel", ()),
        ("tensor-parallel", ("data",)),
        ("tensor-parallel", (("data", "model"),)),
        ("over the data axis", ("data",)),
        ("over the data axis", (None, "model")),
    ],
)
def test_sharded_parameters_and_features(params: str, examples: tuple[Any, ...]) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    placed = {name: place(mesh, leaf, *SHARDINGS[params][name]) for name, leaf in make_params().items()}
    inputs = place(mesh, normal(5, 12, 8), *examples)
    with jax.set_mesh(mesh):
        actual = importances(placed, inputs)
    assert_close(dense(actual), unsharded_importances(), 1e-5)
    for method in ("structured", "reference", "sampled", "mas"):
        assert shardings(actual[method]) == shardings(placed)


def learn_two_tasks(params: Any, inputs: Any) -> Any:
    optimizer = optax.chain(add_quadratic_penalty(2.0), optax.sgd(0.01, 0.9))

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(network(params, x)))

    consolidation = init_consolidation(params)
    for _ in range(2):
        state = init_training(optimizer, params, jax.random.key(1))
        state, _ = learn_task(loss_fn, optimizer, state, consolidation, inputs, num_epochs=1, batch_size=4)
        params = state.params
        consolidation = consolidate(consolidation, params, fisher_diagonal(network, params, inputs))
    return params, consolidation


def test_two_tasks_with_tensor_parallel_parameters() -> None:
    mesh, inputs = jax.make_mesh((2, 2), ("data", "model")), normal(5, 10, 8)
    placed = {name: place(mesh, leaf, *SHARDINGS["tensor-parallel"][name]) for name, leaf in make_params().items()}
    with jax.set_mesh(mesh):
        params, consolidation = learn_two_tasks(placed, place(mesh, inputs))
    chex.assert_trees_all_close((params, consolidation), learn_two_tasks(make_params(), inputs), rtol=1e-4, atol=1e-6)
    for tree in (params, *consolidation[:2]):
        assert shardings(tree) == shardings(placed)


# Inside of a user's own shard_map.


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("method", ["reference", "structured"])
def test_shards_of_a_users_own_shard_map_are_squared_one_by_one(method, check_vma):
    # With check_vma, a gradient with respect to replicated parameters would be summed over the shards first.
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32), "b": jnp.ones(3)}
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(16, 6)), jnp.float32)

    def logits_fn(params, x):
        return jnp.tanh(x @ params["w"]) * params["b"]

    def importances(params, inputs):
        fisher = fisher_diagonal(logits_fn, params, inputs, method=method)
        return fisher, mas_importance(logits_fn, params, inputs, method=method, weights=jnp.ones(len(inputs)))

    def of_shard(params, inputs):
        return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "x"), importances(params, inputs))

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec()}
    sharded = jax.jit(jax.shard_map(of_shard, mesh=mesh, check_vma=check_vma, **specs))(params, inputs)
    chex.assert_trees_all_close(sharded, importances(params, inputs), rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("wrap", [path_integral, riemannian_walk])
def test_walks_inside_of_a_users_own_shard_map(wrap, check_vma):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = wrap(optax.chain(add_quadratic_penalty(1.0), optax.sgd(0.1)))
    params, inputs = make_params(), normal(5, 12, 8)

    def loss_fn(params, x):
        return jnp.sum(jnp.square(jnp.tanh(x @ params["w"] + params["b"]) @ params["o"]))

    def learn(params, inputs, examples, mean=lambda grads: grads):
        state, none = optimizer.init(params), init_consolidation(params)
        of_batch = {"loss_fn": loss_fn, "examples": examples} if wrap is riemannian_walk else {}
        for _ in range(3):
            grads = mean(
                jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(jax.grad(loss_fn), (None, 0))(params, inputs))
            )
            updates, state = optimizer.update(grads, state, params, **none._asdict(), **of_batch)
            params = optax.apply_updates(params, updates)
        return params, state

    def of_shard(params, inputs):
        copies = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "x", to="varying"), params) if check_vma else params
        mean = lambda grads: jax.tree.map(lambda leaf: jax.lax.pmean(leaf, "x"), grads)  # noqa: E731
        _, state = learn(copies, inputs, inputs, mean)
        return jax.tree.map(lambda leaf: leaf[None], state)

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec("x")}
    states = jax.jit(jax.shard_map(of_shard, mesh=mesh, check_vma=check_vma, **specs))(params, inputs)
    _, expected = learn(params, inputs, inputs[3:6])  # the second shard's own examples
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], states), expected, rtol=1e-4, atol=1e-6)
