"""The table of methods and the lead picture of the README, from the measured data."""

from __future__ import annotations

import re
from pathlib import Path

import sketchattn as sa
from sketchattn.base.files import write_bytes, write_text

from . import measure, methods, pictures
from .tables import short, table

ROOT = Path(__file__).resolve().parents[2]
PICTURE = "docs/pictures/study.svg"
START, END = "<!-- methods -->", "<!-- end methods -->"


def write() -> None:
    """Draw the picture and put the table into the README."""
    study, times = measure.read("study"), measure.read("times")
    (ROOT / PICTURE).parent.mkdir(exist_ok=True)
    write_bytes(ROOT / PICTURE, pictures.overview(study, times))
    path = ROOT / "README.md"
    write_text(path, with_table(path.read_text(encoding="utf-8"), rows(study, times)))


def with_table(text: str, made: str) -> str:
    """Return the README with another table."""
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README.md must have one pair of marks {START} and {END}")
    return pattern.sub(lambda _: f"{START}\n{made}\n{END}", text)


def rows(study: measure.Data, times: measure.Data) -> str:
    """Return a line a method: what is promised, the cost, errors at one budget, and the time."""
    lines = []
    for name, cls in sa.methods().items():
        points = study["methods"].get(name) or study["references"].get(name) or []
        at = [p for p in points if p["rank"] <= study["rank"]]
        point = max(at, key=lambda p: float(p["rank"])) if at else None
        long = times["methods"].get(name, {})
        lines.append(
            [
                f"[{name}](docs/methods/{name}.md)",
                methods.promise(methods.example(cls)),
                f"{short(point['median'])} [{short(point['worst'])}]" if point else "-",
                f"{short(long['error'])} [{short(long['worst'])}]" if "one" in long else "-",
                short(long["one"]) if "one" in long else "-",
            ]
        )
    n, made = study["n"], times["heads"]["n"]
    return table(
        [
            "method",
            "promised of Ahat",
            f"error [worst head] at r = {study['rank']}, n = {n}",
            f"error, n = {made}",
            "time",
        ],
        lines,
    )
