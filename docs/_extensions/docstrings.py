"""A Sphinx extension: reads the library's docstrings and signatures, and links names in code to their entries."""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from entries import find_entry
from sphinx import addnodes
from sphinx.application import Sphinx

SECTIONS = ("Args:", "Attributes:", "Example:", "Raises:", "Returns:", "Yields:")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the functions below."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("doctree-read", _link_names)
    return {"parallel_read_safe": True}


def to_restructured_text(docstring: str) -> str:
    """Writes a docstring as reStructuredText, except for the sections, which napoleon reads.

    Outside of the sections, a block that is indented by four spaces is a formula: it becomes a literal block. What is
    in backticks is code, and bars are those of absolute values.
    """
    parts = []
    for kind, lines in itertools.groupby(_kinds_of_lines(docstring.split("\n")), key=lambda pair: pair[0]):
        text = "\n".join(line for _, line in lines)
        if kind == "text":
            text = re.sub(r"`([^`]+)`(?=(\w?))|\|", _write_markup, text)
        parts.append(f"::\n\n{text}" if kind == "formula" else text)
    return "\n".join(parts)


def _write_markup(found: re.Match) -> str:
    """Writes code, which a letter must not follow, or a bar."""
    if found[0] == "|":
        return r"\|"
    return f"``{found[1]}``" + (r"\ " if found[2] else "")


def _kinds_of_lines(lines: list[str]) -> Iterator[tuple[str, str]]:
    section, kind = "", "text"
    for previous, line in zip(["", *lines], lines, strict=False):
        if line[:1].strip():
            section = line if line in SECTIONS else ""
            kind = "example" if section == "Example:" else "text"
        elif not section and not previous and line.startswith("    "):
            kind = "formula"
        yield kind, ":returns:" if line == "Returns:" else line  # napoleon would take what is before a colon for a type


class _FullNames(ast.NodeTransformer):
    """Writes the types that have an entry by their full names."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        full_name = find_entry(node.id) if node.id[0].isupper() else None
        return ast.parse(full_name, mode="eval").body if full_name else node


def signature_in_source(obj: Any) -> tuple[str, str] | None:
    """Reads a signature and what it returns from the source, where types still have their short names."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body
    node = _FullNames().visit(node)
    if isinstance(node, ast.FunctionDef):
        return f"({ast.unparse(node.args)})", ast.unparse(node.returns)
    fields = [ast.unparse(field) for field in node.body if isinstance(field, ast.AnnAssign)]
    return f"({', '.join(fields)})", ""


def _process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_restructured_text("\n".join(lines)).split("\n")
    if what == "data":  # napoleon would take what is before a colon in the first line for a type
        lines[:0] = ["..", ""]


def _process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, return_annotation: str
) -> tuple[str, str] | None:
    return signature_in_source(obj) if what in ("function", "class") else None


def _link_names(app: Sphinx, doctree: nodes.document) -> None:
    for literal in list(doctree.findall(nodes.literal)):
        name = re.fullmatch(r"([\w.]+)(\(.*\))?", literal.astext())
        entry = find_entry(name[1]) if name else None
        if entry and not isinstance(literal.parent, nodes.title | nodes.reference | addnodes.pending_xref):
            attributes = {"refdomain": "py", "reftype": "obj", "reftarget": entry, "refexplicit": True}
            link = addnodes.pending_xref("", refdoc=app.env.docname, refwarn=True, **attributes)
            literal.replace_self(link)
            link += literal
