"""A Sphinx extension: what myst-nb needs where the notebooks' folder is a symbolic link."""

import pathlib

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Connects the functions below."""
    app.connect("builder-inited", _write_pictures_into_the_build, priority=600)  # after myst-nb
    app.connect("doctree-read", _link_notebooks)
    return {"parallel_read_safe": True}


def _write_pictures_into_the_build(app: Sphinx) -> None:
    """Moves the folder of pictures, which myst-nb puts beside the build: for docs/_build, among the pages."""
    app.env.mystnb_config = app.env.mystnb_config.copy(output_folder=str(app.outdir / "jupyter_execute"))


def _link_notebooks(app: Sphinx, doctree: nodes.document) -> None:
    """Corrects links to notebooks, which the symbolic link makes lead out of the site."""
    folder = (app.srcdir / "notebooks").resolve()
    for link in doctree.findall(addnodes.pending_xref):
        target = pathlib.Path(link["reftarget"])
        if target.parent == folder:
            link["reftarget"] = f"notebooks/{target.stem}"
