"""Sphinx's settings: the pages of ``docs/``, the book in ``theory/``, and the API from docstrings.

Built from the root of the repository by ``./run docs``, so that the links between the two folders
are the same here and where the files are read as they are.
"""

import sys
from pathlib import Path

import sketchattn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the extension stands beside this file

project = "sketchattn"
author = "The sketchattn developers"
copyright = "2026, the sketchattn developers"
release = version = sketchattn.__version__

root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/*/*.md", "docs/generated/*.rst", "theory/*.md", "C*.md"]
exclude_patterns = [".venv*", "build"]
templates_path = [str(HERE / "_templates")]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_design",
    "numpydoc",
    "building.extension",
]

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath", "colon_fence"]
html_math_renderer = "mathml"
# Described without being installed.
autodoc_mock_imports = ["jax", "onnx", "torch", "transformers"]
autodoc_typehints = "none"  # numpydoc's sections have them in words
numpydoc_show_class_members = False  # autodoc shows them
autosummary_generate = True
autosummary_imported_members = True

WIDE = [f"docs/{page}" for page in ("methods", "claims-table", "frontier", "compared-with")]
WIDE += [f"docs/claims/{path.stem}" for path in (HERE / "claims").glob("*.md")]

html_theme = "pydata_sphinx_theme"
html_title = f"sketchattn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 9,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    # Wide tables need the room.
    "secondary_sidebar_items": {
        "**": ["page-toc"],
        **dict.fromkeys(WIDE, []),
    },
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}
html_context = {"default_mode": "auto"}
# They lead to everything themselves, and have no pages below them.
html_sidebars: dict[str, list[str]] = {"docs/index": [], "docs/start": []}
