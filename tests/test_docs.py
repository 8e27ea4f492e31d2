"""Pages: their paths and names exist, the templates work, the picture is that of the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging_checks import ROOT

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/*/*.md", "theory/*.md")
    for path in ROOT.glob(pattern)
)
# A word inside backquotes is a path if it starts in one of these.
FOLDERS = "sketchattn|tests|theory|docs|examples|\\.ci|\\.\\."


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def paths(text: str) -> list[str]:
    """Return the targets of links and the paths in backquotes, outside of blocks of code."""
    text = FENCE.sub("", text)
    linked = re.findall(r"\]\(([^)#\s]+)", text)
    quoted = [
        path
        for code in re.findall(r"`([^`]+)`", text)
        for path in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*<>-]*", code)
    ]
    return [
        path.removesuffix("/") for path in linked + quoted if "<" not in path and ":" not in path
    ]


def missing_paths(text: str, folder: Path) -> list[str]:
    """Return the paths of a page that lie neither beside it nor in the root of the repository."""
    return [
        path
        for path in paths(text)
        if not any(list(base.glob(path)) or (base / path).exists()
                   for base in (folder, ROOT))
    ]  # fmt: skip


def stands_for_something(name: str) -> bool:
    """Whether a dotted name can be followed, with submodules imported on the way."""
    parts = name.split(".")
    found: Any = import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        dotted = ".".join(parts[:i])
        if hasattr(found, part):
            found = getattr(found, part)
        elif isinstance(found, ModuleType) and hasattr(found, "__path__") and find_spec(dotted):
            found = import_module(dotted)
        else:
            return False
    return True


def missing_names(text: str) -> list[str]:
    """Return the dotted names that start with ``sketchattn.`` and stand for nothing."""
    names = sorted(set(re.findall(r"(?<![\w./-])sketchattn(?:\.[A-Za-z_]\w*)+", text)))
    return [name for name in names if not stands_for_something(name)]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_name_in_a_page_exists(page: str) -> None:
    text = read(page)
    assert missing_paths(text, (ROOT / page).parent) == []
    assert missing_names(text) == []


def test_the_pages_have_paths_and_names() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"} <= set(PAGES)
    assert sum(len(paths(read(page))) for page in PAGES) > 50
    assert len(re.findall(r"sketchattn\.\w+", "".join(map(read, PAGES)))) > 20


def test_a_path_or_a_name_that_is_gone_is_reported() -> None:
    text = "[x](gone.md), `python sketchattn/gone.py`, `theory/gone_*.py`, `docs/<x>.md`, `./run x`"
    assert missing_paths(text, ROOT) == ["gone.md", "sketchattn/gone.py", "theory/gone_*.py"]
    text = "[x](low-rank.md#top), `sketchattn/zoo/base.py`, `theory/verify_*.py`, `tests/`"
    assert missing_paths(text, ROOT / "docs") == []
    assert missing_paths(text, ROOT / "theory") == ["low-rank.md"]
    text = (
        "`sketchattn.gone` sketchattn.zoo.base.Gone. sketchattn.theory.check(x) sketchattn.heads."
    )
    assert missing_names(text) == ["sketchattn.gone", "sketchattn.zoo.base.Gone"]


# --- the templates of CONTRIBUTING.md -------------------------------------------------------------

TEMPLATES = """
import doctest, sys, types
import numpy as np
import sketchattn as sa
from sketchattn import theory

sa.methods(), sa.sketches.sketches(), theory.claims()
for path, source in {blocks}:
    name = path.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    tried = doctest.testmod(module)
    assert tried.failed == 0, tried
    assert tried.attempted or "claims" in path

x = np.random.default_rng(0).standard_normal((3, 2, 12, 4))
exact = sa.attention(*x, "exact")
assert np.abs(sa.attention(*x, "strided", rank=12) - exact).max() < 1e-13
assert np.abs(sa.attention(*x, "strided", rank=3) - exact).max() > 1e-2
causal = sa.AttentionProblem(*x[:, 0], causal=True, key_mask=np.arange(12) > 2)
sums = sa.methods()["strided"](rank=3).approximate(causal).row_sums()
assert np.allclose(sums, [0, 0, 0] + [1] * 9)

# Entries of S^T S - I are means of independent numbers of variance at most 6 + 1.
draws = [sa.sketches.make_sketch("laplace", 8, 5, seed) for seed in range(400)]
mean = np.mean([s.T @ s.to_dense() for s in draws], axis=0)
assert np.abs(mean - np.eye(5)).max() < 6 * (7 / (8 * 400)) ** 0.5 < 0.3
again = type(draws[0]).from_arrays(draws[0].arrays, (8, 5))
assert np.array_equal(again.to_dense(), draws[0].to_dense())

record = theory.claims()["softmax.largest_weight"]
for name, verdict in record.recorded.items():
    if name != "heads":
        assert theory.check(record.id, name).status == verdict, name
for head in sa.load_heads("minilm")[:2]:
    assert theory.check(record.id, head).status == record.recorded["heads"]
"""


def test_the_templates_work(tmp_path: Path) -> None:
    blocks = [
        (source.splitlines()[0].removeprefix("# "), source)
        for language, source in FENCE.findall(read("CONTRIBUTING.md"))
        if language == "python"
    ]
    rooms = [Path(path).parent.as_posix() for path, _ in blocks]
    assert rooms == ["sketchattn/zoo", "sketchattn/sketches", "sketchattn/theory/softmax"]
    assert not any((ROOT / path).exists() for path, _ in blocks)
    done = subprocess.run(
        [sys.executable, "-c", TEMPLATES.replace("{blocks}", repr(blocks))],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- the picture of the layers --------------------------------------------------------------------


def drawing() -> ModuleType:
    spec = spec_from_file_location("draw_layers", ROOT / "docs" / "draw_layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_the_layers_of_the_contract() -> None:
    layers = drawing().layers(read("pyproject.toml"))
    rooms = [room for layer in layers for room in layer]
    assert rooms[0] == "cli"
    assert rooms[-1] == "kernels"
    assert {"zoo", "errors", "theory", "studies", "bench"} < set(rooms)
    assert [layer for layer in layers if "heads" in layer] == [["heads", "sampling"]]
    # Text stays text in the picture, in the order in which it is drawn.
    shown = re.findall(r"<text[^>]*>([^<]+)</text>", read("docs/layers.svg"))
    assert [text for text in shown if text in rooms] == rooms
    page = read("docs/architecture.md")
    assert all(f"`{room}`" in page for room in rooms)
