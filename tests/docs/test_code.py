"""The code in the README and on the pages of the site runs as it stands, and prints what is shown below it."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts
}
PROGRAMS = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d*|-?\d+|nan")


def numbers_and_rest(text):
    """What is printed, in numbers and in words: an array's spaces depend on its numbers."""
    words = re.sub(r"\s+", " ", NUMBER.sub("#", text)).replace(" ]", "]").replace("[ ", "[").strip()
    return [float(number) for number in NUMBER.findall(text)], words


@pytest.mark.usefixtures("standard_promotion", "free_afterwards")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for program, shown in PROGRAMS.findall(PAGES[page]):
        exec(compile(program, page, "exec"), names)
        numbers, words = numbers_and_rest(capsys.readouterr().out)
        shown_numbers, shown_words = numbers_and_rest(shown)
        assert words == shown_words
        np.testing.assert_allclose(numbers, shown_numbers, atol=0.1)  # of accuracies; compilers differ in rounding
    results = [names[name] for name in ("params", "consolidation") if name in names]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    if "step" in names:
        assert names["step"]._cache_size() == 1  # one compilation serves all tasks


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 180
    assert len(README.split()) <= 1200


def test_links_of_the_readme():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
