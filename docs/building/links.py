"""Words in code that are names: public ones lead to the API, claims and methods to their pages."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import sketchattn as sa

from .claims import anchor
from .names import public_names


class Names(SphinxTransform):  # type: ignore[misc,unused-ignore]  # typed where Sphinx is there
    """Make references of code that is a name, outside of headings and of other references."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Look at every word in code of a page."""
        names, claims, methods = public_names(), sa.theory.claims(), sa.methods()
        here = self.env.docname
        for node in list(self.document.findall(nodes.literal)):
            if inside(node):
                continue
            text = node.astext()
            if text in claims:
                target = {"refdomain": "std", "reftype": "ref", "reftarget": anchor(text)}
            elif text.removesuffix("()").split("(")[0] in names:
                full = names[text.removesuffix("()").split("(")[0]]
                target = {"refdomain": "py", "reftype": "obj", "reftarget": full}
            elif text in methods and not here.endswith(f"/{text}"):
                target = {
                    "refdomain": "std",
                    "reftype": "doc",
                    "reftarget": f"/docs/methods/{text}",
                }
            else:
                continue
            reference = pending_xref("", refdoc=here, refexplicit=True, refwarn=False, **target)
            node.replace_self(reference)
            reference += node


def inside(node: nodes.Node) -> bool:
    """Whether a node stands in a heading or in a reference."""
    parent = node.parent
    while parent is not None:
        if isinstance(parent, nodes.title | nodes.reference | pending_xref | nodes.term):
            return True
        parent = parent.parent
    return False


def setup(app: Sphinx) -> None:
    """Register the transform."""
    app.add_transform(Names)
