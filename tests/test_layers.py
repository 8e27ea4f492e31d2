"""Which room may import which: the contract of pyproject.toml holds, and breaks where it should."""

from __future__ import annotations

import graphlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging_checks import PACKAGE, ROOT

CHECK = "from importlinter.cli import lint_imports_command as check; check()"


def contract(folder: Path, *only: str) -> subprocess.CompletedProcess[str]:
    """Check the package in ``folder`` against the contract, or the parts of it that are named."""
    options = [word for name in only for word in ("--contract", name)]
    return subprocess.run(
        [sys.executable, "-c", CHECK, "--no-cache", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_library_keeps_its_contract() -> None:
    done = contract(ROOT)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for path in PACKAGE.rglob("*.py"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "path", "planted", "reported"),
    [
        ("rooms", "kernels/softmax.py", "from ..operators import base", "kernels.softmax ->"),
        ("rooms", "base/files.py", "def f():\n    from ..problem import x", "base.files ->"),
        (
            "rooms",
            "errors/rows.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..zoo.base import M",
            "errors.rows ->",
        ),
        ("rooms", "heads/families.py", "from ..sampling.draws import x", "heads.families ->"),
        ("rooms", "bench/exact.py", "from ..studies.run import study", "bench.exact ->"),
        ("rooms", "attic/__init__.py", "", "attic"),
        ("rooms", "attic.py", "", "attic"),
        ("topics", "theory/engine/curves.py", "from ..dba.formulas import x", "engine.curves ->"),
        ("cycles", "zoo/base.py", "def f():\n    from .jl import JL", "sketchattn.zoo"),
        (
            "cycles",
            "operators/base.py",
            "from .softmax import SoftmaxAttention",
            "sketchattn.operators",
        ),
        (
            "cycles",
            "theory/sketching/moments.py",
            "from ..dba import formulas",
            "sketchattn.theory",
        ),
    ],
)
def test_a_planted_import_breaks_the_contract(
    copy: Path, name: str, path: str, planted: str, reported: str
) -> None:
    target = copy / "sketchattn" / path
    target.parent.mkdir(exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.write(f"\n\n{planted}\n")
    done = contract(copy, name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 kept, 1 broken" in done.stdout
    assert reported in done.stdout


def test_no_module_imports_itself_through_others() -> None:
    # Between a folder and its own files too, where the contract on siblings does not look.
    import grimp

    graph = grimp.build_graph("sketchattn", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(imports) > 100
    list(graphlib.TopologicalSorter(imports).static_order())
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
