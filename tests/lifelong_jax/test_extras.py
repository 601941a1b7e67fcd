"""The library without its extras: what can be imported, and what says which extra is missing."""

import ast
import configparser
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lifelong_jax
from lifelong_jax._extras import needs_extra

PACKAGE = pathlib.Path(lifelong_jax.__file__).parent
SETUP = configparser.ConfigParser()
SETUP.read(PACKAGE.parent / "setup.cfg")
EXTRAS = dict(SETUP["options.extras_require"])
DISTRIBUTIONS = importlib.metadata.packages_distributions()  # of each top-level module
FILES = sorted(PACKAGE.rglob("*.py"))
NEED_EXTRAS = {
    "checkpoint": "checkpoint",
    "datasets": "data",
    "models": "models",
    "plotting": "plotting",
    "streaming": "data",
}

# Imports each module while all distributions but the base requirements seem to be missing.
CHILD = """
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked, modules = json.load(sys.stdin)
sys.meta_path.insert(0, Blocker())
errors = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        errors[module] = str(error)
print(json.dumps(errors))
"""


def module_name(file):
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def distributions(requirements, closure):
    """The names of the required distributions, without extras; a closure includes what these require in turn."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        if closure:
            waiting += map(Requirement, importlib.metadata.requires(name) or ())
    return found


def test_modules_import_without_extras_or_name_the_missing_one():
    base = distributions(SETUP["options"]["install_requires"].split("\n")[1:], closure=True)
    blocked = [
        module
        for module, names in DISTRIBUTIONS.items()
        if not base & set(map(canonicalize_name, names)) and module != "lifelong_jax"
    ]
    assert {"matplotlib", "flax", "rich", "tqdm"} <= set(blocked)
    assert not {"jax", "numpy", "optax"} & set(blocked)
    modules = [module_name(file) for file in FILES]
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([blocked, modules]), capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    errors = json.loads(child.stdout)
    for module in modules:
        extra = NEED_EXTRAS.get((module + ".").split(".")[1])
        if extra is None:
            assert module not in errors
        else:
            assert re.fullmatch(rf"no module named '[\w.]+': pip install \"lifelong-jax\[{extra}\]\"", errors[module])


def imports_with_extras(file):
    """The name of each module that the file imports in a `with needs_extra(extra)` block, and the extra's name."""
    for block in ast.walk(ast.parse(file.read_text())):
        for statement in block.body if isinstance(block, ast.With) else ():
            if isinstance(statement, ast.Import | ast.ImportFrom):
                (extra,) = block.items[0].context_expr.args
                names = [alias.name for alias in statement.names]
                for name in [statement.module] if isinstance(statement, ast.ImportFrom) else names:
                    yield name, extra.value


def test_an_extra_lists_what_is_imported_for_it():
    imports = {pair for file in FILES for pair in imports_with_extras(file)}
    assert ("tensorflow_datasets", "data") in imports  # inside of a function
    assert {extra for _, extra in imports} == set(NEED_EXTRAS.values())
    for name, extra in imports:
        listed = distributions(EXTRAS[extra].split("\n")[1:], closure=False)
        assert listed & set(map(canonicalize_name, DISTRIBUTIONS[name.partition(".")[0]])), name


def test_other_errors_pass_through():
    with pytest.raises(ImportError, match="cannot import name 'nothing'"), needs_extra("data"):
        from lifelong_jax.types import nothing  # noqa: F401
