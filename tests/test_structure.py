"""How the code is laid out: small files and functions, and imports in one direction."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES_OF_A_FUNCTION, MAX_LINES_OF_A_FILE, MAX_LINES_OF_THE_LIBRARY = 60, 450, 11_900
WITH_EXTRAS = {"datasets", "streaming", "models", "checkpoint", "_safetensors", "plotting", "geometry", "_extras"}
FORBIDDEN = {"experiments", "rich", "tyro", "fcntl", "SystemExit"}

# What each module, or package, of the library may import of the library; those that are not named may import all.
BASE = {"types", "platforms", "_meshes", "_processes", "_layouts", "forms", "compression", "_jaxprs"}
BASE |= {"_checks", "_numerics"}
LOOP = BASE | {
    "consolidation",
    "training",
    "scenarios",
    "recipes",
    "objectives",
    "evaluation",
    "methods",
    "_sequences",
    "_task_checks",
    "_early_stopping",
    "_epochs",
    "_split_batches",
}
MAY_IMPORT = {
    "types": set(),
    "_files": {"_paths"},
    "_tables": set(),
    "_layouts": set(),
    "_jaxprs": set(),
    "_nearest_product": set(),
    "compression": {"_numerics"},
    "forms": {"types", "_layouts", "_nearest_product", "compression"},
    "_processes": set(),
    "_safetensors": set(),
    "_blocks": {"forms", "_layouts"},
    "_paths": {"forms"},
    "_checks": {"types", "forms", "compression", "_processes"},
    "_numerics": {"types", "platforms"},
    "platforms": set(),
    "_meshes": set(),
    "importance": BASE | {"_tables"},
    "consolidation": BASE,
    "merging": BASE,
    "growth": BASE | {"_blocks", "_paths", "consolidation"},
    "penalty": BASE,
    "_batch_axis": {"_jaxprs"},
    "_split_batches": {"types", "_meshes"},
    "_process_rows": {"types"},
    "training": BASE | {"_batch_axis", "_split_batches"},
    "tasks": BASE | {"_split_batches"},
    "metrics": set(),
    "scenarios": BASE | {"tasks"},
    "objectives": BASE | {"scenarios"},
    "losses": BASE | {"objectives", "scenarios"},
    "recipes": BASE | {"objectives", "losses", "tasks"},
    "evaluation": BASE | {"_split_batches", "tasks", "scenarios", "objectives", "losses"},
    "methods": BASE | {"importance", "consolidation", "training", "objectives"},
    "_sequences": BASE | {"training", "methods", "recipes"},
    "_task_checks": BASE | {"_batch_axis", "objectives", "losses", "methods", "recipes"},
    "_early_stopping": BASE | {"training", "evaluation", "recipes"},
    "_epochs": LOOP,
    "continual": LOOP,
    "sweep": LOOP,
}

FILES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("lifelong_jax", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
LIBRARY = [name for name in FILES if name.startswith("lifelong_jax/")]


def part_of(name):
    """The module, or package, of a file of the library: "importance" for lifelong_jax/importance/plan.py."""
    return name.removesuffix(".py").split("/")[1]


def imported(tree):
    """The modules that a file imports, with their attributes, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lines_of(function):
    """How many lines a function has, without its docstring."""
    num_lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    return num_lines - (first.end_lineno - first.lineno + 1) * (ast.get_docstring(function) is not None)


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    functions = [node for node in ast.walk(ast.parse(FILES[name])) if isinstance(node, ast.FunctionDef)]
    too_long = {node.name: lines_of(node) for node in functions if lines_of(node) > MAX_LINES_OF_A_FUNCTION}
    assert not too_long


def test_files_are_short():
    num_lines = {name: len(FILES[name].splitlines()) for name in LIBRARY}
    assert not {name: lines for name, lines in num_lines.items() if lines > MAX_LINES_OF_A_FILE}
    assert sum(num_lines[name] for name in LIBRARY if part_of(name) not in WITH_EXTRAS) <= MAX_LINES_OF_THE_LIBRARY


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_uses_nothing_of_the_scripts(name):
    tree = ast.parse(FILES[name])
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    modules = {part for module in imported(tree) for part in module.split(".")}
    assert not FORBIDDEN & (names | attributes | modules)


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_go_in_one_direction(name):
    part = part_of(name)
    ours = {module.split(".")[1] for module in imported(ast.parse(FILES[name])) if module.startswith("lifelong_jax.")}
    assert ours - {part} <= MAY_IMPORT.get(part, ours)
