"""The page of a method: hand-written sections of docs/methods, and what the registry and data say.

A page has the headings of `SECTIONS`.  Everything that the library knows of itself stands beside
them: traits, parameters, claims with their verdicts, the picture, and the numbers.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import sketchattn as sa

from . import claims
from .measure import Data, at_budget, made, points_of
from .tables import percent, short, table

# The headings of the hand-written part, in order; the first stands under the title.
SECTIONS = (
    "Formula",
    "Cost",
    "Guarantees",
    "When it fails",
    "Released code",
    "Sources",
)
TEMPLATE = """{title}

{idea}

{glance}

## Formula

{Formula}

## Cost

{Cost}

## Guarantees

{Guarantees}

{claims}

## Error against rank and against time

{numbers}

## When it fails

{When it fails}

{failures}

## Parameters

{parameters}

## Released code

{Released code}

## Sources

{Sources}
"""
# What a trait says in a table; those that are numbers, names or claims are said elsewhere.
WORDS = {
    "causal": "causal problems",
    "autoregressive": "no row depends on later keys",
    "key_mask": "masked keys",
    "rectangular": "other numbers of queries than of keys",
    "randomized": "random",
    "row_stochastic": "rows sum to one",
    "nonnegative": "no negative weights",
    "exact_at_full_rank": "exact at rank n",
    "differentiable": "gradients (`vjp`)",
    "logsumexp": "normalisers, to merge outputs",
    "decoding": "a decoder's state",
    "matrix": "the output is a matrix times V",
    "quadratic": "looks at all pairs",
    "oracle": "looks at the exact matrix: a floor",
    "uses_rank": "depends on the rank",
    "causal_form": "makes another method causal",
}

# What it means that one is missing.
LIMITS = {
    "causal": "refuses causal problems",
    "key_mask": "refuses masked keys",
    "rectangular": "needs as many queries as keys",
    "row_stochastic": "rows need not sum to one",
    "nonnegative": "weights can be negative",
    "autoregressive": "which keys a row reads can depend on later ones",
    "matrix": "there is no matrix, only an output",
}


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Return title, idea and sections of a hand-written page."""
    head, *rest = re.split(r"^## +(.+)$", text, flags=re.MULTILINE)
    title, _, idea = head.strip().partition("\n")
    sections = {
        name.strip(): body.strip() for name, body in zip(rest[::2], rest[1::2], strict=True)
    }
    return title.strip(), idea.strip(), sections


def problems(text: str) -> list[str]:
    """Return what a hand-written page lacks."""
    title, idea, sections = parse(text)
    found = [] if re.match(r"# \S", title) else ["no title"]
    found += [] if idea else ["no idea under the title"]
    if tuple(sections) != SECTIONS:
        found.append(f"sections {list(sections)}, not {list(SECTIONS)}")
    return found + [f"nothing under {name}" for name, body in sections.items() if not body]


def page(name: str, text: str, study: Data, times: Data, verdicts: Data) -> str:
    """Return the whole page of a method."""
    title, idea, sections = parse(text)
    cls = sa.methods()[name]
    method = made(cls)
    return TEMPLATE.format(
        **sections,
        title=title,
        idea=idea,
        glance=glance(name, cls, method),
        claims=claims_of(method, verdicts),
        numbers=numbers(name, study, times),
        failures=failures(name, study),
        parameters=f"```{{eval-rst}}\n.. autoclass:: sketchattn.{cls.__name__}\n   :no-index:\n```",
    )


def presets(cls: type[sa.Method]) -> list[str]:
    """Return the names of its presets, as the documentation of the parameter lists them."""
    found = re.search(r"preset : \{([^}]*)\}", cls.__doc__ or "")
    return re.findall(r'"([^"]+)"', found[1]) if found else []


def glance(name: str, cls: type[sa.Method], method: sa.Method) -> str:
    """Return the table of traits, and how to call it."""
    traits = dataclasses.asdict(method.traits)
    # Without a causal form there are no later keys to depend on.
    left = () if traits["causal"] else ("autoregressive",)
    yes = [text for trait, text in WORDS.items() if traits[trait] and trait not in left]
    no = [text for trait, text in LIMITS.items() if not traits[trait] and trait not in left]
    call = f"sa.{cls.__name__}({'rank=64' if 'rank' in cls._get_param_names() else ''})"
    rows = [
        ["call", f'`{call}`, or `sa.attention(q, k, v, "{name}", ...)`'],
        ["can and promises", "; ".join(yes)],
        ["limits", "; ".join(no) or "-"],
        ["approximates", f"{traits['target']} attention"],
    ]
    named = presets(cls)
    if named:
        rows.append(["presets", ", ".join(f"`{x}`" for x in named)])
    return table(["at a glance", f"`{name}`"], rows)


def claims_of(method: sa.Method, verdicts: Data) -> str:
    """Return the table of the claims that are about a method, with what became of them."""
    names = method.traits.claims
    if not names:
        return "No claim is about what it approximates at its defaults."
    known = sa.theory.claims()
    rows = [
        [
            f"`{name}`",
            claims.plain(known[name].title),
            known[name].status,
            claims.on_heads(verdicts["claims"][name]),
            claims.slack(verdicts["claims"][name]),
        ]
        for name in names
    ]
    return (
        "At its defaults these claims are about it. *derived*: proved in the book; *published*: "
        "stated by a source and not refuted; *refuted*: there is a counterexample; *vacuous*: not "
        "violated, and no better than a trivial predictor; *slack*: bound over observation "
        "([how claims are checked](../validate.md)).\n\n"
    ) + table(["claim", "says", "status", "on the bundled heads", "slack"], rows)


def numbers(name: str, study: Data, times: Data) -> str:
    """Return the picture with its caption, and the table of errors at every rank."""
    points = points_of(study, name)
    parts = []
    if name in pictured(study):
        parts.append(
            f"![Error of {name} against rank, against time, and head by head]"
            f"(../pictures/methods/{name}.svg)"
        )
        parts.append(
            f"*Left: error against rank, beside the floors and the mean of V. Middle: the same "
            f"errors against time; at n = {study['n']} exact attention is quick, and what lies "
            f"right of 1 is slower than it. Right: every head at one rank, against the number of "
            f"keys that its rows use.*"
        )
    if points:
        rows = [
            [
                str(p["rank"]),
                f"{short(p['median'])} [{short(p['low'])}, {short(p['high'])}]",
                f"{short(p['worst'])} ({p['worst_head'].split('/')[-1]})",
                short(p["skill"]),
                percent(p["work"]),
                short(p["time"]),
            ]
            for p in points
        ]
        parts.append(
            table(
                ["r", "error, median [quartiles]", "worst head", "skill", "keys read", "time"], rows
            )
        )
        parts.append(
            f"{len(study['heads'])} bundled heads, n = {study['n']}, d = {study['d']}, no mask, "
            f"median over {study['seeds']} seeds; time as a share of exact attention, all threads; "
            f"`{study['command']}`, {machine(study)}. Keys read are keys, clusters, features "
            f"or regions that a row reads; what a rank stands for differs between methods."
        )
    else:
        why = study["left_out"].get(name, "it is exact")
        parts.append(f"Not in the study of the bundled heads: {why}.")
    long = times["methods"].get(name, {})
    if "one" in long:
        given = times["heads"]["of"].endswith((".safetensors", ".npz"))
        where = "; the file is not in the repository: [limitations](../limitations.md)"
        parts.append(
            f"On {long_heads(times)}, float32, at r = {times['rank']} it takes "
            f"{short(long['one'])} of the time of exact attention on one thread "
            f"[{short(long['one_range'][0])} to {short(long['one_range'][1])}] and "
            f"{short(long['all'])} on {times['threads']}, at an error of {short(long['error'])} "
            f"[worst {short(long['worst'])}] (`{times['command']}`, same machine"
            f"{where if given else ''}). More settings and causal heads are on the page of the "
            f"[frontier](../frontier.md)."
        )
    return "\n\n".join(parts)


def long_heads(times: Data) -> str:
    """Return which heads times are of, in words."""
    heads = times["heads"]
    count = f"{heads['count']} heads" if heads["count"] > 1 else "one head"
    return f"{count} of n = {heads['n']}, d = {heads['d']} (`{heads['of']}`)"


def pictured(study: Data) -> set[str]:
    """Return the methods that have a picture."""
    every = {**study["references"], **study["methods"]}
    return {name for name, points in every.items() if len(points) > 1}


def failures(name: str, study: Data) -> str:
    """Return which heads are worst, in words, from the study."""
    point = at_budget(study, name) if name in study["methods"] else None
    if point is None:
        return ""
    head = point["worst_head"]
    perplexity = study["heads"][head]["perplexity"]
    mean = study["references"]["vmean"][0]["heads"][head]
    worse = [
        x for x, error in point["heads"].items()
        if error is not None and error > study["references"]["vmean"][0]["heads"][x]
    ]  # fmt: skip
    said = (
        f"Of the bundled heads {head.split('/')[-1]} is worst at r = {point['rank']}: error "
        f"{short(point['worst'])}, where the mean of V has {short(mean)}; its rows use "
        f"{short(perplexity)} keys (median). "
    )
    count = len(point["heads"])
    if worse:
        said += f"On {len(worse)} of {count} heads it is worse than the mean of V for every query."
    else:
        said += f"On none of {count} heads it is worse than the mean of V."
    return said + " The right picture above shows each of them, the worst one in a circle."


def machine(data: Data) -> str:
    """Return the machine of a measurement in a few words."""
    made = data["machine"]
    return (
        f"{made['cpu']}, {made['threads']} threads, Python {made['python']}, "
        f"NumPy {made['numpy']}, Numba {made['numba']}"
    )


def index(study: Data, times: Data) -> str:
    """Return the table of all methods."""
    rows = []
    for name, cls in sa.methods().items():
        point = at_budget(study, name)
        long = times["methods"].get(name, {})
        rows.append(
            [
                f"[{name}](methods/{name}.md)",
                promise(made(cls)),
                statuses(made(cls)),
                short(point["median"]) if point else "-",
                short(point["worst"]) if point else "-",
                short(long.get("one")),
                short(long.get("error")),
            ]
        )
    n, long_n = study["n"], times["heads"]["n"]
    return table(
        [
            "method",
            "promised of Ahat",
            "claims",
            f"error, n = {n}",
            "worst head",
            f"time, n = {long_n}",
            f"error, n = {long_n}",
        ],
        rows,
    )


def statuses(method: sa.Method) -> str:
    """Return how many claims are about a method at its defaults, by status."""
    known = sa.theory.claims()
    counts = Counter(known[name].status for name in method.traits.claims)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "none"


def promise(method: sa.Method) -> str:
    """Return what the traits promise of Ahat, in a few words."""
    traits = method.traits
    said = [
        text
        for have, text in (
            (traits.oracle, "floor"),
            (traits.row_stochastic, "rows sum to 1"),
            (traits.nonnegative and not traits.row_stochastic, "no negative weights"),
            (traits.exact_at_full_rank, "exact at r = n"),
            (traits.causal, "causal"),
        )
        if have
    ]
    return ", ".join(said) or "nothing"
