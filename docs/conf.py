"""Sphinx configuration: `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "torchload"
author = "the torchload developers"
copyright = "2026, the torchload developers"  # noqa: A001 - Sphinx wants this name
release = version = installed_version("torchload")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = "torchload"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Docstrings are written to be read in an editor too, where `name` in single backquotes is code.
default_role = "code"
nitpicky = False
