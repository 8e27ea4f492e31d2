"""The notebooks: their cells run without Jupyter and say what is stored, in numbers to 2 %."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging_checks import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])-?\d+\.?\d*(?:e[+-]?\d+)?")
# Numbers of six digits after a rounding of float32, in sums in another order.
TOLERANCE = 0.02

# Run in a process of its own: cells register claims and set rcParams.
RUNNER = """
import contextlib, io, json, sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

names, said = {"__name__": "__main__"}, []
for source in json.load(sys.stdin):
    text, figures = io.StringIO(), len(plt.get_fignums())
    with contextlib.redirect_stdout(text):
        exec(compile(source, "cell", "exec"), names)
    said.append([text.getvalue(), len(plt.get_fignums()) - figures])
json.dump(said, sys.stdout)
"""


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    made = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in made["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def stored(cell: dict[str, Any]) -> tuple[str, int]:
    """Return the text that a cell printed, and how many pictures it shows."""
    text = [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"]
    pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
    return "".join(x if isinstance(x, str) else "".join(x) for x in text), len(pictures)


def differs(found: str, expected: str) -> str:
    """Return where two texts differ, or nothing: blanks do not count, numbers have a tolerance."""
    a, b = (" ".join(NUMBER.sub("#", text).split()) for text in (found, expected))
    if a != b:
        return f"{a!r} is not {b!r}"
    pairs = zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True)
    return "; ".join(
        f"{x} is not {y}"
        for x, y in pairs
        if not math.isclose(float(x), float(y), rel_tol=TOLERANCE, abs_tol=0.011)
    )


def test_there_are_two() -> None:
    assert [path.name for path in NOTEBOOKS] == ["check_a_theorem.ipynb", "study_your_model.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_is_stored(path: Path, tmp_path: Path) -> None:
    code = cells(path, "code")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps([source(cell) for cell in code]),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for cell, (text, figures) in zip(code, found, strict=True):
        expected, pictures = stored(cell)
        assert differs(text, expected) == "", source(cell)
        assert figures == pictures
    assert sum(figures for _, figures in found) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean(path: Path) -> None:
    assert path.stat().st_size < 300_000
    text = path.read_text(encoding="utf-8")
    made = json.loads(text)
    assert set(made["metadata"]) == {"kernelspec", "language_info"}
    assert made["metadata"]["kernelspec"]["name"] == "python3"
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert cell["metadata"] == {}
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"
    shown = "".join(stored(cell)[0] for cell in code)
    # No paths of a machine, no addresses, no times.
    assert not re.search(r"(?<![\w.])/\w+/|0x[0-9a-f]{6}|\d (?:ms|us|s)\b", shown)
    for cell in code:
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                picture = "".join(output["data"]["image/png"])
                assert base64.b64decode(picture).startswith(b"\x89PNG")


def test_other_text_and_other_numbers_are_noticed() -> None:
    assert differs("error 0.5 at r=16\n", "error  0.501 at r=16") == ""
    assert differs("error 0.5", "error 0.6") == "0.5 is not 0.6"
    assert differs("violated 1", "holds 1") != ""
    assert differs("1 2", "1") != ""
    assert differs("-66 keys", "66 keys") == "-66 is not 66"


def test_the_runner_keeps_what_a_cell_says() -> None:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        done = subprocess.run(
            [sys.executable, "-c", RUNNER],
            input=json.dumps(
                ["x = 3", "print(x)", "import matplotlib.pyplot as p; f = p.figure()"]
            ),
            capture_output=True,
            text=True,
            check=True,
        )
    assert json.loads(done.stdout) == [["", 0], ["3\n", 0], ["", 1]]
    assert text.getvalue() == ""
