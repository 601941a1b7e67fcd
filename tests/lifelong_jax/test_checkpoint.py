"""Consolidations are read back to the bit; damaged files are found and named; a failed write changes nothing."""

import collections
import json
import pathlib
import pickle
import subprocess
import sys
import tracemalloc

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec as P

import lifelong_jax
from lifelong_jax import Consolidation, forms, init_consolidation
from lifelong_jax._layouts import Layout
from lifelong_jax._safetensors import StoredTensor
from lifelong_jax.checkpoint import load_consolidation, read_metadata, save_consolidation
from lifelong_jax.consolidation import compress_consolidation
from lifelong_jax.growth import extend_consolidation, restrict_consolidation
from tests.obstacles import OBSTACLES

PARAMS = {
    "layers": [{"w": np.arange(6, dtype=np.float32).reshape(2, 3), "frozen": None}, {"w": np.float32(1)}],
    "narrow": np.array([1.0, -2.5], jnp.bfloat16),
}
PARAMS, KEPT = jax.device_put((PARAMS, Consolidation(PARAMS, jax.tree.map(np.abs, PARAMS))))


def save(file, consolidation=KEPT, **options):
    save_consolidation(file, consolidation, estimator="exact Fisher diagonal", num_examples=60, **options)


def test_a_consolidation_comes_back_to_the_bit(tmp_path):
    save(tmp_path / "kept.safetensors")
    loaded = load_consolidation(tmp_path / "kept.safetensors", like=KEPT)
    chex.assert_trees_all_equal(loaded, KEPT)
    chex.assert_trees_all_equal_dtypes(loaded, KEPT)
    assert jax.tree.structure(loaded) == jax.tree.structure(KEPT)
    abstract = jax.eval_shape(lambda: KEPT)
    chex.assert_trees_all_equal(load_consolidation(tmp_path / "kept.safetensors", like=abstract), KEPT)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_an_empty_leaf_is_one_too(tmp_path):
    kept = Consolidation(jnp.zeros((0, 3)), jnp.zeros((0, 3)))
    save(tmp_path / "kept.safetensors", kept)
    assert load_consolidation(tmp_path / "kept.safetensors", like=kept).anchor.shape == (0, 3)


def test_any_program_can_read_a_consolidation(tmp_path):
    save(tmp_path / "kept.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "kept.safetensors")
    np.testing.assert_array_equal(tensors["anchor/layers/0/w"], PARAMS["layers"][0]["w"])
    np.testing.assert_array_equal(tensors["importance/narrow"], KEPT.importance["narrow"])
    metadata = read_metadata(tmp_path / "kept.safetensors")
    assert metadata["estimator"] == "exact Fisher diagonal"
    assert metadata["num_examples"] == "60"
    assert metadata["library_version"] == lifelong_jax.__version__
    assert "strength / 2 * sum(importance * (params - anchor) ** 2)" in metadata["penalty"]


def test_equal_consolidations_make_equal_files(tmp_path):
    contents = set()
    estimator = 'the Ω of "MAS"\n'
    for _ in range(5):  # safetensors orders the metadata otherwise each time
        save_consolidation(tmp_path / "kept.safetensors", KEPT, estimator=estimator, num_examples=60)
        contents.add((tmp_path / "kept.safetensors").read_bytes())
    assert len(contents) == 1
    assert read_metadata(tmp_path / "kept.safetensors")["estimator"] == estimator


def test_a_file_is_what_safetensors_would_write(tmp_path):
    tree = {f"{name} of {np.dtype(dtype)}": jnp.ones((3, size), dtype) for name, size, dtype in zip(
        "çdbaee", (2, 1, 3, 0, 5, 1), (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float32, jnp.float16, jnp.bfloat16),
        strict=True)}  # fmt: skip
    save(tmp_path / "kept.safetensors", compress_consolidation(Consolidation(tree, tree), anchor=None))
    tensors = safetensors.numpy.load_file(tmp_path / "kept.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16", "float16", "float32", "uint8"}

    def parts(contents):
        end = 8 + int.from_bytes(contents[:8], "little")
        return json.loads(contents[8:end], object_pairs_hook=list), end, contents[end:]

    written = (tmp_path / "kept.safetensors").read_bytes()
    header, end, data = parts(safetensors.numpy.save(tensors, read_metadata(tmp_path / "kept.safetensors")))
    header[0] = ("__metadata__", sorted(header[0][1]))  # which safetensors writes in any order
    assert parts(written) == (header, end, data)


def on_mesh(tree, spec, num_devices=4):
    """The arrays of a tree, sharded over a mesh."""
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def test_a_file_is_the_same_for_all_meshes_and_loaded_onto_any(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    tree = {"w": jnp.arange(64.0).reshape(8, 8), "codes": jnp.arange(8, dtype=jnp.bfloat16)}
    kept = Consolidation(tree, tree)
    placed = [kept, on_mesh(kept, P("data")), on_mesh(kept, P(), 2)]
    for file, consolidation in zip(files, placed, strict=True):
        save(file, consolidation)
        assert file.read_bytes() == files[0].read_bytes()
        for like in placed:
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
            loaded = load_consolidation(file, like)
            chex.assert_trees_all_equal(loaded, kept)
            assert jax.tree.all(jax.tree.map(lambda ours, theirs: ours.sharding == theirs.sharding, loaded, like))
    save(files[0], placed[1], anchor="digest")
    whole = files[0].read_bytes()
    save(files[0], kept, anchor="digest")
    assert files[0].read_bytes() == whole
    chex.assert_trees_all_equal(load_consolidation(files[0], params=placed[1].anchor), kept)


def test_a_mesh_without_devices_is_refused(tmp_path):
    save(tmp_path / "kept.safetensors")
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, P())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), KEPT)
    with pytest.raises(
        ValueError, match=r"^like.anchor\['layers'\]\[0\]\['w'\] is sharded over a mesh without devices"
    ):
        load_consolidation(tmp_path / "kept.safetensors", like)


def test_the_host_holds_no_more_than_a_leaf_or_two(tmp_path, monkeypatch):
    leaf = np.random.default_rng(0).random((256, 256), np.float32)
    for _ in range(2):  # the first time, it compiles; an array that has been read may hold what was read
        kept = on_mesh(Consolidation(*[{str(number): leaf for number in range(8)}] * 2), P("data"))
        tracemalloc.start()
        save(tmp_path / "kept.safetensors", kept)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 3 * leaf.nbytes
    read, sizes = StoredTensor.read, []
    monkeypatch.setattr(
        StoredTensor, "read", lambda *arguments: sizes.append(read(*arguments).nbytes) or read(*arguments)
    )
    load_consolidation(tmp_path / "kept.safetensors", like=kept)
    assert sizes == [leaf.nbytes // 4] * (4 * 16)  # of each device


def test_another_program_goes_on_from_a_consolidation(tmp_path):
    program = """
import sys, jax, jax.numpy as jnp
from lifelong_jax import consolidate, init_consolidation
from lifelong_jax.checkpoint import save_consolidation
params = {"w": jnp.array([1.0, 3.0])}
kept = consolidate(init_consolidation(params), params, {"w": jnp.array([0.5, 2.0])})
save_consolidation(sys.argv[1], kept, estimator="MAS", num_examples=7)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "kept.safetensors")], check=True)
    loaded = load_consolidation(tmp_path / "kept.safetensors", like=init_consolidation({"w": jnp.zeros(2)}))
    chex.assert_trees_all_equal(loaded, Consolidation({"w": jnp.array([1.0, 3.0])}, {"w": jnp.array([0.5, 2.0])}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"more": jnp.zeros(1)},
            "kept.safetensors has no leaf anchor/more, importance/more. Load the file without like",
        ),
        (
            {"layers": None, "new": jnp.zeros(1)},
            "kept.safetensors has no leaf anchor/new, importance/new, and like has no leaf anchor/layers/0/w, "
            "anchor/layers/1/w, importance/layers/0/w and 1 more. Load the file without like",
        ),
        ({"narrow": None}, "same structure, but like has no leaf anchor/narrow, importance/narrow. Load"),
        ({"narrow": jnp.zeros(3)}, r"anchor/narrow has shape \[2\] in .*kept.safetensors, but \[3\] in like. Load"),
        ({"narrow": jnp.zeros(2)}, r"anchor/narrow has dtype bfloat16 in .*, but float32 in like.$"),
    ],
)
def test_the_first_mismatches_are_named(tmp_path, changed, message):
    save(tmp_path / "kept.safetensors")
    like = PARAMS | changed
    with pytest.raises(ValueError, match=message):
        load_consolidation(tmp_path / "kept.safetensors", like=Consolidation(like, like))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(4, name="trunk")(x))


class Nnx(nnx.Module):
    def __init__(self):
        self.trunk, self.head = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))


class Dense(eqx.Module):
    kernel: jax.Array
    bias: jax.Array


class Equinox(eqx.Module):
    trunk: Dense
    head: Dense


def one_network():
    """The parameters of one network in several kinds of tree."""
    state = nnx.state(Nnx(), nnx.Param)
    values = nnx.to_pure_dict(state)
    linen = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones(3))["params"]
    assert jax.tree.structure(linen) == jax.tree.structure(values)
    layers = {name: Dense(**layer) for name, layer in values.items()}
    return {"linen": values, "nnx": state, "equinox": Equinox(**layers), "dict of modules": layers}


@pytest.mark.parametrize("saved", ["linen", "nnx", "equinox", "dict of modules"])
def test_a_network_has_one_file_in_every_kind_of_tree(tmp_path, saved):
    networks = one_network()
    with_factors = forms.from_factors(jnp.eye(3)[None], jnp.eye(4)[None], Layout((3, 4), (3, 4), (0, 1), (1, 3, 4)))

    def consolidation(params):
        leaves, structure = jax.tree.flatten(params)
        importance = [with_factors if leaf.shape == (3, 4) else jnp.abs(leaf) for leaf in leaves]
        return Consolidation(params, jax.tree.unflatten(structure, importance))

    save(tmp_path / "one.safetensors", consolidation(networks[saved]))
    for params in networks.values():
        save(tmp_path / "other.safetensors", consolidation(params))
        assert (tmp_path / "other.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
        like = jax.tree.map(jnp.zeros_like, consolidation(params))
        loaded = load_consolidation(tmp_path / "one.safetensors", like)
        assert jax.tree.structure(loaded) == jax.tree.structure(consolidation(params))
        chex.assert_trees_all_equal(loaded, consolidation(params))
    whole = load_consolidation(tmp_path / "one.safetensors")
    assert jax.tree.structure(whole) == jax.tree.structure(consolidation(networks["linen"]))
    chex.assert_trees_all_equal(whole, consolidation(networks["linen"]))


def test_a_file_is_loaded_in_part_and_into_more(tmp_path):
    save(tmp_path / "kept.safetensors")
    whole = load_consolidation(tmp_path / "kept.safetensors")
    assert whole.anchor.keys() == {"layers", "narrow"}
    part = restrict_consolidation(whole, {"layers": [{"w": jnp.zeros((2, 2))}]})
    chex.assert_trees_all_equal(part.anchor, {"layers": [{"w": PARAMS["layers"][0]["w"][:, :2]}]})
    extended = extend_consolidation(whole, PARAMS | {"head": jnp.ones(2)})
    chex.assert_trees_all_equal(extended.importance, KEPT.importance | {"head": jnp.zeros(2)})


@pytest.mark.parametrize("tree", [jnp.ones(2), {}])
def test_a_tree_without_branches_is_loaded_as_it_is(tmp_path, tree):
    save(tmp_path / "kept.safetensors", Consolidation(tree, tree))
    chex.assert_trees_all_equal(load_consolidation(tmp_path / "kept.safetensors"), Consolidation(tree, tree))


def test_names_that_are_not_unique_are_refused(tmp_path):
    file, ones = tmp_path / "kept.safetensors", jnp.ones((1, 1))
    twice = collections.OrderedDict([(0, ones), ("0", ones)])
    with pytest.raises(ValueError, match=r"anchor\[0\] and anchor\['0'\] have the same path, anchor/0: rename one"):
        save(file, Consolidation(twice, twice))
    anchor = {"w": ones, "w/row_values": ones}
    form = forms.from_factors(ones[None], ones, Layout((1, 1), (1, 1), (0, 1), (1, 1, 1)))
    with pytest.raises(ValueError, match="two arrays would have the name importance/w/row_values in the file"):
        save(file, Consolidation(anchor, anchor | {"w": form}))
    nested = {"w": ones, "w/a/b": ones}
    save(file, Consolidation(nested, nested))
    chex.assert_trees_all_equal(load_consolidation(file, init_consolidation(nested)).anchor, nested)
    with pytest.raises(ValueError, match="has the leaves anchor/w and anchor/w/a/b, which no nested dicts have"):
        load_consolidation(file)


def test_a_file_of_the_first_format_is_read():
    file = pathlib.Path(__file__).parent / "files" / "first_format.safetensors"
    kernel, bias, layers = jnp.arange(6.0).reshape(2, 3), jnp.ones(3), [{"it's": jnp.array([1, -2.5], jnp.bfloat16)}]
    form = forms.from_factors(2 * jnp.eye(2)[None], jnp.ones((1, 3)), Layout((2, 3), (2, 3), (0, 1), (1, 2, 3)))

    def tree(kernel, layers):
        return {"layers": layers, "net": nnx.State({"trunk": {"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}})}

    kept = Consolidation(tree(kernel, layers), tree(form, jax.tree.map(jnp.abs, layers)))
    loaded = load_consolidation(file, like=kept)
    assert jax.tree.structure(loaded) == jax.tree.structure(kept)
    chex.assert_trees_all_equal(loaded, kept)
    assert read_metadata(file)["estimator"] == "Kronecker factors"
    with pytest.raises(ValueError, match="is of an earlier version: pass like"):
        load_consolidation(file)
    with pytest.raises(
        ValueError, match=r"no leaf anchor\['w'\].* The file is of an earlier version: pass a like of the"
    ):
        load_consolidation(file, like=Consolidation({"w": kernel}, {"w": kernel}))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_codes_come_back_to_the_bit(tmp_path, storage):
    kept, file = compress_consolidation(KEPT, importance=storage), tmp_path / "kept.safetensors"
    save(file, kept)
    for like in (kept, jax.eval_shape(lambda: kept)):
        loaded = load_consolidation(file, like=like)
        chex.assert_trees_all_equal(loaded, kept)
        chex.assert_trees_all_equal_dtypes(loaded, kept)
        assert jax.tree.structure(loaded) == jax.tree.structure(kept)
    whole = load_consolidation(file)
    chex.assert_trees_all_equal(whole.importance["layers"]["0"]["w"], kept.importance["layers"][0]["w"])
    assert read_metadata(file)["format"][-1] == "3" and "(codes - 255) / 8" in read_metadata(file)["codes"]
    with pytest.raises(ValueError, match="has no leaf importance/layers/0/w, importance/layers/1/w, importance/narrow"):
        load_consolidation(file, like=KEPT)
    save(file)
    assert read_metadata(file)["format"][-1] == "2"  # which earlier versions read, too
    with pytest.raises(ValueError, match="has no leaf importance/layers/0/w/codes"):
        load_consolidation(file, like=kept)


def test_an_anchor_is_named_by_its_digest_and_not_copied(tmp_path):
    kept, file = compress_consolidation(KEPT, anchor=None), tmp_path / "kept.safetensors"
    save(file, kept, anchor="digest")
    assert not [name for name in safetensors.numpy.load_file(file) if "anchor" in name]
    for like in (kept, None):
        loaded = load_consolidation(file, like, params=PARAMS)
        chex.assert_trees_all_equal(jax.tree.leaves(loaded), jax.tree.leaves(kept))
        pairs = zip(jax.tree.leaves(loaded.anchor), jax.tree.leaves(PARAMS), strict=True)
        assert all(ours.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer() for ours, theirs in pairs)
    save(file, KEPT, anchor="digest")
    chex.assert_trees_all_equal(load_consolidation(file, KEPT, params=PARAMS), KEPT)


def test_a_checkpoint_of_another_kind_or_dtype_is_the_anchor_if_its_values_are(tmp_path):
    networks, file = one_network(), tmp_path / "kept.safetensors"
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), networks["linen"])
    importance = jax.tree.map(jnp.abs, networks["linen"])
    save(file, compress_consolidation(Consolidation(networks["linen"], importance)), anchor="digest")
    for params in (networks["equinox"], rounded):
        chex.assert_trees_all_equal(load_consolidation(file, params=params).anchor, rounded)
    save(file, Consolidation(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded), importance), anchor="digest")
    assert load_consolidation(file, params=rounded).anchor["head"]["bias"].dtype == jnp.float32


def test_another_checkpoint_is_refused_with_both_digests(tmp_path):
    file, other = tmp_path / "kept.safetensors", PARAMS | {"narrow": jnp.array([1.0, -2.4], jnp.bfloat16)}
    save(file, compress_consolidation(KEPT), anchor="digest")
    digest = read_metadata(file)["anchor_sha256"]
    with pytest.raises(ValueError, match=rf"params is not the anchor of .*: its .* is [0-9a-f]{{64}}, .* {digest}"):
        load_consolidation(file, params=other)
    with pytest.raises(ValueError, match=rf"has no anchor, but the SHA-256 digest of one, {digest}: pass params"):
        load_consolidation(file)
    with pytest.raises(ValueError, match="params must have the same structure, but params has no leaf anchor/narrow"):
        load_consolidation(file, params={"layers": PARAMS["layers"]})
    with pytest.raises(ValueError, match=r"anchor/narrow has shape \[2\] in .*, but \[3\] in params"):
        load_consolidation(file, params=PARAMS | {"narrow": jnp.ones(3)})
    with pytest.raises(ValueError, match="anchor must be one of arrays, digest, not 'hash'"):
        save(file, anchor="hash")
    save(file)
    with pytest.raises(ValueError, match="has its anchor: leave out params"):
        load_consolidation(file, params=PARAMS)


def test_double_precision_is_not_lost_in_silence(tmp_path):
    kept = Consolidation(np.ones(2), np.ones(2))
    save(tmp_path / "kept.safetensors", kept)
    with pytest.raises(ValueError, match="anchor has dtype float64: set jax_enable_x64"):
        load_consolidation(tmp_path / "kept.safetensors", like=kept)
    with jax.enable_x64(True):
        assert load_consolidation(tmp_path / "kept.safetensors", like=kept).anchor.dtype == np.float64


@pytest.mark.parametrize("compressed", [False, True])
def test_every_flipped_byte_of_a_consolidation_is_found(tmp_path, compressed):
    file = tmp_path / "kept.safetensors"
    kept, arguments = KEPT, {"like": KEPT}
    if compressed:
        params = {"w": jnp.arange(5.0)}
        kept = compress_consolidation(Consolidation(params, params), anchor=None)
        arguments = {"like": kept, "params": params}
    save(file, kept, anchor="digest" if compressed else "arrays")
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:  # padding in the header may say anything
            chex.assert_trees_all_equal(load_consolidation(file, **arguments), kept)
        except ValueError as error:
            assert "damaged" in str(error)
        else:
            assert whole[position : position + 1] in b" "
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_consolidation(file, **arguments)


def test_bad_consolidations_are_refused(tmp_path):
    file = tmp_path / "kept.safetensors"
    save(file)
    before = file.read_bytes()
    ones = {"w": jnp.ones(2)}
    for kept, message in (
        (Consolidation(ones, {"w": jnp.ones(3)}), r"importance\['w'\] has shape \(3,\)"),
        (Consolidation(ones, {"w": -jnp.ones(2)}), r"importance\['w'\] has entries that are NaN, infinite or negative"),
        (Consolidation({"w": jnp.array([1.0, np.nan])}, ones), r"anchor\['w'\] has entries that are NaN"),
        (
            Consolidation(*[jnp.ones(2, jnp.float8_e4m3fn)] * 2),
            "anchor has dtype float8_e4m3fn, but only these can be saved: bfloat16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save(file, kept)
    with pytest.raises(TypeError, match="anchor has dtype int32"):
        save(file, Consolidation(jnp.arange(2), jnp.ones(2)))
    with pytest.raises(TypeError, match="estimator must be a string, not int"):
        save_consolidation(file, KEPT, estimator=3, num_examples=60)
    with pytest.raises(ValueError, match="num_examples must be an integer of at least 1"):
        save_consolidation(file, KEPT, estimator="MAS", num_examples=0)
    assert file.read_bytes() == before
    safetensors.numpy.save_file({"anchor": np.ones(2)}, file)
    with pytest.raises(ValueError, match="was not written by save_consolidation"):
        load_consolidation(file, like=KEPT)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    save(tmp_path / "kept.safetensors")
    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load_consolidation(tmp_path / "kept.safetensors", like=KEPT)


@pytest.mark.parametrize(("obstacle", "reason"), OBSTACLES)
def test_the_old_file_is_kept_if_the_new_one_cannot_be_written(tmp_path, monkeypatch, obstacle, reason):
    file = tmp_path / "kept.safetensors"
    save(file)
    before = file.read_bytes()
    with (
        obstacle(tmp_path, monkeypatch),
        pytest.raises(OSError, match=rf"cannot be written \({reason}\); what was there before is kept"),
    ):
        save(file, Consolidation(jnp.ones(300), jnp.ones(300)))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("consolidation", "message"),
    [
        (Consolidation(jnp.ones(2), -jnp.ones(2)), "importance has entries that are NaN, infinite or negative"),
        (Consolidation(jnp.full(2, jnp.nan), jnp.ones(2)), "anchor has entries that are NaN or infinite"),
    ],
)
def test_what_would_not_be_written_is_not_read(tmp_path, monkeypatch, consolidation, message):
    file = tmp_path / "kept.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(lifelong_jax._checks, "check_importance", lambda name, tree: None)
        patched.setattr(lifelong_jax._checks, "check_finite", lambda name, tree: None)
        save(file, consolidation)
    with pytest.raises(ValueError, match=message):
        load_consolidation(file, like=consolidation)
