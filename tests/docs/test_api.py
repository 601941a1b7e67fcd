"""Every public name has an entry on the API pages of the site."""

import ast
import importlib
import itertools
import pathlib
import re
import runpy

import pytest

import lifelong_jax

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = [path for path in sorted((ROOT / "lifelong_jax").iterdir()) if path.stem[0] != "_"]
MODULES = [path.stem for path in FILES if path.suffix == ".py"]
PACKAGES = [path.stem for path in FILES if (path / "__init__.py").exists()]
ENTRIES = runpy.run_path(str(ROOT / "docs" / "_extensions" / "entries.py"))["documented_names"]()


def find(full_name):
    """The object of a full name."""
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_public(node):
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"


def is_documented(node, following):
    """Whether a type or a constant has a docstring below it."""
    return (
        isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    )


def public_names(module):
    """The full names of the functions, classes, types and constants that a module defines."""
    body = ast.parse((ROOT / "lifelong_jax" / f"{module}.py").read_text()).body
    names = [node.name for node in body if is_public(node)]
    for node, following in itertools.pairwise(body):
        if is_documented(node, following):
            names.append(node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id)
    return [f"lifelong_jax.{module}.{name}" for name in names if name[0] != "_"]


@pytest.mark.parametrize("module", MODULES)
def test_names_of_a_module(module):
    for name in public_names(module):
        assert name in ENTRIES or f"lifelong_jax.{name.rpartition('.')[2]}" in ENTRIES, name


@pytest.mark.parametrize("package", PACKAGES)
def test_names_of_a_package(package):
    for name in importlib.import_module(f"lifelong_jax.{package}").__all__:
        assert {f"lifelong_jax.{package}.{name}", f"lifelong_jax.{name}"} & set(ENTRIES), name


def test_names_at_the_top_level():
    modules = {"forms", "losses", "methods", "metrics", "objectives", "scenarios", "tasks"}
    assert {f"lifelong_jax.{name}" for name in set(lifelong_jax.__all__) - modules} <= set(ENTRIES)


def test_each_entry_is_there_once():
    assert len(set(ENTRIES)) == len(ENTRIES)
    for name in ENTRIES:
        assert find(name) is not None


def test_moved_names():
    text = (ROOT / "docs" / "deprecations.md").read_text()
    rows = re.findall(r"^\| (`.*`) \| .*`lifelong_jax\.([\w.]+)` \|$", text, re.MULTILINE)
    pairs = [(name, new) for names, new in rows for name in re.findall(r"`(\w+)`", names)]
    moved = {name: new if "." in new else f"{new}.{name}" for name, new in pairs}
    assert moved == lifelong_jax._NEW_NAMES
    for name, new in moved.items():
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(lifelong_jax, name) is find(f"lifelong_jax.{new}")
