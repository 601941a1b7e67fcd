"""What is written is read back to the bit; what is damaged is found and named; what cannot be written harms nothing."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import lifelong_jax
from lifelong_jax import Consolidation, checkpoint, init_consolidation
from lifelong_jax.checkpoint import (
    load_consolidation,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
    save_consolidation,
)

PARAMS = {
    "layers": [{"w": jnp.arange(6.0).reshape(2, 3), "frozen": None}, {"w": jnp.ones(())}],
    "narrow": jnp.array([1.0, -2.5], jnp.bfloat16),
}
KEPT = Consolidation(PARAMS, jax.tree.map(jnp.abs, PARAMS))
STATE = {
    "params": PARAMS,
    "opt_state": optax.sgd(0.1, momentum=0.9).init(PARAMS),
    "key": jax.random.key(3),
    "matrix": np.array([[0.1, np.nan], [np.inf, -0.0]]),
    "task": 2,
    "seconds": 0.1,
}


def save(file, consolidation=KEPT):
    save_consolidation(file, consolidation, estimator="exact Fisher diagonal", num_examples=60)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save_checkpoint(folder, step, STATE | {"task": step})
    return folder


@pytest.fixture
def copied(checkpoints, tmp_path):
    return shutil.copytree(checkpoints, tmp_path / "copy")


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
        (Consolidation(*[jnp.ones(2, jnp.float8_e4m3fn)] * 2), "anchor has dtype float8_e4m3fn, but only bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            save(file, kept)
    with pytest.raises(TypeError, match="anchor has dtype int32"):
        save(file, Consolidation(jnp.arange(2), jnp.ones(2)))
    with pytest.raises(TypeError, match="estimator must be a text"):
        save_consolidation(file, KEPT, estimator=3, num_examples=60)
    with pytest.raises(ValueError, match="num_examples must be an integer of at least 1"):
        save_consolidation(file, KEPT, estimator="MAS", num_examples=0)
    assert file.read_bytes() == before
    safetensors.numpy.save_file({"anchor": np.ones(2)}, file)
    with pytest.raises(ValueError, match="is no consolidation that save_consolidation wrote"):
        load_consolidation(file, like=KEPT)


def test_a_state_comes_back_to_the_bit(checkpoints):
    step, state = restore_checkpoint(checkpoints, like=jax.tree.map(lambda leaf: leaf, STATE))
    assert step == state["task"] == 2
    assert jax.tree.structure(state) == jax.tree.structure(STATE)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(STATE), strict=True):
        assert type(ours) is type(theirs), path
        if isinstance(ours, jax.Array) and jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = map(jax.random.key_data, (ours, theirs))
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype, path


def test_old_checkpoints_are_removed(copied):
    def steps():
        return sorted(int(path.name) for path in copied.iterdir())

    (copied / ".00000003.writing").mkdir()  # what a killed process left
    assert restore_checkpoint(copied, like=STATE)[0] == 2
    save_checkpoint(copied, 3, STATE)
    assert steps() == [2, 3]
    save_checkpoint(copied, 3, STATE)
    save_checkpoint(copied, 2, STATE, keep=1)
    assert steps() == [2]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "add"])
def test_the_previous_checkpoint_stands_in_for_a_damaged_one(copied, harm):
    files = [path for path in sorted((copied / "00000002").rglob("*")) if path.is_file()]
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        name = file.relative_to(copied / "00000002").as_posix()
        if harm == "flip":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif harm == "remove":
            file.unlink()
        else:
            file = file.with_name("more")
            file.write_bytes(b"")
            name = file.relative_to(copied / "00000002").as_posix()
        with pytest.warns(UserWarning, match=rf"checkpoint .*00000002 is not used: .*{name.replace('.', '[.]')} is"):
            step, state = restore_checkpoint(copied, like=STATE)
        assert step == state["task"] == 1
        file.unlink(missing_ok=True)
        if harm != "add":
            file.write_bytes(content)
    assert restore_checkpoint(copied, like=STATE)[0] == 2


def test_where_all_are_damaged_there_is_none(copied):
    for file in copied.glob("*/manifest.json"):
        file.unlink()
    with pytest.warns(UserWarning, match="manifest.json is missing") as warned:
        assert restore_checkpoint(copied, like=STATE) is None
    assert len(warned) == 2


def test_a_state_of_another_form_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"state\['params'\]\['narrow'\] has shape \[2\] in .*00000002, but \[3\]"):
        restore_checkpoint(checkpoints, like=STATE | {"params": PARAMS | {"narrow": jnp.zeros(3, jnp.bfloat16)}})
    with pytest.raises(ValueError, match=r"like has no leaf state\['task'\]"):
        restore_checkpoint(checkpoints, like={key: value for key, value in STATE.items() if key != "task"})
    with pytest.raises(ValueError, match="step must be an integer of at least 0, not -1"):
        save_checkpoint(checkpoints, -1, STATE)


def test_nothing_is_unpickled(tmp_path, checkpoints, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    save(tmp_path / "kept.safetensors")
    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load_consolidation(tmp_path / "kept.safetensors", like=KEPT)
    assert restore_checkpoint(checkpoints, like=STATE) is not None


@contextlib.contextmanager
def a_full_disk(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def a_read_only_folder(folder, monkeypatch):
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [(a_full_disk, "(No space left on device|File too large)"), (a_read_only_folder, "Permission denied")],
)
def test_what_was_there_is_kept_where_nothing_can_be_written(copied, monkeypatch, obstacle, reason):
    save(copied / "kept.safetensors")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with obstacle(copied, monkeypatch):
        with pytest.raises(OSError, match=rf"cannot be written \({reason}\); what was there before is kept"):
            save(copied / "kept.safetensors", Consolidation(jnp.ones(300), jnp.ones(300)))
        with pytest.raises(OSError, match=rf"cannot be written \({reason}\); what was there before is kept"):
            save_checkpoint(copied, 3, STATE)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_write_that_orbax_fails_at_harms_nothing(copied, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing [os_error_code='28']")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(copied, 3, STATE)
    assert sorted(path.name for path in copied.iterdir()) == ["00000001", "00000002"]


def test_a_manifest_lists_every_file(checkpoints):
    manifest = json.loads((checkpoints / "00000002" / "manifest.json").read_text())
    files = {
        path.relative_to(checkpoints / "00000002").as_posix()
        for path in (checkpoints / "00000002").rglob("*")
        if path.is_file()
    }
    assert {*manifest["sha256"], "manifest.json"} == files
    assert all(len(digest) == 64 for digest in manifest["sha256"].values())
