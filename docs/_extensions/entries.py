"""Which names have an entry on the API pages."""

import functools
import pathlib
import re

API = pathlib.Path(__file__).parent.parent / "api"


@functools.cache
def documented_names() -> tuple[str, ...]:
    """Lists the full names that have an entry on the API pages."""
    names = []
    for page in sorted(API.glob("*.md")):
        module = ""
        for directive, argument in re.findall(r"^\.\. ([\w:]+):: (\S+)$", page.read_text(), re.MULTILINE):
            if directive in ("automodule", "py:currentmodule"):
                module = argument
            elif directive in ("autofunction", "autoclass", "autodata"):
                names.append(f"{module}.{argument}")
    return tuple(names)


def find_entry(name: str) -> str | None:
    """Finds the full name of what is documented under a name, or under the last parts of it."""
    return next((full for full in documented_names() if full == name or full.endswith(f".{name}")), None)
