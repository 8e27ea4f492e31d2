"""Compare all registered methods by error against time, and say where nearfar wins and loses.

    python examples/frontier.py
    python examples/frontier.py --heads /path/to/heads/*.safetensors --n 512,4096 --out frontier
    python examples/frontier.py --results frontier --page docs/frontier.md

Every method of `sketchattn.methods()`, its presets and what `BESIDE` adds, at ranks that are shares
of n, runs on every head with a causal mask and without one.  An error is `|Ohat - O|_F / |O|_F`: of
a head the median over seeds, then the median and the worst of all heads.  A time is a share of
that of exact attention, which is measured in turn with it on the same head and as many threads: the
median over heads and rounds.  What a method cannot honour is listed with its reason, and so is what
was left because it takes 1.5 times as long as exact attention.

The question is what else one gets in the time of nearfar.  A rival is any method that takes no more
time, with room for noise in its favour, on one thread or on all: exact attention too where nearfar
is no quicker, the mean of V, and output zero.  Methods that look at the exact matrix are floors
beside them, not rivals.

Without files the bundled heads are compared.  Lengths that no file of a set has are made where that
makes sense: the first positions of longer heads, and heads in a row for a causal language model.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sketchattn as sa
from sketchattn.base.drawing import make_figure, plain_style
from sketchattn.base.files import write_bytes, write_text
from sketchattn.base.machine import machine
from sketchattn.bench import load
from sketchattn.bench.harness import library_threads, on_threads
from sketchattn.studies.cheapest import refusal_of, run
from sketchattn.studies.columns import quantiles
from sketchattn.studies.grid import Variant, by_name
from sketchattn.studies.palette import style_of
from sketchattn.studies.pictures.curves import Point, front_of
from sketchattn.studies.pictures.places import place_labels
from sketchattn.zoo.base import make_method, parse_method

OURS = "nearfar"
# What is there however long it takes: nearfar, and what it must beat.
ALWAYS = (OURS, "exact", "vmean", "zero")
LENGTHS = (512, 4096, 16384)
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)
# Ranks of presets, so that a page of settings does not take all the time; fewer of longer heads.
PRESET_SHARES = (1 / 32, 1 / 8)
LONG_SHARES, LONG_PRESET_SHARES = (1 / 64, 1 / 16), (1 / 64,)
# Public choices that are no presets.  Of `OURS`, the settings whose time is compared with others.
BESIDE: dict[str, tuple[str, ...]] = {
    OURS: (
        "nearfar(near=8, tau=0.03)",
        "nearfar(near=4, tau=0.05)",
        "nearfar(near=0)",
    ),
    "clustered": ("clustered(improved=True)",),
    "combiner": (
        *(f"combiner(direct=own+top_mass({x}), second_order=diag)" for x in (1, 2, 4, 8)),
        *(f"combiner(direct=own+top_mass({x}), second_order=diag, block=128)" for x in (1, 2, 4)),
        *(f"combiner(direct=own+top_mass({x}), second_order=diag, block=256)" for x in (1, 2)),
        "combiner(pattern=routing, second_order=diag)",
        *(
            f"combiner(pattern=routing, direct=own+top_mass({x}), second_order=diag)"
            for x in (1, 2, 4, 8)
        ),
    ),
}
# What makes methods causal that are not by default, beside presets and methods inside of others.
CAUSAL = {"skeinformer": ("skeinformer(causal_form=corrected)",)}
# A setting that takes so much of the time of exact attention is left.
SLOW = 1.5
# Times are known no better: a rival may take so much more than nearfar, and ratios of errors
# within it are ties.
ROOM = 1.05
# What another method beats by so much in time and in error, on the first head, is no rival of
# anything: it runs once a head, or once at all where heads are long.
BEATEN = (2.0, 1.5)
# What nearfar is meant to reach from n = 4096 on: of the error of its best rival.
TARGETS = {True: 1 / 3, False: 1 / 2}
LONG = 4096
# Floors look at the whole matrix: not for longer heads, and from LONG on the largest entries of a
# few heads alone, where a decomposition takes minutes.
FLOOR_LENGTH, FLOOR_HEADS = 4096, 2
# A call that is shorter is made thrice, and its median counts.
BRIEF = 0.01
ALONE = "alone: nothing else is as quick"
START, END = "<!-- frontier -->", "<!-- end -->"


# --- heads --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Heads of one set, length and causality.

    ``rotary``: the set is a language model, stored as causal; ``made`` says how heads of this
    length came about, nothing where a file has them.
    """

    name: str
    n: int
    causal: bool
    rotary: bool
    made: str
    heads: Sequence[sa.AttentionProblem]

    @property
    def title(self) -> str:
        """What the case is called in tables."""
        return title_of({"set": self.name, "n": self.n, "causal": self.causal})


def title_of(row: Mapping[str, Any]) -> str:
    """Return what the case of a row is called."""
    return f"{row['set']}, n = {row['n']}, {'causal' if row['causal'] else 'no mask'}"


def sets_of(paths: Sequence[str]) -> dict[str, dict[int, list[sa.AttentionProblem]]]:
    """Return heads by set and length; a set is what stands before ``_n`` in the name of a file."""
    found: dict[str, dict[int, list[sa.AttentionProblem]]] = {}
    for path in paths:
        heads = list(sa.read_heads(path))
        name = re.split(r"_n\d", Path(path).stem)[0]
        found.setdefault(name, {}).setdefault(heads[0].n_k, []).extend(heads)
    return found or {"minilm": {(x := list(sa.load_heads("minilm")))[0].n_k: x}}


def cases_of(
    sets: Mapping[str, Mapping[int, Sequence[sa.AttentionProblem]]],
    lengths: Sequence[int] = (),
    most: int | None = None,
) -> tuple[list[Case], list[str]]:
    """Return all cases, their own causality first, and which are left out and why."""
    cases, notes = [], []
    for name, by_length in sets.items():
        for n in lengths or sorted({*by_length, *LENGTHS}):
            heads, made = made_of(by_length, n)
            if not heads:
                notes.append(f"{name}, n = {n}: {made}")
                continue
            rotary = bool(heads[0].causal)
            for causal in (rotary, not rotary):
                plain = [as_float32(x, causal) for x in heads[:most]]
                cases.append(Case(name, n, causal, rotary, made, plain))
    return cases, notes


def made_of(
    by_length: Mapping[int, Sequence[sa.AttentionProblem]], n: int
) -> tuple[list[sa.AttentionProblem], str]:
    """Return heads of a length and how they were made, or none and why there are none."""
    if n in by_length:
        return list(by_length[n]), ""
    longer = [length for length in by_length if length > n]
    if longer:
        source = min(longer)
        return [part(x, n) for x in by_length[source]], f"the first {n} positions of {source}"
    source = max(by_length)
    heads, count = by_length[source], -(-n // source)
    if not heads[0].causal:
        return [], "there are no heads of this length, and positions are not relative"
    if len(heads) < count:
        return [], f"there are no heads of this length, and too few of {source} to join"
    joined = []
    for i in range(0, len(heads) - count + 1, count):
        parts = heads[i : i + count]
        q, k, v = (np.concatenate([getattr(x, y) for x in parts])[:n] for y in ("q", "k", "values"))
        joined.append(sa.AttentionProblem(q, k, v, scale=parts[0].scale, causal=True))
    return joined, f"{count} heads of {source} in a row"


def part(problem: sa.AttentionProblem, n: int) -> sa.AttentionProblem:
    """Return the first n positions of a head."""
    arrays = (problem.q[:n], problem.k[:n], problem.values[:n])
    return sa.AttentionProblem(*arrays, scale=problem.scale, causal=problem.causal)


def as_float32(problem: sa.AttentionProblem, causal: bool) -> sa.AttentionProblem:
    """Return a head in float32 with this causality."""
    arrays = (np.asarray(x, np.float32) for x in (problem.q, problem.k, problem.values))
    return sa.AttentionProblem(*arrays, scale=problem.scale, causal=causal, name=problem.name)


# --- settings -----------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A method with its choices, at a share of the keys as its rank, None for none."""

    name: str
    label: str
    share: float | None

    def rank(self, n: int) -> int | None:
        """Return the rank at a length."""
        return None if self.share is None else max(1, round(self.share * n))

    def variant(self, n: int) -> Variant:
        """Return the method at a length."""
        rank = self.rank(n)
        if rank is None:
            return Variant.of(self.label, make_method(*parse_method(self.label)))
        return Variant.of(self.label, by_name(self.label, rank))


def labels_of(name: str, causal: bool) -> list[str]:
    """Return a method, its presets, and what is compared beside; first the defaults."""
    cls = sa.methods()[name]
    known = inspect.signature(cls).parameters
    labels = [name]
    presets = getattr(sys.modules[cls.__module__], "PRESETS", {}) if "preset" in known else {}
    labels += [f"{name}(preset={preset})" for preset in presets]
    labels += BESIDE.get(name, ())
    if causal:
        labels += CAUSAL.get(name, ())
    if causal and "inner" in known:
        labels += [f"{name}(inner={x})" for x in inner_methods(known["inner"].default)]
    return labels


def inner_methods(default: object) -> list[str]:
    """Return the methods that a causal form can be of: those that know their normalisers."""
    found = []
    for name in sa.methods():
        traits = by_name(name, 1).traits
        mixed = name in (default, OURS, "exact")  # nearfar in halves is no other method
        if traits.logsumexp and not (traits.oracle or traits.causal_form or mixed):
            found.append(name)
    return found


def shares_of(n: int, quick: bool = False) -> tuple[Sequence[float], Sequence[float]]:
    """Return ranks of methods and of presets, as shares of n."""
    if quick:
        return (1 / 8, 1 / 4), (1 / 8, 1 / 4)
    return (LONG_SHARES, LONG_PRESET_SHARES) if n > LONG else (SHARES, PRESET_SHARES)


def settings_of(
    names: Iterable[str], causal: bool, shares: Sequence[float], few: Sequence[float]
) -> list[Setting]:
    """Return what is compared, ranks of a label ascending."""
    settings = []
    for name in names:
        rank = inspect.signature(sa.methods()[name]).parameters.get("rank")
        needed = rank is not None and rank.default is rank.empty
        for label in labels_of(name, causal):
            if not needed:
                settings.append(Setting(name, label, None))
            # Where none is needed, what was chosen stays as it is.
            chosen = not needed and label in BESIDE.get(name, ())
            if rank is not None and not (chosen or (name == OURS and label != name)):
                ranks = list(shares if label == name else few)
                # A decomposition is cut for smaller ranks, and computed anew for larger ones.
                ranks.sort(reverse=name == "svd")
                settings += [Setting(name, label, x) for x in ranks]
    return settings


def role_of(variant: Variant, name: str) -> str:
    """Return what a setting is beside nearfar."""
    if name == "exact":
        return "exact"
    if name in ("zero", "vmean"):
        return "predictor"
    return "floor" if variant.oracle else "method"


# --- measuring ----------------------------------------------------------------------------------


def error_of(found: Any, truth: Any) -> float:
    """Return the relative error of an output, infinite where it is no number."""
    with np.errstate(all="ignore"):
        size = float(np.linalg.norm(found - truth) / np.linalg.norm(truth))
    return math.inf if math.isnan(size) else size


def timed(problem: sa.AttentionProblem, method: Any, seed: int) -> tuple[Any, float]:
    """Return an output and the seconds that it took."""
    output, seconds = run(problem, method, seed)
    if seconds < BRIEF:
        seconds = statistics.median([seconds, *(run(problem, method, seed)[1] for _ in range(2))])
    return output, seconds


class Refused(Exception):
    """Why a setting has no place in a case."""

    def __init__(self, status: str, reason: str, **known: float) -> None:
        super().__init__(reason)
        self.status, self.known = status, known


class Screen:
    """Look at each setting once: whether it is honoured, and not much slower than exact attention.

    The first positions of the first head come first, a sixteenth and a quarter of them, at the same
    share of keys.  No time grows more slowly than a multiple of n beside a constant, so that
    ``t(n) >= t(n/4) + 4 (t(n/4) - t(n/16))``: what is too slow by that is not run at n.
    """

    def __init__(self, case: Case, slow: float) -> None:
        self.head, self.limit = case.heads[0], slow
        n = case.n
        self.parts = [part(self.head, n // x) for x in (16, 4)] if n >= 1024 else []
        run(self.head, None, 0)  # it may compile
        self.truth = run(self.head, None, 0)[0]
        self.seconds = min(timed(self.head, None, 0)[1] for _ in range(3))
        self.slow: dict[str, int] = {}

    def look(self, setting: Setting) -> dict[str, Any]:
        """Return what one call on one head says of a setting, or raise `Refused`."""
        n = self.head.n_k
        if setting.label in self.slow:
            smaller = self.slow[setting.label]
            raise Refused(
                "slow", f"at rank {smaller} it takes more than {self.limit} of exact's time"
            )
        variant = make(setting, n)
        refusal = refusal_of(variant, self.head, setting.rank(n) or 1)
        if refusal is not None:
            raise Refused("not honoured", one_line(refusal))
        times = []
        for problem in self.parts:
            short = make(setting, problem.n_k)
            if refusal_of(short, problem, setting.rank(problem.n_k) or 1) is None:
                call(problem, short.method)  # it may compile
                times.append(call(problem, short.method)[1])
        if len(times) == 2:
            least = times[1] + 4 * max(times[1] - times[0], 0.0)
            self.judge(setting, least / self.seconds, "at least ", " by its times at n/4 and n/16")
        else:
            call(self.head, variant.method)
        found, seconds = call(self.head, variant.method)
        if seconds > self.limit * self.seconds:
            seconds = min(seconds, call(self.head, variant.method)[1])
        error = error_of(found, self.truth)
        share = seconds / self.seconds
        self.judge(setting, share, share=share, error=error)
        return {"share": share, "error": error, "worst": error, "heads": 1, "rounds": 1}

    def judge(
        self, setting: Setting, cost: float, least: str = "", why: str = "", **known: float
    ) -> None:
        """Leave a setting that takes too long, and all larger ranks; none of `ALWAYS`."""
        if cost > self.limit and setting.name not in ALWAYS:
            rank = setting.rank(self.head.n_k)
            if rank is not None:
                self.slow[setting.label] = rank
            raise Refused("slow", f"takes {least}{cost:.3g} of exact's time{why}", **known)


def make(setting: Setting, n: int) -> Variant:
    """Return the method of a setting, or say why there is none."""
    try:
        return setting.variant(n)
    except (TypeError, ValueError) as error:
        raise Refused("not honoured", one_line(error)) from error


def call(problem: sa.AttentionProblem, method: Any, seed: int = 0) -> tuple[Any, float]:
    """Return output and seconds of a method, or say how it failed."""
    try:
        return timed(problem, method, seed)
    except Exception as error:
        raise Refused("failed", one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Return what an error says."""
    return " ".join(str(error).split()) or type(error).__name__


def measure(
    case: Case,
    names: Sequence[str],
    rounds: int,
    threads: Sequence[int],
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], float]:
    """Return a row for each setting of a case, and how many CPUs other programs kept busy."""
    rows: list[dict[str, Any]] = []
    kept: list[tuple[Setting, Variant, dict[str, Any]]] = []
    screen = Screen(case, math.inf if quick else SLOW)
    for setting in settings_of(names, case.causal, *shares_of(case.n, quick)):
        row = row_of(case, setting)
        rows.append(row)
        try:
            variant = make(setting, case.n)
            row["role"] = role_of(variant, setting.name)
            if row["role"] == "floor":
                row |= floor(case, setting, variant)
                continue
            row |= screen.look(setting)
        except Refused as refused:
            row |= {"status": refused.status, "reason": str(refused), **refused.known}
            continue
        kept.append((setting, variant, row))
    beaten = {i for i, (_, _, row) in enumerate(kept) if is_beaten(row, rows)}
    say(f"{len(kept)} of {len(rows)} settings are measured, {len(beaten)} of them once a head")
    visits: dict[int, list[tuple[int, int, float, float]]] = {i: [] for i in range(len(kept))}
    others = []
    for turn, (head, seed, count) in enumerate(visits_of(len(case.heads), rounds, threads)):
        order = [(i + turn * len(kept) // 7) % len(kept) for i in range(len(kept))]
        once = seed < len(threads) and count == threads[head % len(threads)] and case.n <= LONG
        order = [i for i in order if once or i not in beaten]
        before = load.reading()
        with on_threads(count):
            for i, error, share in visit(case.heads[head], kept, order, seed):
                visits[i].append((head, count, error, share))
        others.append(load.others(before, load.reading()))
    for i, (_, _, row) in enumerate(kept):
        if visits[i]:
            row |= summed(visits[i], threads)
    return rows, statistics.median(others) if others else math.nan


def is_beaten(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether another method, not nearfar, is much quicker and much better on one head."""
    time, error = BEATEN
    return row["method"] not in (OURS, "exact") and any(
        x["method"] != OURS
        and x["status"] == "measured"
        and time * x["share"] <= row["share"]
        and error * x["error"] <= row["error"]
        for x in rows
    )


def row_of(case: Case, setting: Setting) -> dict[str, Any]:
    """Return what a row says before anything is measured."""
    nothing = dict.fromkeys(("error", "worst", "share", "share_low", "share_high", "share_one"))
    return {
        "set": case.name,
        "n": case.n,
        "causal": case.causal,
        "rotary": case.rotary,
        "made": case.made,
        "d": case.heads[0].d,
        "method": setting.name,
        "setting": setting.label,
        "rank": setting.rank(case.n),
        "role": "method",
        "status": "measured",
        "heads": 0,
        "rounds": 0,
        **dict.fromkeys(nothing, math.nan),
        "reason": "",
    }


def visits_of(heads: int, rounds: int, threads: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield head, seed and threads of each pass over the settings: at least ``rounds`` a count."""
    for again in range(max(1, -(-rounds // heads))):
        for head in range(heads):
            for j, count in enumerate(threads):
                yield head, again * len(threads) + j, count


def visit(
    problem: sa.AttentionProblem,
    kept: Sequence[tuple[Setting, Variant, dict[str, Any]]],
    order: Sequence[int],
    seed: int,
) -> Iterator[tuple[int, float, float]]:
    """Yield error and share of the time of all settings, exact attention in turn with them."""
    truth, before = timed(problem, None, seed)
    pending: list[tuple[int, float, float]] = []
    for place, i in enumerate(order):
        method = kept[i][1].method
        try:
            found, seconds = call(problem, method, seed)
            pending.append((i, error_of(found, truth), seconds))
        except Refused as refused:
            kept[i][2]["reason"] = f"on {problem.name}: {refused}"
            pending.append((i, math.inf, math.nan))
        # Exact attention takes about a third of the time, and is never far.
        spent = sum(x[2] for x in pending if not math.isnan(x[2]))
        if spent > 2 * before or place == len(order) - 1:
            after = timed(problem, None, seed)[1]
            for j, error, taken in pending:
                yield j, error, 2 * taken / (before + after)
            before, pending = after, []


def summed(
    visits: Sequence[tuple[int, int, float, float]], threads: Sequence[int]
) -> dict[str, Any]:
    """Return the numbers of a row from what each visit found."""
    by_head: dict[int, list[float]] = {}
    for head, _, error, _ in visits:
        by_head.setdefault(head, []).append(error)
    errors = [quantiles(x, (0.5,))[0] for x in by_head.values()]
    every, alone = max(threads), min(threads)
    shares = {count: [x[3] for x in visits if x[1] == count] for count in threads}
    low, middle, high = quantiles(shares[every], (0.25, 0.5, 0.75))
    return {
        "heads": len(by_head),
        "rounds": len(shares[every]),
        "error": quantiles(errors, (0.5,))[0],
        "worst": max(errors),
        "share": middle,
        "share_low": low,
        "share_high": high,
        "share_one": quantiles(shares[alone], (0.5,))[0],
    }


def floor(case: Case, setting: Setting, variant: Variant) -> dict[str, Any]:
    """Return the error of what looks at the exact matrix, where that can be afforded."""
    if case.n > FLOOR_LENGTH:
        raise Refused("not computed", f"a floor, for heads of up to {FLOOR_LENGTH} keys")
    few = case.heads if case.n < LONG else case.heads[:FLOOR_HEADS]
    if case.n >= LONG and setting.name != "topk":
        raise Refused("not computed", f"looks at the exact matrix, for fewer than {LONG} keys")
    errors = []
    for problem in few:
        refusal = refusal_of(variant, problem, setting.rank(case.n) or 1)
        if refusal is not None:
            raise Refused("not honoured", one_line(refusal))
        try:
            errors.append(error_of(variant.method.attend(problem, rng=0), problem.output))
        except Exception as error:
            raise Refused("failed", one_line(error)) from error
    return {"heads": len(few), "error": quantiles(errors, (0.5,))[0], "worst": max(errors)}


# --- verdicts -----------------------------------------------------------------------------------


def word(ratio: float) -> str:
    """Return what a ratio of errors means for nearfar.

    Examples
    --------
    >>> word(0.5), word(1.0), word(math.inf)
    ('wins', 'ties', 'loses')
    """
    return "wins" if ratio < 1 / ROOM else "loses" if ratio > ROOM else "ties"


def quotient(a: float, b: float) -> float:
    """Return a/b, 1 for two zeros."""
    return a / b if b > 0 else 1.0 if a == 0 else math.inf


def is_ours(row: Mapping[str, Any]) -> bool:
    """Say whether a row is one of nearfar's that was timed."""
    return row["method"] == OURS and row["status"] == "measured"


def rivals_of(own: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what takes no more time than a setting of nearfar, on one thread or on all."""
    found = []
    for row in rows:
        other = row["method"] != OURS and row["status"] == "measured" and row["role"] != "floor"
        if row["role"] == "exact":
            row = {**row, "share": 1.0, "share_one": 1.0}  # what is measured is noise
        if other and any(row[x] <= ROOM * own[x] for x in ("share", "share_one")):
            found.append(row)
    return found


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each setting of nearfar the best that others reach in its time.

    ``ratio`` is the error of nearfar over the least median error of a rival, ``ratio_worst`` the
    same of worst heads, where the rival may be another one.
    """
    found = []
    for case in groups(rows):
        for own in filter(is_ours, case):
            rivals = rivals_of(own, case)
            row = {name: own[name] for name in ("set", "n", "causal", "setting", "rank", "heads")}
            row |= {name: own[name] for name in ("share", "share_one", "error", "worst")}
            if rivals:
                best = min(rivals, key=lambda x: (x["error"], x["share"]))
                worst = min(rivals, key=lambda x: (x["worst"], x["share"]))
                row["ratio"] = quotient(own["error"], best["error"])
                row["ratio_worst"] = quotient(own["worst"], worst["worst"])
                row["rival"] = named(best)
                row |= {f"rival_{x}": best[x] for x in ("share", "share_one", "error", "worst")}
                row |= {"least_worst": worst["worst"], "least_worst_rival": named(worst)}
                middle, last = word(row["ratio"]), word(row["ratio_worst"])
                row["verdict"] = middle if middle == last else f"{middle} (worst head {last})"
                if any(x["role"] == "exact" for x in rivals):
                    row["verdict"] = "loses"  # to what has no error, in no more time
                factor = TARGETS[bool(own["rotary"] or own["causal"])]
                met = row["ratio"] <= factor and row["ratio_worst"] <= factor
                row["target"] = factor if own["n"] >= LONG else math.nan
                row["met"] = ("met" if met else "missed") if own["n"] >= LONG else ""
            else:
                row |= {"rival": "", "verdict": ALONE, "met": ""}
            found.append(row)
    return found


def groups(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the rows of each case."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(title_of(row), []).append(row)
    return list(found.values())


def named(row: Mapping[str, Any]) -> str:
    """Return a setting with its rank."""
    rank = row["rank"]
    none = rank is None or math.isnan(rank)
    return f"{row['setting']}" if none else f"{row['setting']}, r = {int(rank)}"


def pareto(rows: Sequence[Mapping[str, Any]], time: str = "share") -> list[Mapping[str, Any]]:
    """Return the settings of a case that no other beats in time and median error, by time."""
    timed = [r for r in rows if r["status"] == "measured" and r["role"] not in ("floor", "exact")]
    points = [
        Point(str(i), 0, row[time], row["error"])
        for i, row in enumerate(timed)
        if math.isfinite(row[time]) and math.isfinite(row["error"])
    ]
    return [timed[int(point.method)] for point in front_of(points)]


# --- text ---------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Return an error or a ratio with few digits."""
    if x == 0 or 0.0005 <= x < 9.995:
        return f"{x:.3f}" if x < 1 else f"{x:.2f}"
    return f"{x:.1e}" if x < 1 else f"{x:.0f}" if x < 1000 else "> 1000"


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the verdicts of one case as a table."""
    lines = [
        "| nearfar | time [one thread] | error [worst] | best other in that time | its time | "
        "its error [least worst] | ratio [of worst] | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        own = f"{row['share']:.2f} [{row['share_one']:.2f}]"
        cells = [f"`{named(row)}`", own, f"{number(row['error'])} [{number(row['worst'])}]"]
        if row["rival"]:
            target = "" if not row["met"] else f"; target {number(row['target'])} {row['met']}"
            cells += [
                f"`{row['rival']}`",
                f"{row['rival_share']:.2f} [{row['rival_share_one']:.2f}]",
                f"{number(row['rival_error'])} [{number(row['least_worst'])}]",
                f"{number(row['ratio'])} [{number(row['ratio_worst'])}]",
                f"{row['verdict']}{target}",
            ]
        else:
            cells += ["", "", "", "", row["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def overview(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line a case: the defaults of nearfar, and how many of its settings win."""
    lines = [
        "| heads | time of `nearfar` | ratio of errors [of worst heads] | best other in that time "
        "| settings that win | that meet the target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in groups(found):
        own = next((x for x in case if x["setting"] == OURS and named(x) == OURS), case[0])
        ratio = f"{number(own['ratio'])} [{number(own['ratio_worst'])}]" if own["rival"] else ""
        wins = sum(x["verdict"] in ("wins", ALONE) for x in case)
        met = sum(x["met"] == "met" for x in case)
        target = f"{met} of {len(case)}" if own["met"] else ""
        cells = [title_of(own), f"{own['share']:.2f} [{own['share_one']:.2f}]", ratio]
        cells += [f"`{own['rival']}`", f"{wins} of {len(case)}", target]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], *, short: bool = False
) -> str:
    """Return the result as Markdown, verdicts first; ``short``: nearfar's settings without ranks.

    Parameters
    ----------
    rows : sequence of dict
        Of all cases.
    about : dict
        ``command``, ``seconds``, ``threads``, ``machine``, ``notes``, and ``others`` by case.
    """
    found = verdicts(rows)
    shown = [x for x in found if x["rank"] is None or math.isnan(x["rank"])] if short else found
    lines = [*overview(shown), ""]
    for case in groups(shown):
        first = case[0]
        whole = next(g for g in groups(rows) if title_of(g[0]) == title_of(first))
        made = f" ({whole[0]['made']})" if whole[0]["made"] else ""
        many = "1 head" if first["heads"] == 1 else f"{first['heads']} heads"
        lines += [f"**{title_of(first)}**: {many}{made}, d = {whole[0]['d']}", "", *table(case)]
        lines += ["", *front_lines(whole), ""]
    lines += losses(shown)
    if short:
        ranked = [x for x in found if x not in shown]
        counts = [f"{w} {sum(x['verdict'] == w for x in ranked)}" for w in words(ranked)]
        lines += ["", f"With a rank, of {len(ranked)} settings: {', '.join(counts)}."]
    lines += ["", *left_lines(rows, short)]
    others = [x for x in about["others"].values() if not math.isnan(x)]
    busy = f"{max(others):.2f}" if others else "unknown"
    m = about["machine"]
    lines += [
        "",
        f"`{about['command']}`, {about['seconds']:.0f} s; {m['cpu']}, {m['cpus']} CPUs, times on "
        f"{max(about['threads'])} threads [{min(about['threads'])}]; other programs kept up to "
        f"{busy} CPUs busy; {', '.join(m['blas'])}, NumPy {m['numpy']}, Numba {m['numba']}.",
    ]
    lines += [f"Not there: {note}." for note in about["notes"]]
    return "\n".join(lines) + "\n"


def words(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the verdicts that occur, in order."""
    return sorted({x["verdict"] for x in found})


def front_lines(case: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the best settings of all methods in words, and the floors."""
    best = [f"{named(x)} ({x['share']:.2f}, {number(x['error'])})" for x in pareto(case)]
    lines = [f"Front (time, error): {'; '.join(best)}."]
    floors = [x for x in case if x["role"] == "floor" and x["status"] == "measured"]
    floors = [x for x in floors if x["setting"] in ("svd", "topk")]
    if floors:
        said = [f"{named(x)}: {number(x['error'])} [{number(x['worst'])}]" for x in floors]
        count = floors[0]["heads"]
        lines.append(f"Floors of {count} heads, from the exact matrix: {'; '.join(said)}.")
    return lines


def losses(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return where nearfar loses or ties, and which targets it misses."""
    lost: dict[tuple[str, str, str], list[str]] = {}
    missed: dict[str, list[str]] = {}
    for x in found:
        if x["verdict"] not in ("wins", ALONE):
            key = (title_of(x), x["verdict"], x["rival"])
            lost.setdefault(key, []).append(f"`{named(x)}`")
        if x["met"] == "missed":
            missed.setdefault(title_of(x), []).append(f"`{named(x)}`")
    count = len(found)
    if not lost:
        lines = [f"Where nearfar loses: in none of the {count} lines above."]
    else:
        many = sum(map(len, lost.values()))
        lines = [f"Where nearfar does not win, in {many} of the {count} lines above:", ""]
        for (title, verdict, rival), names in lost.items():
            lines.append(f"- {title}: {verdict} beside `{rival}`: {', '.join(names)}")
    if missed:
        lines += ["", "Where it misses its target:", ""]
        lines += [f"- {title}: {', '.join(names)}" for title, names in missed.items()]
    return lines


def left_lines(rows: Sequence[Mapping[str, Any]], short: bool) -> list[str]:
    """Return what is not in the comparison, and why: methods in words, settings in the file."""
    lines = []
    for causal in (True, False):
        here = [x for x in rows if x["causal"] == causal]
        names = {x["method"] for x in here}
        timed = {x["method"] for x in here if x["status"] == "measured"}
        left = [x for x in here if x["method"] in names - timed]
        left.sort(key=lambda x: x["status"] != "slow")
        # The first reason of each method counts: slowness, where there is any.
        reasons = {x["method"]: x["reason"] for x in reversed(left)}
        reasons = dict(sorted(reasons.items()))
        kind = "With a causal mask" if causal else "Without a mask"
        if reasons:
            said = [name if short else f"{name} ({why})" for name, why in reasons.items()]
            lines.append(f"{kind} there is nothing of {', '.join(said)}.")
    slow = [x for x in rows if x["status"] == "slow"]
    if slow:
        names = dict.fromkeys(str(x["method"]) for x in slow)
        lines.append(
            f"{len(slow)} settings were left because they take {SLOW} times as long as exact "
            f"attention, of {', '.join(names)}; results.csv names each."
        )
    return lines


# --- pictures -----------------------------------------------------------------------------------


def draw(rows: Sequence[Mapping[str, Any]], time: str = "share") -> Any:
    """Return the picture of some cases: error against time, a panel a case."""
    cases = groups(rows)
    names = [x for x in dict.fromkeys(str(r["method"]) for r in rows)]
    others = [x for x in names if x not in ALWAYS]
    figure = make_figure(figsize=(8.8, 0.7 + 4.3 * len(cases)))
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    high = 1 - 0.45 / figure.get_figheight()
    figure.subplots_adjust(left=0.08, right=0.985, top=high, hspace=0.24,
                           bottom=0.5 / figure.get_figheight())  # fmt: skip
    figure.text(
        0.01, 1 - 0.12 / figure.get_figheight(), "Down and left is better.  A point is a setting; "
        "line: no setting of any method is better in that time.", va="top", fontsize=8.5,
    )  # fmt: skip
    for axes, case in zip(panels, cases, strict=True):
        draw_case(axes, case, others, time)
    return figure


def draw_case(
    axes: Any, case: Sequence[Mapping[str, Any]], others: Sequence[str], time: str
) -> None:
    """Draw one case: nearfar black, the front yellow, each method named once."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_title(title_of(case[0]), fontsize=9.5, loc="left", fontweight="bold")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in case:
        x, y = row[time], row["error"]
        timed = row["status"] == "measured" and row["role"] in ("method", "predictor")
        if timed and math.isfinite(x) and 0 < y < 4:
            points.setdefault(str(row["method"]), []).append((x, y))
    every = [p for found in points.values() for p in found] or [(1.0, 1.0)]
    left, low = min(x for x, _ in every), min(y for _, y in every)
    # What is exact to rounding would take all of the axis.
    low = max(low, min((y for x, y in every if y > 1e-4), default=low) / 2)
    axes.set(xscale="log", yscale="log", xlim=(left / 1.3, 2.0), ylim=(low / 1.4, 5))
    axes.set_xlabel("time, exact = 1", fontsize=8.5, labelpad=1)
    axes.set_ylabel("error of the output", fontsize=8.5, labelpad=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=[1.0, 2.0, 5.0]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(labelsize=8)
    axes.grid(True, color="0.92", linewidth=0.5)
    axes.axvline(1, color="black", linewidth=0.8)
    best = [(x[time], x["error"]) for x in pareto(case, time)]
    best = [(x, max(y, low)) for x, y in best if x <= 1]
    axes.plot(*zip(*best, strict=True), color="#ffe28a", linewidth=7, zorder=1) if best else None
    on_front = {str(x["method"]) for x in pareto(case, time)}
    labels = []
    for name, found in points.items():
        ours, named = name == OURS, name in on_front
        look = style_of(name, [OURS, *others])
        marker, colour = look.marker or "_", "black" if ours else look.colour
        axes.plot(
            *zip(*found, strict=True), linestyle="none", marker=marker, color=colour,
            markersize=6 if ours else 4, zorder=4 if ours else 3, gid=name,
            markeredgewidth=1 if marker in "_12" else 0,  # which are lines alone
        )  # fmt: skip
        style = {
            "fontsize": 9 if ours else 8,
            "fontweight": "bold" if ours or named else "normal",
            "color": colour if ours or named else "0.35",
        }
        labels.append((name, sorted(found, key=lambda p: p[1]), style))
    labels.sort(key=lambda x: (x[0] != OURS, x[0] not in on_front))
    place_labels(axes, labels, every)


def as_svg(figure: Any) -> bytes:
    """Return a figure as SVG with its text as text: small, and alike in every run."""
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # A tenth of a point is finer than any screen, and half of the file is digits.
    text = re.sub(r"(\d\.\d)\d+", r"\1", buffer.getvalue().decode())
    lines = (line.rstrip() for line in text.splitlines())
    return ("\n".join(lines) + "\n").encode()


def write_picture(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the picture of some cases."""
    with plain_style():
        import matplotlib

        look = {
            "svg.hashsalt": "frontier",
            "svg.fonttype": "none",
            "font.sans-serif": ["DejaVu Sans"],
        }
        with matplotlib.rc_context(look):
            write_bytes(path, as_svg(draw(rows)))


# --- files --------------------------------------------------------------------------------------


def write(folder: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write the numbers and the text, which must not wait for pictures."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.csv", pd.DataFrame(rows).to_csv(index=False))
    write_text(folder / "verdicts.csv", pd.DataFrame(verdicts(rows)).to_csv(index=False))
    write_text(folder / "about.json", json.dumps(about, indent=1))
    write_text(folder / "summary.md", summary(rows, about))


def read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what `write` has written."""
    import pandas as pd

    frame = pd.read_csv(folder / "results.csv")
    frame[["reason", "made"]] = frame[["reason", "made"]].astype(object).fillna("")
    return frame.to_dict("records"), json.loads((folder / "about.json").read_text())


def update_page(page: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Replace the tables of a page and the picture beside it."""
    text = page.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{page} must hold {START} and {END}, got none; add them")
    write_text(page, f"{before}{START}\n{summary(rows, about, short=True)}{END}{after}")
    chosen = [g for g in groups(rows) if g[0]["n"] >= LONG and on_page(g[0])]
    chosen = chosen or groups(rows)[:1]
    write_picture(page.with_suffix(".svg"), [row for g in chosen for row in g])


def on_page(row: Mapping[str, Any]) -> bool:
    """Say whether a case is one that people run: an encoder has no mask."""
    return bool(row["rotary"] or not row["causal"])


def main() -> None:
    """Run the comparison; write numbers, verdicts and pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=[], help="files of heads, not the bundled")
    parser.add_argument("--n", default="", help="lengths; by default 512, 4096, 16384, the files'")
    parser.add_argument(
        "--methods", default="", help="instead of all, beside nearfar and predictors"
    )
    parser.add_argument("--first", type=int, help="so many heads of each set")
    parser.add_argument("--rounds", type=int, default=3, help="timings at least, of each setting")
    parser.add_argument("--threads", default="", help="by default 1 and all")
    parser.add_argument("--out", type=Path, default=Path("frontier"))
    parser.add_argument("--quick", action="store_true", help="2 heads of 64 positions, one round")
    parser.add_argument("--results", type=Path, help="folder of an earlier run: measure nothing")
    parser.add_argument("--page", type=Path, help="page whose tables and picture are replaced")
    options = parser.parse_args()
    if options.results is not None:
        rows, about = read(options.results)
        print(summary(rows, about))
        if options.page is not None:
            update_page(options.page, rows, about)
        return
    if options.quick:
        options.n, options.first, options.rounds = options.n or "64", options.first or 2, 1
    threads = [int(x) for x in options.threads.split(",") if x] or sorted({1, library_threads()})
    names = [x for x in options.methods.split(",") if x]
    names = list(dict.fromkeys([*ALWAYS, *names])) if names else list(sa.methods())
    lengths = [int(x) for x in options.n.split(",") if x]
    cases, notes = cases_of(sets_of(options.heads), lengths, options.first)
    start = time.perf_counter()
    shown = " ".join(["python", "examples/frontier.py", *sys.argv[1:]])
    # Folders are nobody's business.
    shown = re.sub(r" --(out|page) \S+", "", re.sub(r"\S*/(\S+\.safetensors)", r"\1", shown))
    about: dict[str, Any] = {
        "command": shown,
        "threads": threads,
        "machine": machine(),
        "notes": notes,
        "others": {},
    }
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that found fewer distinct keys
        for case in cases:
            began = time.perf_counter()

            def say(text: str, title: str = case.title, began: float = began) -> None:
                print(f"{title}: {text}, {time.perf_counter() - began:.0f} s", file=sys.stderr)

            found, others = measure(case, names, options.rounds, threads, options.quick, say)
            rows += found
            about["others"][case.title] = others
            about["seconds"] = time.perf_counter() - start
            write(options.out, rows, about)
            say("done")
            for problem in case.heads:
                problem.forget()
    print(summary(rows, about))
    for name in dict.fromkeys(case.name for case in cases):
        write_picture(options.out / f"{name}.svg", [x for x in rows if x["set"] == name])
    if options.page is not None:
        update_page(options.page, rows, about)
    print(f"{options.out}: results.csv, verdicts.csv, summary.md and a picture of each set")


if __name__ == "__main__":
    main()
