"""Measure again what the pages show, and draw their pictures.

    python docs/refresh.py                  # everything but the long ones: minutes
    python docs/refresh.py study times      # some of it

``study`` (a minute) and ``times`` (two minutes) are the numbers of the pages of methods, ``claims``
(ten minutes) the verdicts; ``readme`` writes tables and picture of the README from these, and
``layers`` the picture of the rooms.  ``examples`` runs every example in full, and ``frontier``
compares all methods by error against time; both take long and want a quiet machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from building import measure, readme  # noqa: E402


def script(*arguments: str) -> None:
    """Run a script of the repository from its root."""
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


STEPS: dict[str, Callable[[], object]] = {
    "study": measure.study,
    "times": measure.times,
    "claims": measure.claims,
    "readme": readme.write,
    "layers": lambda: script("docs/draw_layers.py"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run the steps that are asked for, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], help="by default all")
    asked = parser.parse_args(arguments).steps or list(STEPS)
    for name, step in STEPS.items():
        if name in asked:
            print(f"{name} ...", flush=True)
            step()


if __name__ == "__main__":
    main()
