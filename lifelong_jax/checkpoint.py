"""Consolidations in safetensors files: written atomically, verified when they are read, never pickled."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from lifelong_jax import __version__, _checks, _files
from lifelong_jax._extras import needs_extra
from lifelong_jax._layouts import Layout
from lifelong_jax._paths import join, leaves_by_path
from lifelong_jax._processes import (
    copy_arrays,
    is_first,
    is_of_all_processes,
    span_processes,
    text_of_first,
    to_host,
    together,
)
from lifelong_jax._safetensors import DTYPES, StoredTensor, make_header, read_tensors
from lifelong_jax.compression import CompressedDiagonal
from lifelong_jax.forms import KroneckerFactors, is_form
from lifelong_jax.types import Consolidation, Params

with needs_extra("checkpoint"):
    import safetensors

_FORMAT = "lifelong_jax consolidation 2"
_COMPRESSED_FORMAT = "lifelong_jax consolidation 3"  # which has codes, or no anchor
_FIRST_FORMAT = "lifelong_jax consolidation 1"  # with the names of `jax.tree_util.keystr`
_PENALTY = "strength / 2 * sum(importance * (params - anchor) ** 2), beside a loss that is a mean over examples"
_FLOATING = ("bfloat16", "float16", "float32", "float64")  # the floating-point dtypes of both safetensors and NumPy

_CODES = "scale * 2 ** ((codes - 255) / 8), and 0 where codes is 0; scale * codes where codes is bfloat16"

_FACTORS = ("row_basis", "row_values", "column_basis", "column_values")


def save_consolidation(
    file: str | os.PathLike,
    consolidation: Consolidation,
    *,
    estimator: str,
    num_examples: int,
    anchor: Literal["arrays", "digest"] = "arrays",
    sync: bool = True,
) -> None:
    """Writes a consolidation to a safetensors file, so that another program can continue from it.

    A leaf is named by the keys, indices and attributes that lead to it: `anchor/Dense_0/kernel`. So one network's file
    is the same whether its parameters are nested dicts, a flax State or an equinox module. The metadata (see
    `read_metadata`) hold the estimator of the importance, the number of examples, the formula of the penalty, the
    library's version, and a SHA-256 digest of the tensors and the other metadata. Of Kronecker factors, they also hold
    how the entries of each leaf make matrices; of compressed importances, what the codes stand for.

    If the anchor is a checkpoint that is kept in any case, such as a pretrained model's, its digest is enough: with one
    byte for each entry of the importance, the file of a model of 7 billion parameters then has 6.3 GiB, not 50.

    Leaves are written one by one. If arrays span several processes, all processes call it, in a folder that they share:
    each one writes what its own devices hold.

    Args:
      file: path of the file. An old file there is replaced only when the new one is complete.
      consolidation: from `consolidate`, or one task's `Consolidation(params, importance)`.
      estimator: a description of how the importance was computed: "exact Fisher diagonal, 5 tasks".
      num_examples: the number of examples over which the importance is a mean, in total over all tasks.
      anchor: "arrays", or "digest" for a SHA-256 digest of the anchor in their place. Then `load_consolidation` takes
        the anchor as `params`, and verifies it.
      sync: whether to wait until the file would survive a power failure: about 10 milliseconds.

    Raises:
      TypeError: if a leaf is not floating-point, or `estimator` is not a string.
      ValueError: if `anchor` is none of the above; if anchor and importance differ in structure or shapes; if an entry
        is NaN or infinite; if an entry of the importance is negative; if a dtype is not bfloat16, float16, float32 or
        float64; if two leaves have the same path; or if `num_examples` is not a positive integer.
      OSError: if the file cannot be written; an old file there is kept.
      RuntimeError: if another process could not write it.

    Example:
      >>> import tempfile
      >>> kept = Consolidation({"w": np.ones(3, np.float32)}, {"w": np.zeros(3, np.float32)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_consolidation(f"{folder}/kept.safetensors", kept, estimator="exact Fisher diagonal", num_examples=60)
      ...     load_consolidation(f"{folder}/kept.safetensors", like=kept).anchor
      {'w': Array([1., 1., 1.], dtype=float32)}
    """
    if not isinstance(estimator, str):
        raise TypeError(f"estimator must be a string, not {type(estimator).__name__}.")
    _checks.check_positive_integer("num_examples", num_examples)
    _checks.check_choice("anchor", anchor, ("arrays", "digest"))
    _checks.check_params("anchor", consolidation.anchor)
    _checks.check_params("importance", consolidation.importance)
    _checks.check_same_structure("importance", consolidation.importance, "anchor", consolidation.anchor)
    _checks.check_finite("anchor", consolidation.anchor)
    _checks.check_importance("importance", consolidation.importance)
    arrays, layouts, compressed = _named_arrays(consolidation)
    leaves = {name: array if hasattr(array, "dtype") else np.asarray(array) for name, array in arrays.items()}
    for name, leaf in leaves.items():
        if leaf.dtype.name not in DTYPES:
            raise ValueError(f"{name} has dtype {leaf.dtype}, but only these can be saved: {', '.join(_FLOATING)}.")
    metadata = {
        "format": _COMPRESSED_FORMAT if compressed or anchor == "digest" else _FORMAT,
        "estimator": estimator,
        "num_examples": str(num_examples),
        "penalty": _PENALTY,
        "library_version": __version__,
    }
    if layouts:
        metadata["layouts"] = json.dumps(layouts)
    if compressed:
        metadata |= {"compressed": json.dumps(compressed), "codes": _CODES}
    if anchor == "digest":
        anchors = {name: leaves.pop(name) for name in list(leaves) if _is_of_anchor(name)}
        metadata |= {"anchor": json.dumps(_files.describe_leaves(anchors)), "anchor_sha256": _digest(anchors, {})}
    write = _write_together if span_processes(leaves) else _write
    write(pathlib.Path(file), leaves, metadata, sync=sync)


def load_consolidation(
    file: str | os.PathLike, like: Consolidation | None = None, params: Params | None = None
) -> Consolidation:
    """Reads a consolidation that `save_consolidation` wrote.

    A network of which the file has a part, or more than there is, takes the whole file, without `like`. Then
    `growth.restrict_consolidation` and `growth.extend_consolidation` make it fit.

    Leaves are read one by one; of a sharded leaf, what this process has of it. If arrays of `like` or `params` span
    several processes, all of them call it. The mesh and the processes may be others than those that saved it.

    Args:
      file: path of the file.
      like: a consolidation with the expected structure, shapes and dtypes, such as `init_consolidation(params)`, or
        `init_consolidation(params, like=importance)` if the importance has Kronecker factors or is compressed. Its
        leaves may be `jax.ShapeDtypeStruct`, since their values are not used. The loaded arrays get their shardings,
        which must name devices.
        Its trees may be of another kind than those that were saved. None for all that the file has.
      params: the anchor, if the file has its digest alone: the checkpoint that was the anchor when the file was
        written. It may have other dtypes, if it has the same values in those of the anchor. Arrays of the anchor's
        dtypes are not copied, unless `like` places them elsewhere.

    Returns:
      A consolidation with the structure of `like`, or of nested dicts, in which indices are strings.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, if `save_consolidation` did not write it, if it does not fit `like` or
        `params` (the message names the first leaves that differ), if `params` has another digest than the anchor had,
        if `params` is missing or not needed, if `like` has the sharding of an abstract mesh, or if an entry is NaN,
        infinite, or, of the importance, negative.
      RuntimeError: if another process could not read it.

    Example:
      >>> load_consolidation("/nowhere.safetensors", like=Consolidation(np.zeros(3), np.zeros(3)))
      Traceback (most recent call last):
        ...
      FileNotFoundError: No such file or directory: /nowhere.safetensors
    """
    _check_devices(like)
    with _opened(file, several=span_processes((like, params))) as (tensors, metadata):
        arrays = tensors | _anchor_of(str(file), metadata, params)
        layouts = json.loads(metadata.get("layouts", "{}"))
        if like is not None:
            loaded = _fit(str(file), arrays, layouts, like, by_keystr=metadata["format"] == _FIRST_FORMAT)
        elif metadata["format"] != _FIRST_FORMAT:
            placed = {name: _place(name, array) for name, array in arrays.items()}
            loaded = _nest(str(file), placed, layouts, json.loads(metadata.get("compressed", "[]")))
        else:
            raise ValueError(f"{file} is of an earlier version: pass like, a tree of the kind that was saved.")
    _checks.check_finite("anchor", loaded.anchor, hint=f"So {file} was not written by save_consolidation.")
    _checks.check_importance("importance", loaded.importance)
    return loaded


def read_metadata(file: str | os.PathLike) -> dict[str, str]:
    """Reads the metadata of a saved consolidation.

    Args:
      file: path of a file that `save_consolidation` wrote.

    Returns:
      `estimator`, `num_examples`, `penalty` (the formula that λ scales), `library_version`, `format` and `sha256`, all
      as strings. A file without an anchor also has `anchor_sha256`, and the shapes and dtypes of the `anchor`. One of a
      compressed importance has `codes`: what they stand for.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, or if `save_consolidation` did not write it.

    Example:
      >>> import tempfile
      >>> kept = Consolidation(np.ones(3, np.float32), np.zeros(3, np.float32))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_consolidation(f"{folder}/kept.safetensors", kept, estimator="MAS", num_examples=60)
      ...     read_metadata(f"{folder}/kept.safetensors")["estimator"]
      'MAS'
    """
    with _opened(file) as (_, metadata):
        return metadata


def _write(file: pathlib.Path, leaves: Mapping[str, Any], metadata: Mapping[str, str], *, sync: bool) -> None:
    """Writes leaf by leaf: the digest, which is in the header, is known at the end."""
    description = _files.describe_leaves(leaves)
    digest = _new_digest(description, metadata)
    _, places = make_header(description, {**metadata, "sha256": digest.hexdigest()})
    with _files.writing(file, sync=sync) as opened:
        for name, values in _contents(leaves):
            digest.update(values)
            opened.seek(places[name])
            opened.write(values.data)
        opened.seek(0)
        opened.write(make_header(description, {**metadata, "sha256": digest.hexdigest()})[0])


def _write_together(file: pathlib.Path, leaves: Mapping[str, Any], metadata: Mapping[str, str], *, sync: bool) -> None:
    """Writes a file of arrays that span processes: each process writes what its own devices hold."""
    what, description = f"{file} is not written", _files.describe_leaves(leaves)
    header, places = make_header(description, {**metadata, "sha256": _new_digest(description, metadata).hexdigest()})
    unfinished = pathlib.Path(text_of_first(str(_files.unfinished_path(file.absolute()))))
    with together(what, True), _files.errors_of_writing(file):
        if is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with together(what, True), _files.errors_of_writing(file):
            if is_first():
                unfinished.write_bytes(header)
                os.truncate(unfinished, len(header) + sum(leaf.nbytes for leaf in leaves.values()))
        with together(what, True), _files.errors_of_writing(file):
            for name, leaf in leaves.items():
                _write_own_parts(unfinished, places[name], leaf)
        with together(what, True), _files.errors_of_writing(file):
            if is_first():
                with unfinished.open("r+b") as opened:
                    digest = _digest(read_tensors(opened), metadata)
                    opened.seek(0)
                    opened.write(make_header(description, {**metadata, "sha256": digest})[0])
                    if sync:
                        opened.flush()
                        os.fsync(opened.fileno())
                os.replace(unfinished, file)
                if sync:
                    _files.sync_folder(file.absolute().parent)
    finally:
        if is_first():
            _files.discard(unfinished)


def _write_own_parts(file: pathlib.Path, place: int, leaf: Any) -> None:
    """Writes the parts of a leaf that this process has, and of which no other process has a copy that comes first."""
    if leaf.size == 0:
        return
    mapped = np.memmap(file, leaf.dtype, "r+", place, np.shape(leaf))
    if is_of_all_processes(leaf):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                mapped[shard.index] = shard.data
    elif is_first():
        mapped[...] = leaf
    mapped.flush()


@contextlib.contextmanager
def _opened(
    file: str | os.PathLike, *, several: bool = False
) -> Iterator[tuple[dict[str, StoredTensor], dict[str, str]]]:
    """Opens a file, and verifies it: of several processes, the first one verifies all of the contents."""
    with contextlib.ExitStack() as stack:
        with together(f"{file} is not read", several):
            try:
                with safetensors.safe_open(file, framework="np") as checked:
                    metadata = checked.metadata() or {}
            except safetensors.SafetensorError as error:
                raise ValueError(f"{file} is damaged, or not a safetensors file: {error}.") from error
            if metadata.get("format") not in (_COMPRESSED_FORMAT, _FORMAT, _FIRST_FORMAT):
                raise ValueError(f"{file} was not written by save_consolidation, or is damaged.")
            try:
                tensors = read_tensors(stack.enter_context(pathlib.Path(file).open("rb")))
            except KeyError as error:
                raise ValueError(f"{file} is damaged: it has tensors of the dtype {error}.") from error
            if (is_first() or not several) and metadata.get("sha256") != _digest(tensors, metadata):
                raise ValueError(f"{file} is damaged: its contents do not match their SHA-256 digest.")
        yield tensors, metadata


def _anchor_of(file: str, metadata: Mapping[str, str], params: Params | None) -> dict[str, Any]:
    """Returns the arrays of the anchor by their names, if a file has their digest alone; else none."""
    if "anchor" not in metadata:
        if params is not None:
            raise ValueError(f"{file} has its anchor: leave out params.")
        return {}
    if params is None:
        raise ValueError(
            f"{file} has no anchor, but the SHA-256 digest of one, {metadata['anchor_sha256']}: pass params, the "
            f"checkpoint that was the anchor."
        )
    _checks.check_params("params", params)
    leaves = {join("anchor", path): leaf for path, leaf in leaves_by_path("params", params).items()}
    saved = json.loads(metadata["anchor"])
    dtypes = {name: dtype for name, (_, dtype) in saved.items()}
    shapes = {name: [list(np.shape(leaf)), dtypes.get(name)] for name, leaf in leaves.items()}
    _files.check_fits(file, saved, shapes, like="params")
    for name, dtype in dtypes.items():
        _check_precision(name, dtype)
    arrays = {name: _in_dtype(leaf, dtypes[name]) for name, leaf in leaves.items()}
    digest = _digest(arrays, {})
    if digest != metadata["anchor_sha256"]:
        raise ValueError(
            f"params is not the anchor of {file}: its SHA-256 digest is {digest}, and that of the anchor "
            f"{metadata['anchor_sha256']}. Pass the checkpoint that was the anchor when the file was written."
        )
    return arrays


def _in_dtype(leaf: Any, dtype: str) -> Any:
    """Returns an array of a dtype: the same array if it has the dtype."""
    return leaf if str(jnp.result_type(leaf)) == dtype else jnp.asarray(leaf, dtype)


def _is_of_anchor(name: str) -> bool:
    return name.split("/")[0] == "anchor"


def _digest(leaves: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    digest = _new_digest(_files.describe_leaves(leaves), metadata)
    for _, values in _contents(leaves):
        digest.update(values)
    return digest.hexdigest()


def _new_digest(description: Mapping[str, list], metadata: Mapping[str, str]) -> Any:
    others = {key: value for key, value in metadata.items() if key != "sha256"}
    return hashlib.sha256(json.dumps([others, description], sort_keys=True).encode())


def _contents(leaves: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the bytes of each leaf, by name. All processes must take all of them, if an array is of several."""
    for name in sorted(leaves):
        leaf = leaves[name]
        if isinstance(leaf, StoredTensor):
            values = leaf.mapped()
        else:  # of a copy, as an array that has been read holds what was read
            values = to_host(copy_arrays(leaf) if isinstance(leaf, jax.Array) else leaf)
        yield name, np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _named_arrays(
    consolidation: Consolidation, *, by_keystr: bool = False
) -> tuple[dict[str, Any], dict[str, list[list[int]]], list[str]]:
    """Returns the arrays by their names in a file, the layouts of Kronecker factors, and which forms are compressed."""
    arrays: dict[str, Any] = {}
    layouts, compressed = {}, []
    for side, tree in zip(Consolidation._fields, consolidation, strict=True):
        leaves = {join(side, path): leaf for path, leaf in leaves_by_path(side, tree).items()}
        if by_keystr:
            leaves = {side + keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_form)}
        for name, leaf in leaves.items():
            if isinstance(leaf, KroneckerFactors):
                layouts[name] = [list(part) for part in leaf.layout]
            if isinstance(leaf, CompressedDiagonal):
                compressed.append(name)
            for path, array in jax.tree.leaves_with_path(leaf):
                full_name = name + keystr(path) if by_keystr else join(name, keystr(path, simple=True))
                if full_name in arrays:
                    raise ValueError(f"two arrays would have the name {full_name} in the file: rename a leaf.")
                arrays[full_name] = array
    return arrays, layouts, compressed


def _fit(
    file: str, tensors: Mapping[str, Any], layouts: Mapping[str, list], like: Consolidation, *, by_keystr: bool
) -> Consolidation:
    """Makes a consolidation with the structure of `like` of what a file has."""
    wanted, expected, _ = _named_arrays(like, by_keystr=by_keystr)
    remedy = "Load the file without like, and make it fit by restrict_consolidation and extend_consolidation."
    if by_keystr:
        remedy = "The file is of an earlier version: pass a like of the kind of tree that was saved."
    _files.check_fits(file, _files.describe_leaves(tensors), _files.describe_leaves(wanted), remedy)
    for name, layout in expected.items():
        if layouts.get(name) != layout:
            raise ValueError(f"{name} has the layout {layouts.get(name)} in {file}, but {layout} in like.")
    leaves = [_place(name, tensors[name], getattr(leaf, "sharding", None)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _nest(file: str, arrays: dict[str, Any], layouts: Mapping[str, list], compressed: Sequence[str]) -> Consolidation:
    """Makes a consolidation of nested dicts of what a file has."""
    for name, layout in layouts.items():
        factors = {field: arrays.pop(join(name, field), None) for field in _FACTORS}
        arrays[name] = KroneckerFactors(**factors, layout=Layout(*map(tuple, layout)))
    for name in compressed:
        arrays[name] = CompressedDiagonal(*(arrays.pop(join(name, field)) for field in ("codes", "scale")))
    root: dict[str, Any] = {"anchor": {}, "importance": {}}
    for name in sorted(arrays):  # a leaf comes before those whose names go on from its own
        *parents, last = name.split("/")
        node = root
        for depth, key in enumerate(parents, start=1):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                leaf = "/".join(parents[:depth])
                raise ValueError(f"{file} has the leaves {leaf} and {name}, which no nested dicts have: pass like.")
        node[last] = arrays[name]
    return Consolidation(**root)


def _place(name: str, leaf: Any, sharding: Any = None) -> jax.Array:
    """Places a leaf; of a tensor in a file, it reads what this process has."""
    _check_precision(name, leaf.dtype)
    if not isinstance(leaf, StoredTensor):
        return jax.device_put(leaf, sharding)
    return (
        jnp.asarray(leaf.read()) if sharding is None else jax.make_array_from_callback(leaf.shape, sharding, leaf.read)
    )


def _check_devices(like: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(like):
        if isinstance(getattr(getattr(leaf, "sharding", None), "mesh", None), jax.sharding.AbstractMesh):
            raise ValueError(
                f"like{keystr(path)} is sharded over a mesh without devices: pass arrays, or "
                f"jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) with the sharding of a jax.sharding.Mesh."
            )


def _check_precision(name: str, dtype: Any) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name} has dtype {dtype}: set jax_enable_x64.")
