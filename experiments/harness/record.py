"""What a run is made with: settings, data and versions of the code; a resumed run is compared with it."""

import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import lifelong_jax

RECORD = "record.json"
PLACES = ("output_dir", "data_dir", "resume", "mesh", "compilation_cache")
"""The settings that do not change the numbers, or only in their last digits."""

_KINDS = {"experiment": str, "settings": dict, "data": list, "versions": dict}


def make_record(experiment: str, config: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
    """Describes what a run is begun with.

    Args:
      experiment: the script's name.
      config: the settings, as `config.json` has them.
      data: the data sets that the run learns, trees of arrays; empty if it makes its data.

    Returns:
      The script's name, a digest of each setting, a digest of each data set, and the versions of packages and code.

    Example:
      >>> make_record("permuted", {"num_tasks": 5}, [np.zeros(3)])["experiment"]
      'permuted'
    """
    return {
        "experiment": experiment,
        "settings": digests_of_settings(config),
        "data": list(map(_digest_of_arrays, data)),
        "versions": _versions(),
    }


def digests_of_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Computes a digest of each setting that can change the numbers.

    Args:
      config: the settings, as `config.json` has them.

    Returns:
      The digests by the settings' names.
    """
    written = {name: json.dumps(value, sort_keys=True) for name, value in config.items() if name not in PLACES}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in written.items()}


def read_record(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads a run's record.

    Args:
      folder: the run's.

    Returns:
      What `make_record` made; None if the run was begun before there were records.

    Raises:
      ValueError: if it is damaged.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in _KINDS.items()):
        raise ValueError(f"{file} is damaged: it is not a record")
    return record


def check_unedited(folder: pathlib.Path, recorded: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Compares the settings in a run's `config.json` with those that it was begun with.

    Args:
      folder: the run's, for the message.
      recorded: from `read_record`.
      config: the settings, as `config.json` has them.

    Raises:
      ValueError: if a setting differs; the message names it.
    """
    before, now = recorded["settings"], digests_of_settings(config)
    edited = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if edited:
        raise ValueError(
            f"{folder / 'config.json'} was edited after the run began: {', '.join(edited)}. Put back what was there, "
            f"or start another run, without --resume"
        )


def check_unchanged(folder: pathlib.Path, recorded: Mapping[str, Any], data: Sequence[Any]) -> None:
    """Compares the data and the versions with those that a run was begun with. Of other versions, a warning says so.

    Args:
      folder: the run's, for the messages.
      recorded: from `read_record`.
      data: as for `make_record`.

    Raises:
      ValueError: if the data differ.
    """
    before, now = recorded["data"], list(map(_digest_of_arrays, data))
    if before != now:
        changed = [str(number + 1) for number, digest in enumerate(now) if before[number : number + 1] != [digest]]
        raise ValueError(
            f"{folder} was begun with other data: data set {', '.join(changed)} of {len(now)} has changed. Put back "
            f"what was there, or start another run, without --resume"
        )
    before, now = recorded["versions"], _versions()
    others = [f"{name} {before.get(name)}, now {now.get(name)}" for name in now if before.get(name) != now[name]]
    if others:
        text = f"{folder} was begun with {'; '.join(others)}: what is learned from here on may differ"
        warnings.warn(text, stacklevel=2)


def _digest_of_arrays(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        if np.issubdtype(leaf.dtype, np.floating):  # devices differ in the last bit of a byte divided by 255
            leaf = np.rint(1e4 * leaf).astype(np.int32)
        digest.update(repr(leaf.shape).encode())
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str | None]:
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"lifelong_jax": lifelong_jax.__version__, **packages, "git revision": _revision()}


def _revision() -> str | None:
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # without git, or in a repository of another user
        return None
