"""The table of methods and the lead picture of the README, from the measured data."""

from __future__ import annotations

import re
from pathlib import Path

import sketchattn as sa
from sketchattn.base.files import write_bytes, write_text

from . import measure, methods, pictures
from .tables import percent, short, table

ROOT = Path(__file__).resolve().parents[2]
PICTURE = "docs/pictures/study.svg"


def write() -> None:
    """Draw the picture and put tables into the README."""
    study, times = measure.read("study"), measure.read("times")
    (ROOT / PICTURE).parent.mkdir(exist_ok=True)
    write_bytes(ROOT / PICTURE, pictures.overview(study, times))
    path = ROOT / "README.md"
    write_text(path, filled(path.read_text(encoding="utf-8")))


def filled(text: str) -> str:
    """Return the README with the tables and the machine of the data."""
    study, times, speed = map(measure.read, ("study", "times", "speed"))
    for name, made in (
        ("methods", rows(study, times)),
        ("machine", machines(study, times)),
        ("speed", seconds(speed)),
    ):
        parts = re.split(f"(<!-- (?:end )?{name} -->)", text)
        if len(parts) != 5:
            raise ValueError(f"README.md must have one pair of marks <!-- {name} -->")
        parts[2] = f"\n{made}\n"
        text = "".join(parts)
    return text


def machines(study: measure.Data, times: measure.Data) -> str:
    """Return where the table of methods was measured."""
    return (
        f"Left: {study['seeds']} seeds, d = {study['d']}. Right: {methods.long_heads(times)}, "
        f"{times['rounds']} rounds in turn with exact attention. {methods.machine(times)}."
    )


def seconds(speed: measure.Data) -> str:
    """Return the table of exact attention beside PyTorch's."""
    lines = [
        [
            row["case"],
            f"{row['milliseconds']:g} ms",
            f"{short(row['all'])} [{short(row['spread'][0])}, {short(row['spread'][1])}]",
            short(row["one"]),
        ]
        for row in speed["rows"]
    ]
    threads = speed["machine"]["threads"]
    made = table(
        ["exact attention, float32 unless said", "time", "of PyTorch's [quartiles]", "one thread"],
        lines,
    )
    return (
        f"{made}\n\nPyTorch {speed['machine']['torch']} on the CPU, {threads} threads, in the same "
        f"rounds; `{speed['command']}`, {methods.machine(speed)}."
    )


def rows(study: measure.Data, times: measure.Data) -> str:
    """Return a line a method: what is promised, the cost, errors at one budget, and the time."""
    lines = []
    for name, cls in sa.methods().items():
        point = measure.at_budget(study, name)
        method = measure.made(cls)
        long = times["methods"].get(name, {})
        lines.append(
            [
                f"[{name}](docs/methods/{name}.md)",
                methods.promise(method),
                methods.statuses(method),
                percent(point["work"]) if point else "-",
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
            "claims",
            "keys read",
            f"error [worst head] at r = {study['rank']}, n = {n}",
            f"error, n = {made}",
            "time",
        ],
        lines,
    )
