"""Lists the scripts: `python -m experiments`."""

import ast
import pathlib


def scripts() -> dict[str, str]:
    """Returns the first line of each script's docstring, by the script's name. Nothing is imported."""
    lines = {}
    for file in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if file.stem[0] != "_" and any(
            isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body
        ):
            lines[file.stem] = ast.get_docstring(module).partition("\n")[0]
    return lines


if __name__ == "__main__":
    print("Usage: python -m experiments.NAME [--help]\n")
    for name, line in scripts().items():
        print(f"  {name:18}  {line}")
