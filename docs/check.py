"""Look at the built site as a reader does: links, names, and pages in a browser.

    python docs/check.py [FOLDER]

Fails where a link inside the site leads nowhere, a public name or a claim has no place, a page of
`PAGES` logs an error, loads anything from elsewhere, or is wider than its window.  The browser is
the Chromium of the system; without one its part is left out, and fails where CI=true.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
# A page of every kind.
PAGES = (
    "docs/index.html",
    "docs/start.html",
    "docs/methods.html",
    "docs/methods/nearfar.html",
    "docs/methods/linformer.html",
    "docs/claims/linformer.html",
    "docs/generated/sketchattn.AttentionProblem.html",
    "theory/linformer.html",
    "search.html",
)
# Desktop and phone.
WINDOWS = ((1280, 800), (390, 844))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(HTMLParser):
    """Collect the links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take what leads somewhere, and what can be led to."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif (name == "id" or (name == "name" and tag == "a")) and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Return the links inside the site whose file or anchor is missing."""
    pages = {
        path: Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts  # templates of the theme
    }
    found = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            where = path.relative_to(site)
            if not target.exists():
                found.append(f"{where}: {link} leads to no file")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors
            ):
                found.append(f"{where}: {link} leads to no place")
    return found


def missing_names(site: Path) -> list[str]:
    """Return the public names, methods and claims that the site does not describe."""
    from building.claims import anchor
    from building.names import public_names
    from sphinx.util.inventory import InventoryFile

    import sketchattn as sa

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.loads(file.read(), uri="")
    known = {name for kind in inventory.data.values() for name in kind}
    wanted = sorted(set(public_names().values()))
    wanted += [f"docs/methods/{name}" for name in sa.methods()]
    wanted += [anchor(name) for name in sa.theory.claims()]
    return [f"{name} is described nowhere" for name in wanted if name not in known]


def find_browser() -> str | None:
    """Return the path of a Chromium, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def in_browser(site: Path, browser: str, pages: tuple[str, ...] = PAGES) -> Iterator[str]:
    """Open pages wide and narrow, light and dark, and yield what is wrong."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            for width, height in WINDOWS:
                context = chromium.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme="light" if width > 1000 else "dark",
                )
                for name in pages:
                    yield from opened(context.new_page(), site / name, f"{name} at {width} px")
                context.close()
        finally:
            chromium.close()


def opened(page: Any, path: Path, where: str) -> Iterator[str]:
    """Open one page and yield what is wrong with it."""
    said: list[str] = []
    page.on("console", lambda x: said.append(x.text) if x.type == "error" else None)
    page.on("pageerror", lambda x: said.append(str(x)))
    page.on("request", lambda x: said.append(f"loads {x.url}") if foreign(x.url) else None)
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_timeout(200)
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    if wide > 1:
        yield f"{where}: {wide} px wider than the window"
    if not page.locator("h1").first.is_visible():
        yield f"{where}: no heading is seen"
    broken = page.evaluate(
        "[...document.images].filter(x => x.complete && !x.naturalWidth).map(x => x.src)"
    )
    yield from (f"{where}: {x} is no picture" for x in broken)
    yield from (f"{where}: {x}" for x in said)
    page.close()


def foreign(url: str) -> bool:
    """Whether a page asks the network."""
    return not url.startswith(("file:", "data:", "blob:", "about:"))


def main(arguments: list[str] | None = None) -> int:
    """Check a site and say what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", nargs="?", type=Path, default=ROOT / "build" / "docs")
    site = parser.parse_args(arguments).site.resolve()
    if not (site / "docs" / "index.html").exists():
        parser.error(f"site must be a folder with docs/index.html, got {site}; run ./run docs")
    wrong = [*dead_links(site), *missing_names(site)]
    browser = find_browser()
    if browser is not None:
        wrong += in_browser(site, browser)
    elif os.environ.get("CI") == "true":
        wrong.append("no Chromium is installed, and CI=true")
    else:
        print("no Chromium is installed: pages were not opened")
    for line in wrong:
        print(line)
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages: {len(wrong) or 'nothing'} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
