"""Sphinx's settings: the pages of ``docs/``, the book in ``theory/``, and the API from docstrings.

Built from the root of the repository by ``./run docs``, so that the links between the two folders
are the same here and where the files are read as they are.
"""

import sketchattn

project = "sketchattn"
author = "The sketchattn developers"
release = version = sketchattn.__version__

root_doc = "docs/index"
include_patterns = ["docs/*.md", "theory/*.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".venv*", "build"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]

myst_heading_anchors = 3
# Described without being installed.
autodoc_mock_imports = ["jax", "onnx", "torch", "transformers"]
numpydoc_show_class_members = False  # autodoc shows them
html_theme = "alabaster"
