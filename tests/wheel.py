"""Runs the README's first program with an installed wheel: `python tests/wheel.py README.md`.

Afterwards it imports every module of the library: each must either be there with the base requirements alone, or name
the extra that it needs.
"""

import importlib
import pathlib
import pkgutil
import re
import sys

import lifelong_jax

program = re.search(r"```python\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), re.DOTALL)[1]
exec(compile(program, sys.argv[1], "exec"), {})

for module in pkgutil.walk_packages(lifelong_jax.__path__, "lifelong_jax.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
        print(f"{module.name}: imported")
    except ImportError as error:
        assert "pip install" in str(error) and "lifelong-jax[" in str(error), error
        print(f"{module.name}: {error}")
