"""Plain paths: one name for a leaf in every kind of tree that a network's parameters come in."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr

from lifelong_jax.forms import is_form

BOX_ATTRIBUTES = ("value", "raw_value")
"""What nodes that hold one array only, such as variables of flax nnx and boxes of linen, call it."""

_MAX_LISTED = 3


def leaves_by_path(name: str, tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree, and its Kronecker factors, by their plain paths: "Dense_0/kernel".

    A plain path joins the keys, indices and attributes. A node that holds one array only adds nothing to it.

    Raises:
      ValueError: naming both, if two leaves have one plain path.
    """
    leaves: dict[str, Any] = {}
    full_paths: dict[str, str] = {}
    for full_path, plain_path, leaf in _walk(tree):
        path, full = keystr(plain_path, simple=True, separator="/"), name + keystr(full_path)
        if path in leaves:
            raise ValueError(f"{full_paths[path]} and {full} have the same path, {join(name, path)}: rename one.")
        leaves[path], full_paths[path] = leaf, full
    return leaves


def join(name: str, path: str) -> str:
    """Joins the name of a tree and the plain path of a leaf, which is empty if the leaf is the whole tree."""
    return f"{name}/{path}" if path else name


def listed(names: Sequence[str]) -> str:
    """Lists the first few names, and says how many more there are."""
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _walk(node: Any, full: tuple = (), plain: tuple = ()) -> Iterator[tuple[tuple, tuple, Any]]:
    """Yields the full path, the plain path and the value of each leaf, in the order of `jax.tree.leaves`."""
    children = jax.tree.leaves_with_path(node, is_leaf=lambda child: child is not node)
    if is_form(node) or (len(children) == 1 and children[0][1] is node):
        yield full, plain, node
        return
    for path, child in children:
        is_box = len(children) == 1 and isinstance(path[-1], GetAttrKey) and path[-1].name in BOX_ATTRIBUTES
        yield from _walk(child, full + path, plain if is_box else plain + path)
