"""A leaf of one network has one plain path, whatever kind of tree the network comes in."""

import collections
import dataclasses

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lifelong_jax import forms
from lifelong_jax._layouts import Layout
from lifelong_jax._paths import join, leaves_by_path, listed


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: jax.Array | None
    value: jax.Array


@jax.tree_util.register_pytree_node_class
class Unnamed:
    def __init__(self, *leaves):
        self.leaves = leaves

    def tree_flatten(self):
        return self.leaves, None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


class Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array | None


class Net(eqx.Module):
    layers: list[Layer]


class NnxNet(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2)])


ONES = np.ones((2, 3), np.float32)
BOXED = nn.Partitioned(ONES, (None, "model"))
FORM = forms.from_factors(jnp.eye(2)[None], jnp.eye(3)[None], Layout((2, 3), (2, 3), (0, 1), (1, 2, 3)))
ONE_NETWORK = {
    "lists": {"layers": [{"kernel": ONES, "bias": None}, {"kernel": ONES}]},
    "keys": {"layers": {"0": {"kernel": ONES}, "1": {"kernel": ONES}}},
    "numbers": {"layers": {0: {"kernel": ONES}, 1: {"kernel": ONES}}},
    "boxes": {"layers": ({"kernel": BOXED}, {"kernel": BOXED})},
    "equinox": Net([Layer(ONES, None), Layer(ONES, None)]),
    "nnx": nnx.state(NnxNet(), nnx.Param),
    "unnamed": {"layers": Unnamed({"kernel": ONES}, {"kernel": ONES})},
    "forms": {"layers": [{"kernel": FORM}, {"kernel": FORM}]},
}


@pytest.mark.parametrize("kind", ONE_NETWORK)
def test_one_network_has_the_same_paths_in_every_kind_of_tree(kind):
    leaves = leaves_by_path("params", ONE_NETWORK[kind])
    assert list(leaves) == ["layers/0/kernel", "layers/1/kernel"]
    in_order = jax.tree.leaves(ONE_NETWORK[kind], is_leaf=forms.is_form)
    assert all(ours is theirs for ours, theirs in zip(leaves.values(), in_order, strict=True))


def test_a_variable_with_kronecker_factors_has_the_path_of_its_leaf():
    state = nnx.state(NnxNet(), nnx.Param)
    importance = jax.tree.map(lambda leaf: FORM, state)
    assert list(leaves_by_path("importance", importance)) == ["layers/0/kernel", "layers/1/kernel"]


def test_a_layer_of_a_network_may_be_called_value():
    whole, half = Attention(jnp.ones(1), jnp.ones(2)), Attention(None, jnp.ones(2))
    assert list(leaves_by_path("params", {"attention": whole})) == ["attention/query", "attention/value"]
    assert list(leaves_by_path("params", {"attention": half})) == ["attention/value"]
    assert list(leaves_by_path("params", {"value": jnp.ones(2)})) == ["value"]


def test_a_tree_that_is_a_leaf_has_the_empty_path():
    assert list(leaves_by_path("params", ONES)) == [""]
    assert leaves_by_path("params", None) == {}
    assert (join("params", ""), join("params", "w")) == ("params", "params/w")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            collections.OrderedDict([(0, np.ones(1)), ("0", np.ones(1))]),
            r"params\[0\] and params\['0'\] have the same path, params/0: rename one",
        ),
        ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, r"params\['a'\]\['b'\] and params\['a/b'\] .* params/a/b"),
    ],
)
def test_two_leaves_with_one_path_are_named(tree, message):
    with pytest.raises(ValueError, match=message):
        leaves_by_path("params", tree)


def test_the_first_few_names_are_listed():
    assert listed(["a"]) == "a"
    assert listed(list("abc")) == "a, b, c"
    assert listed(list("abcde")) == "a, b, c and 2 more"
