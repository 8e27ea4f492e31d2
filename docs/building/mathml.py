"""Formulas as MathML: browsers draw them, so that a page needs no script from anywhere."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

NAME = "mathml"
log = logging.getLogger(__name__)


def formula(text: str, block: bool) -> str:
    """Return MathML of a formula in LaTeX."""
    made = "".join(line.strip() for line in tex2mathml(text, as_block=block).splitlines())
    # Browsers set this sign high above a letter, and stretch bars around what is below them.
    made = made.replace("<mi>\u22a4</mi>", '<mi mathvariant="normal">T</mi>')
    return made.replace("<mo>\u2016</mo>", '<mo stretchy="false">\u2016</mo>')


def visit(translator: Any, node: nodes.Element) -> None:
    """Write a formula in a line, or on lines of its own."""
    block = isinstance(node, nodes.math_block)
    try:
        made = formula(node.astext(), block)
    except MathError as wrong:
        log.warning("%s cannot be set: %s", node.astext(), wrong, location=node)
        made = f"<code>{translator.encode(node.astext())}</code>"
    translator.body.append(f'<div class="formula">{made}</div>\n' if block else made)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer that ``html_math_renderer`` names."""
    app.add_html_math_renderer(NAME, (visit, None), (visit, None))
