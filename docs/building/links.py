"""Words in code that are names: public ones lead to the API, claims and methods to their pages."""

from __future__ import annotations

from functools import cache
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import sketchattn as sa

from .claims import anchor

# What `sa.` and nothing stand for, in the order in which names are looked up.
ROOMS = ("sketchattn", "sketchattn.theory", "sketchattn.testing", "sketchattn.sketches")


@cache
def public_names() -> dict[str, str]:
    """Return what a word in code may be, with the full name that the API documents it by."""
    found: dict[str, str] = {}
    rooms = (*ROOMS, "sketchattn.sampling", "sketchattn.partitions")
    for room in rooms:
        module: Any = sa
        for part in room.split(".")[1:]:
            module = getattr(module, part)
        for name in dir(module):
            value = getattr(module, name, None)
            if name.startswith("_") or not callable(value):
                continue
            full = f"{room}.{name}"
            found.setdefault(full, full)
            found.setdefault(full.replace("sketchattn", "sa", 1), full)
            # Alone a class or a function of two words or more; "check" and "bound" are words.
            if room in ROOMS and (name[0].isupper() or "_" in name):
                found.setdefault(name, full)
    return found


class Names(SphinxTransform):
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
