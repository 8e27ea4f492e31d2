"""What Sphinx calls: pages that are filled in when they are read, pictures, formulas, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import sketchattn as sa

from . import claims, links, mathml, measure, methods, pictures

DOCS = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- site: ([\w -]+?) -->$", re.MULTILINE)


class Pages:
    """Fill in pages from the measured data, which is read once."""

    def __init__(self) -> None:
        self.study, self.times, self.verdicts = map(measure.read, ("study", "times", "claims"))

    def read(self, app: Sphinx, docname: str, source: list[str]) -> None:
        """Fill in a page as Sphinx reads it."""
        folder, _, name = docname.rpartition("/")
        if folder == "docs/methods" and name in sa.methods():
            source[0] = methods.page(name, source[0], self.study, self.times, self.verdicts)
        source[0] = MARK.sub(lambda found: self.part(found[1]), source[0])

    def part(self, name: str) -> str:
        """Return what stands at a mark ``<!-- site: name -->``."""
        what, _, about = name.partition(" ")
        if what == "methods":
            return methods.index(self.study, self.times)
        if what == "claims":
            return claims.topic_page(about, self.verdicts)
        if what == "summary":
            return claims.summary(self.verdicts)
        if what == "instances":
            return claims.instances()
        if what == "refuted":
            return claims.refuted(self.verdicts)
        if what == "toctree":
            names = sorted(path.stem for path in (DOCS / about).glob("*.md"))
            listed = "\n".join(f"{about}/{name}" for name in names)
            return f"```{{toctree}}\n:maxdepth: 1\n:hidden:\n{listed}\n```"
        raise ValueError(f"a mark of a page must be known, got {name!r}")

    def draw(self, app: Sphinx) -> None:
        """Draw the picture of every method, before pages that show it are read."""
        folder = DOCS / "pictures" / "methods"
        folder.mkdir(parents=True, exist_ok=True)
        for name in methods.pictured(self.study):
            made = pictures.method(name, self.study)
            path = folder / f"{name}.svg"
            if made is not None and not (path.exists() and path.read_bytes() == made):
                path.write_bytes(made)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect everything."""
    pages = Pages()
    app.connect("builder-inited", pages.draw)
    app.connect("source-read", pages.read)
    mathml.setup(app)
    links.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
