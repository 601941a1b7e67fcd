"""The README's program runs as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_program_in_the_readme():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert not re.search(r"[A-Z]{4,}TEXT", README.read_text())
    names = {}
    exec(compile(program, str(README), "exec"), names)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((names["params"], names["consolidation"])))
    assert names["step"]._cache_size() == 1  # one compilation serves all tasks
