"""Checkpoints are read back to the bit; damaged ones are found and named; a failed write changes nothing."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from experiments.harness.checkpoints import restore_checkpoint, save_checkpoint
from tests.obstacles import OBSTACLES

PARAMS = {
    "layers": [{"w": np.arange(6, dtype=np.float32).reshape(2, 3), "frozen": None}, {"w": np.float32(1)}],
    "narrow": np.array([1.0, -2.5], jnp.bfloat16),
}
PARAMS = jax.device_put(PARAMS)
STATE = {
    "params": PARAMS,
    "opt_state": optax.sgd(0.1, momentum=0.9).init(PARAMS),
    "key": jax.random.key(3),
    "matrix": np.array([[0.1, np.nan], [np.inf, -0.0]]),
    "task": 2,
    "seconds": 0.1,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save_checkpoint(folder, step, STATE | {"task": step})
    return folder


@pytest.fixture
def copied(checkpoints, tmp_path):
    return shutil.copytree(checkpoints, tmp_path / "copy")


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

    (copied / ".00000003.4194304.writing").mkdir()  # left by a killed process
    assert restore_checkpoint(copied, like=STATE)[0] == 2
    save_checkpoint(copied, 3, STATE)
    assert steps() == [2, 3]
    save_checkpoint(copied, 3, STATE)
    save_checkpoint(copied, 2, STATE)
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


WRONG_MANIFESTS = ["", "[]", "{}", "3", '{"sha256": 3, "leaves": {}}', '{"sha256": {}, "leaves": {"state": 3}}']


@pytest.mark.parametrize("content", [*WRONG_MANIFESTS, '{"sha256": {}}', '{"sha256": {}, "leaves": ["state"]}'])
def test_the_previous_checkpoint_stands_in_for_one_with_a_wrong_manifest(copied, content):
    (copied / "00000002" / "manifest.json").write_text(content)
    with pytest.warns(UserWarning, match=r"00000002 is not used: manifest\.json is damaged"):
        step, _ = restore_checkpoint(copied, like=STATE)
    assert step == 1


def test_a_state_of_another_form_is_refused(checkpoints):
    with pytest.raises(ValueError, match=r"state\['params'\]\['narrow'\] has shape \[2\] in .*00000002, but \[3\]"):
        restore_checkpoint(checkpoints, like=STATE | {"params": PARAMS | {"narrow": jnp.zeros(3, jnp.bfloat16)}})
    with pytest.raises(ValueError, match=r"like has no leaf state\['task'\]"):
        restore_checkpoint(checkpoints, like={key: value for key, value in STATE.items() if key != "task"})
    with pytest.raises(ValueError, match="step must be an integer of at least 0, not -1"):
        save_checkpoint(checkpoints, -1, STATE)


def test_nothing_is_unpickled(checkpoints, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert restore_checkpoint(checkpoints, like=STATE) is not None


@pytest.mark.parametrize(("obstacle", "reason"), OBSTACLES)
def test_old_checkpoints_are_kept_if_a_new_one_cannot_be_written(copied, monkeypatch, obstacle, reason):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with (
        obstacle(copied, monkeypatch),
        pytest.raises(OSError, match=rf"cannot be written \({reason}\); what was there before is kept"),
    ):
        save_checkpoint(copied, 3, STATE)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_write_that_orbax_fails_at_harms_nothing(copied, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
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
