import logging
from importlib.metadata import version as _installed_version

project = "sb3_flipout"
author = "the sb3_flipout developers"
copyright = f"2026, {author}"
release = _installed_version("sb3_flipout")
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
]
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
