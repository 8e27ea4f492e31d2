"""Measure again what the pages show, and draw their pictures.

    python docs/refresh.py                                   # everything: an hour
    python docs/refresh.py study times readme --heads FILE   # some of it

``study`` (minutes) and ``times`` are the numbers of the pages of methods, ``speed`` exact attention
beside PyTorch's, and ``claims`` (a quarter of an hour) the verdicts; ``readme`` writes tables and
picture of the README from these.  ``layers`` draws the rooms, ``notebooks`` and ``examples`` run
those of ``examples/`` again, and ``theory`` the scripts of the chapters.

``times`` takes a file of real heads, such as ``sketchattn capture`` writes; without one a made head
stands in, which is easier than real ones.  Times want a quiet machine.  The page of the frontier is
made by the command that stands on it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from building import measure, notebooks, readme

ROOT = Path(__file__).resolve().parents[1]
# What the page of an example adds to its command.
OPTIONS = {
    "encoder": (
        "--methods",
        "vmean,topk,uniform,skeinformer,nystromformer,linformer,wildcat,nearfar",
        "--seeds",
        "1",
    )
}


def script(*arguments: str) -> None:
    """Run a script of the repository from its root."""
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


def examples() -> None:
    """Run the examples that have a page, and keep their pictures.  Numbers on pages are edited."""
    for picture in sorted((ROOT / "docs" / "pictures").iterdir()):
        example = f"examples/{picture.stem}.py"
        if (ROOT / example).exists():
            out = str(ROOT / "build" / "examples" / picture.stem)
            options = OPTIONS.get(picture.stem, ())
            script(example, *options, "--out", out, "--picture", str(picture))


def chapters() -> None:
    """Write the tables and figures of the chapters."""
    for path in sorted((ROOT / "theory").glob("verify_*.py")):
        script(str(path.relative_to(ROOT)))


STEPS: dict[str, Callable[[str | None], object]] = {
    "study": lambda heads: measure.study(),
    "times": measure.times,
    "speed": lambda heads: measure.speed(),
    "claims": lambda heads: measure.claims(),
    "readme": lambda heads: readme.write(),
    "layers": lambda heads: script("docs/draw_layers.py"),
    "notebooks": lambda heads: notebooks.run(),
    "examples": lambda heads: examples(),
    "theory": lambda heads: chapters(),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the steps that are asked for, in their order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; by default all")
    parser.add_argument("--heads", help="a file of long heads for the times")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.steps if name not in STEPS]
    if unknown:
        parser.error(f"steps must be among {', '.join(STEPS)}, got {', '.join(unknown)}")
    for name, step in STEPS.items():
        if name in (given.steps or STEPS):
            print(f"{name} ...", flush=True)
            step(given.heads)


if __name__ == "__main__":
    main()
