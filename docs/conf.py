"""Sphinx configuration: MyST pages, furo, and the docstrings of the public API. `make docs` builds without warnings."""

from __future__ import annotations

import re

from orthoshard import __version__

project = "orthoshard"
author = "The orthoshard engineers"
copyright = "2026, the orthoshard engineers"
release = version = __version__

# The last brings MathJax along, so that no page asks another host for it.
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nitpicky = False

smartquotes = False  # options are quoted as they are typed
default_role = "code"  # docstrings write `name` for a name
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = f"orthoshard {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

ALIGNED = re.compile(r"\S {3,}\S|^ ", re.MULTILINE)


def keep_tables(app, what, name, obj, options, lines):
    """Show a paragraph that is laid out in columns as it stands: docstrings are plain text."""
    out: list[str] = []
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        if ALIGNED.search(paragraph) and not paragraph.startswith(":"):  # ":param lr:", which napoleon makes of Args
            out += ["::", "", *("    " + line for line in paragraph.split("\n")), ""]
        else:
            out += [*paragraph.split("\n"), ""]
    lines[:] = out


def setup(app):
    app.connect("autodoc-process-docstring", keep_tables)
