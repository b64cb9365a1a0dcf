"""Sphinx configuration: `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

import re
import sys
import zlib
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import draw_house  # noqa: E402 - it lies beside this file

project = "torchload"
author = "the torchload authors"
copyright = "2026, the torchload authors"  # noqa: A001 - Sphinx wants this name
release = version = installed_version("torchload")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = "torchload"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"

# What is copied is what one types: no prompts, and no output after them.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

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
smartquotes = False  # an error's message is to be found as it was printed

# ----------------------------------------------------------------------------------------------------- links to torch

# A build must not need a network, so torch's own inventory isn't fetched: these are the names that our pages use.
TORCH = {
    "torch.Tensor": ("class", "tensors.html"),
    "torch.device": ("class", "tensor_attributes.html"),
    "torch.dtype": ("class", "tensor_attributes.html"),
    "torch.load": ("function", "generated/torch.load.html"),
    "torch.save": ("function", "generated/torch.save.html"),
    "torch.nn.Module": ("class", "generated/torch.nn.Module.html"),
    "torch.nn.Module.load_state_dict": ("method", "generated/torch.nn.Module.html"),
    "torch.optim.Optimizer": ("class", "optim.html"),
}
INVENTORY = HERE / "_build" / "torch.inv"


def write_inventory() -> None:
    """The names above, in the form in which Sphinx reads the names of other projects."""
    lines = [f"{name} py:{kind} 1 {page}#{name} -" for name, (kind, page) in TORCH.items()]
    # As our annotations spell it.
    lines += [line.removeprefix("torch.") for line in lines if line.startswith("torch.nn.Module ")]
    head = "# Sphinx inventory version 2\n# Project: PyTorch\n# Version: \n# The rest is compressed with zlib.\n"
    INVENTORY.parent.mkdir(exist_ok=True)
    INVENTORY.write_bytes(head.encode() + zlib.compress("\n".join([*lines, ""]).encode()))


write_inventory()
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", str(INVENTORY))}

# ------------------------------------------------------------------------------------------------------------ drawings


def within_page(drawing: str) -> str:
    """An SVG file as part of a page: its style holds for it alone, and its dark colours follow the theme's switch."""
    style = re.search(r"<style>(.*?)</style>", drawing, re.DOTALL)
    if style is None:
        return drawing
    light, _, dark = style[1].partition("@media (prefers-color-scheme: dark) {")

    def scoped(rules: str, scope: str) -> str:
        return " ".join(f"{scope} {rule}" for rule in re.findall(r"[^{}]+\{[^{}]*\}", rules))

    dark = dark.rsplit("}", 1)[0]
    css = [
        scoped(light, ".drawing"),
        scoped(dark, 'body[data-theme="dark"] .drawing'),
        f"@media (prefers-color-scheme: dark) {{ {scoped(dark, 'body:not([data-theme=light]) .drawing')} }}",
    ]
    return drawing.replace(style[0], f"<style>{' '.join(' '.join(css).split())}</style>")


def put_drawings_into_pages(app: Sphinx, page: nodes.document, docname: str) -> None:
    if app.builder.format != "html":
        return
    for image in list(page.findall(nodes.image)):
        if image["uri"].endswith(".svg"):
            drawing = within_page((Path(app.srcdir) / image["uri"]).read_text(encoding="utf-8"))
            image.parent.replace(image, nodes.raw("", f'<div class="drawing">{drawing}</div>', format="html"))


# -------------------------------------------------------------------------------------------------------- descriptions


def describe(app: Sphinx, pagename: str, template: str, context: dict[str, Any], page: nodes.document | None) -> None:
    """What a search engine shows of a page: its first paragraph."""
    paragraph = next(iter(page.findall(nodes.paragraph)), None) if page is not None else None
    if paragraph is not None:
        text = " ".join(paragraph.astext().split()).replace('"', "&quot;").replace("<", "&lt;")
        text = text if len(text) <= 160 else text[:160].rpartition(" ")[0] + " …"
        context["metatags"] = context.get("metatags", "") + f'\n<meta name="description" content="{text}">'


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", lambda _: draw_house.DRAWING.write_text(draw_house.draw(), encoding="utf-8"))
    app.connect("doctree-resolved", put_drawings_into_pages)
    app.connect("html-page-context", describe)
