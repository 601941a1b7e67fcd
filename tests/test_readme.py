"""The README's programs run as they stand."""

import pathlib
import re

import jax
import jax.numpy as jnp

README = pathlib.Path(__file__).absolute().parent.parent / "README.md"


def test_the_programs_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not re.search(r"[A-Z]{4,}TEXT", README.read_text())
    first, *others = (run(program) for program in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    assert first["step"]._cache_size() == 1  # one compilation serves all tasks
    kept = [first["params"], first["consolidation"], *(names["kept"] for names in others)]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def run(program):
    names = {}
    exec(compile(program, str(README), "exec"), names)
    return names
