"""The settings of the documentation: `python -m sphinx -W docs docs/_build`."""

import pathlib
import sys

import lifelong_jax

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_extensions"))

project = "lifelong_jax"
author = "The lifelong_jax maintainers"
copyright = f"2026, {author}"
version = release = lifelong_jax.__version__

extensions = [
    "docstrings",
    "myst_nb",
    "notebooks",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are stored with their outputs

autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "lifelong_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"use_download_button": False, "home_page_in_toc": True, "navbar_persistent": []}
