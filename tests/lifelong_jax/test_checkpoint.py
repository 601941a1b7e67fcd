"""Consolidations are read back to the bit; damaged files are found and named; a failed write changes nothing."""

import pickle
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lifelong_jax
from lifelong_jax import Consolidation, init_consolidation
from lifelong_jax.checkpoint import load_consolidation, read_metadata, save_consolidation
from tests.obstacles import OBSTACLES

PARAMS = {
    "layers": [{"w": jnp.arange(6.0).reshape(2, 3), "frozen": None}, {"w": jnp.ones(())}],
    "narrow": jnp.array([1.0, -2.5], jnp.bfloat16),
}
KEPT = Consolidation(PARAMS, jax.tree.map(jnp.abs, PARAMS))


def save(file, consolidation=KEPT):
    save_consolidation(file, consolidation, estimator="exact Fisher diagonal", num_examples=60)


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
    np.testing.assert_array_equal(tensors["anchor['layers'][0]['w']"], PARAMS["layers"][0]["w"])
    np.testing.assert_array_equal(tensors["importance['narrow']"], KEPT.importance["narrow"])
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
        ({"more": jnp.zeros(1)}, r"kept.safetensors has no leaf anchor\['more'\]"),
        ({"layers": None}, r"like has no leaf anchor\['layers'\]\[0\]\['w'\]"),
        ({"narrow": jnp.zeros(3)}, r"anchor\['narrow'\] has shape \[2\] in .*kept.safetensors, but \[3\] in like"),
        ({"narrow": jnp.zeros(2)}, r"anchor\['narrow'\] has dtype bfloat16 in .*, but float32 in like"),
    ],
)
def test_the_first_mismatch_is_named(tmp_path, changed, message):
    save(tmp_path / "kept.safetensors")
    like = PARAMS | changed
    with pytest.raises(ValueError, match=message):
        load_consolidation(tmp_path / "kept.safetensors", like=Consolidation(like, like))


def test_double_precision_is_not_lost_in_silence(tmp_path):
    kept = Consolidation(np.ones(2), np.ones(2))
    save(tmp_path / "kept.safetensors", kept)
    with pytest.raises(ValueError, match="anchor has dtype float64: set jax_enable_x64"):
        load_consolidation(tmp_path / "kept.safetensors", like=kept)
    with jax.enable_x64(True):
        assert load_consolidation(tmp_path / "kept.safetensors", like=kept).anchor.dtype == np.float64


def test_every_flipped_byte_of_a_consolidation_is_found(tmp_path):
    file = tmp_path / "kept.safetensors"
    save(file)
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:  # padding in the header may say anything
            chex.assert_trees_all_equal(load_consolidation(file, like=KEPT), KEPT)
        except ValueError as error:
            assert "damaged" in str(error)
        else:
            assert whole[position : position + 1] in b" "
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            load_consolidation(file, like=KEPT)


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
