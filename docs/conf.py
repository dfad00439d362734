import logging
import re
from importlib.metadata import version as _installed_version
from typing import Any

project = "sb3_flipout"
author = "the sb3_flipout developers"
copyright = f"2026, {author}"
release = _installed_version("sb3_flipout")
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx-mathjax-offline",  # formulas render without network
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
]
autosummary_generate = True
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"{project} {release}"

# A section of the index may still be empty. `suppress_warnings = ["toc.empty_glob"]` does not reach this warning.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(lambda record: "toctree glob" not in record.getMessage())


def _as_page(_app: Any, _path: Any, _parent: str, source: list[str]) -> None:
    """README, CONTRIBUTING and CHANGELOG are pages here: their links to docs/ stay among pages, others to files go."""
    text = source[0].replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](architecture.md)")
    source[0] = re.sub(r"\[([^\]]+)\]\((?:examples|zoo_configs)\)", r"\1", text)


def setup(app: Any) -> None:
    app.connect("include-read", _as_page)
