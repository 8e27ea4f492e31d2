"""The page of what users bring: its blocks run one after the other, and none is long."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sketchattn as sa

PAGE = Path(__file__).parent.parent / "docs" / "your-own.md"
BLOCKS = re.findall(r"```(python|cpp)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_blocks_are_short() -> None:
    assert len(BLOCKS) == 9
    assert all(sum(map(bool, text.split("\n"))) <= 15 for _, text in BLOCKS)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), names)
    assert (tmp_path / "ours.pdf").stat().st_size > 0
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (source,) = [text for kind, text in BLOCKS if kind == "cpp"]
    (tmp_path / "read.cpp").write_text(source)
    subprocess.run([compiler, "-std=c++17", "read.cpp", "-o", "read"], check=True)
    said = subprocess.run(
        ["./read", "draw.safetensors"], check=True, capture_output=True, text=True
    )
    columns = sa.Draw.load("draw.safetensors")["columns"]
    assert [int(x) for x in said.stdout.split()] == columns.tolist()
    (tmp_path / "other.safetensors").write_bytes(b"no such thing")
    for name in (["missing.safetensors"], ["mine.safetensors"], ["other.safetensors"], []):
        said = subprocess.run(["./read", *name], capture_output=True, text=True)
        # A line and an exit code; a signal would be negative.
        assert (said.returncode, said.stdout) == (1, "")
        assert said.stderr.count("\n") == 1
