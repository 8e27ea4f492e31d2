"""Check a tiled attention kernel, and see what the check says of three bugs that a test lets pass.

    python examples/check_kernel.py
    python examples/check_kernel.py --dtypes float32,float16 --seeds 3 --out check-kernel

The kernel is written as those for GPUs are: a program takes a tile of queries, walks over tiles of
keys, keeps the running maximum, mass and sum of each row, and loads what lies behind the end of an
array as zeros.  Each wrong kernel is the same one with a single step left out:

    rescale    what was summed is not scaled down when a later tile raises the maximum of a row
    tail       keys behind the end of the last tile are not masked
    alignment  causal rows are aligned at the first key where n_q != n_k, not at the last

First all of them take a usual test: normal numbers of deviation 1/4, sizes that fill every tile,
`allclose` at 1e-2.  Then `sketchattn.testing.check_attention` looks at them.  Printed are what the
usual test says, and the start of each report; drawn is the error of every case over its tolerance,
with the errors of zeros and of the mean of V on the same cases.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa
from sketchattn.base.drawing import make_figure, plain_style

BUGS = {
    "right": "the kernel",
    "rescale": "sums are not rescaled",
    "tail": "tail keys are not masked",
    "alignment": "causal rows are aligned top-left",
}
# Queries and keys of a tile.
ROWS, KEYS = 32, 64
# What a kernel of flash_attn_func without windows and softcaps can do.
SUPPORTS = ("causal", "cross", "dv", "scale", "gqa", "empty_row")
LOG2E = 1.4426950408889634

Kernel = Callable[..., Any]


def make_kernel(bug: str = "right") -> Kernel:
    """Return a kernel with the arguments of ``flash_attn_func``, (b, n, h, d) arrays, and a bug."""

    def kernel(
        q: Any,
        k: Any,
        v: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Any:
        (b, n_q, h, d), (_, n_k, h_kv, d_v) = q.shape, v.shape
        out = np.zeros((b, n_q, h, d_v), q.dtype)
        # Exponentials are to base two, as on a GPU, where these are the cheap ones.
        scale = LOG2E * (d**-0.5 if softmax_scale is None else softmax_scale)
        first = 0 if bug == "alignment" else n_k - n_q
        for batch in range(b):
            for head in range(h):
                keys, values = (x[batch, :, head * h_kv // h] for x in (k, v))
                for start in range(0, n_q, ROWS):
                    tile = program(
                        q[batch, start : start + ROWS, head], keys, values,
                        scale, first + start if causal else None, bug,
                    )  # fmt: skip
                    out[batch, start : start + ROWS, head] = tile
        return out

    kernel.__name__ = kernel.__qualname__ = bug
    return kernel


def program(q: Any, k: Any, v: Any, scale: float, position: int | None, bug: str = "right") -> Any:
    """Return one tile of the output, in float32.

    ``scale`` holds the factor of base two; ``position`` is that of the first query among the keys
    of a causal problem.
    """
    n_k, count = len(k), len(q)
    row = np.arange(count)[:, None]
    top = np.full((count, 1), -np.inf, np.float32)
    mass, total = np.zeros_like(top), np.zeros((count, v.shape[1]), np.float32)
    for start in range(0, n_k, KEYS):
        key = start + np.arange(KEYS)
        logits = np.float32(scale) * (q.astype(np.float32) @ load(k, start).T)
        seen = np.broadcast_to(key < n_k, logits.shape)
        if bug == "tail":
            seen = np.ones_like(seen)
        if position is not None:
            seen = seen & (key <= position + row)
        logits = np.where(seen, logits, np.float32(-np.inf))
        new = np.maximum(top, logits.max(axis=1, keepdims=True))
        level = np.where(np.isneginf(new), np.float32(0), new)  # of a row that has seen no key
        weights = np.exp2(logits - level)
        factor = np.exp2(top - level)
        mass = factor * mass + weights.sum(axis=1, keepdims=True)
        # Tensor cores multiply in the dtype of the inputs, and sum in float32.
        part = weights.astype(v.dtype).astype(np.float32) @ load(v, start)
        total = (total if bug == "rescale" else factor * total) + part
        top = new
    return total / np.where(mass == 0, np.float32(1), mass)


def load(x: Any, start: int) -> Any:
    """Return a tile of keys or values in float32, zeros behind the end."""
    part = x[start : start + KEYS].astype(np.float32)
    return np.pad(part, ((0, KEYS - len(part)), (0, 0)))


# Answers without attention, which a check must tell from it.


def zeros(q: Any, k: Any, v: Any, softmax_scale: float | None = None, causal: bool = False) -> Any:
    """Return zeros of the shape of the output."""
    return np.zeros((*q.shape[:3], v.shape[3]), q.dtype)


def mean_of_v(
    q: Any, k: Any, v: Any, softmax_scale: float | None = None, causal: bool = False
) -> Any:
    """Return the mean of V of each key head as every row."""
    mean = v.mean(axis=1, keepdims=True, dtype=np.float32).astype(q.dtype)
    heads = np.arange(q.shape[2]) * v.shape[2] // q.shape[2]
    return np.broadcast_to(mean[:, :, heads], (*q.shape[:3], v.shape[3])).copy()


# The usual test.


def usual_test(fn: Kernel, n: int, causal: bool) -> dict[str, Any]:
    """Return whether a function passes ``allclose`` at 1e-2, and its error beside the output."""
    rng = np.random.default_rng(0)
    q, k, v = (0.25 * rng.standard_normal((1, n, 2, 64)).astype(np.float32) for _ in range(3))
    truth = naive(q, k, v, causal)
    found = fn(q, k, v, causal=causal)
    return {
        "passes": bool(np.allclose(found, truth, rtol=0, atol=1e-2)),
        "error": float(np.abs(found - truth).max()),
        "relative": float(np.linalg.norm(found - truth) / np.linalg.norm(truth)),
    }


def naive(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """Return attention with whole matrices, as a test writes it down; n_q = n_k where causal."""
    logits = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(np.float32(q.shape[3]))
    if causal:
        logits = np.where(np.tri(*logits.shape[2:]) > 0, logits, np.float32(-np.inf))
    weights = np.exp(logits - logits.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", weights, v)


# The check.


def check(fn: Kernel, dtypes: Sequence[str], seeds: int) -> Any:
    """Return what `check_attention` says of a function."""
    return sa.testing.check_attention(
        fn, convention="flash", dtypes=dtypes, supports=SUPPORTS, seeds=tuple(range(seeds))
    )


def summary(report: Any, lines: int = 2) -> str:
    """Return the verdict, which cases fail, and those that are farthest from what is allowed."""
    first, *rest = str(report).splitlines()
    if report.passed:
        return "\n".join([first, *rest])
    counts: dict[str, list[int]] = {}
    for case in report.cases:
        count = counts.setdefault(case.feature, [0, 0])
        count[0] += case.status != "pass"
        count[1] += 1
    by_feature = ", ".join(f"{name} {bad}/{all_}" for name, (bad, all_) in counts.items())
    cases = sorted((x for x in report.failures if hasattr(x, "ratio")), key=lambda x: -x.ratio)
    probes = [x for x in report.failures if not hasattr(x, "ratio")]
    shown = [*cases[:lines], *probes[:lines]]
    return "\n".join([first, f"  cases that fail: {by_feature}", *(f"  {x}" for x in shown)])


def draw(reports: dict[str, Any], beside: dict[str, Any], path: Path) -> None:
    """Draw the error of every case over its tolerance, a symbol a kernel and a panel a dtype."""
    import matplotlib

    styles = {
        "zeros": ("_", "0.5", "zeros"),
        "mean_of_v": ("x", "0.5", "mean of V"),
        "right": ("o", "C0", BUGS["right"]),
        "rescale": ("s", "C3", BUGS["rescale"]),
        "tail": ("^", "C1", BUGS["tail"]),
        "alignment": ("D", "C4", BUGS["alignment"]),
    }
    dtypes = reports["right"].dtypes
    with plain_style():
        matplotlib.rcParams["svg.hashsalt"] = "check_kernel"  # the same bytes every time
        figure = make_figure(figsize=(9, 1 + 2.6 * len(dtypes)), layout="constrained")
        panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            cases = sorted(
                (x for x in reports["right"].cases if x.dtype == dtype), key=lambda x: x.feature
            )
            place = {x.id: i for i, x in enumerate(cases)}
            for i, (name, report) in enumerate({**beside, **reports}.items()):
                marker, colour, label = styles[name]
                mine = [x for x in report.cases if x.id in place]
                axes.plot(
                    # Side by side, and what is right to the last bit at the lower edge.
                    [place[x.id] + 0.14 * (i - 2.5) for x in mine],
                    [max(x.ratio, 1e-2) for x in mine],
                    marker, color=colour, markersize=4, markerfacecolor="none", label=label,
                )  # fmt: skip
            axes.axhline(1, color="0.2", linewidth=1)
            features = sorted({x.feature for x in cases})
            counts = [sum(x.feature == name for x in cases) for name in features]
            ends = np.cumsum(counts)
            for end in ends[:-1]:
                axes.axvline(end - 0.5, color="0.8", linewidth=0.8)
            words = [name.replace("_", " ") for name in features]
            axes.set_xticks([e - (c + 1) / 2 for e, c in zip(ends, counts, strict=True)], words)
            axes.tick_params(axis="x", length=0)
            axes.set(yscale="log", xlim=(-0.5, len(cases) - 0.5), ylabel="error / tolerance")
            axes.set_title(f"{dtype}: {len(cases)} cases; the line is the tolerance", fontsize=9)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False,
                      fontsize=8)  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Run the usual test and the check, print both and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", default="float32,float16")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the check")
    parser.add_argument("--n", type=int, default=1024, help="keys of the usual test")
    parser.add_argument("--out", type=Path, default=Path("check-kernel"))
    parser.add_argument("--picture", type=Path, help="check_kernel.svg in the output folder")
    parser.add_argument("--small", action="store_true", help="seconds: float32, one seed, n = 256")
    options = parser.parse_args()
    if options.small:
        options.dtypes, options.seeds, options.n = "float32", 1, 256
    dtypes = options.dtypes.split(",")
    start = time.perf_counter()
    kernels = {name: make_kernel(name) for name in BUGS}

    print(f"usual test: n_q = n_k = {options.n}, d = 64, normal numbers of deviation 1/4,")
    print("allclose(rtol=0, atol=1e-2), without and with a causal mask")
    for name, fn in {**kernels, "zeros": zeros, "mean of V": mean_of_v}.items():
        words = []
        for causal in (False, True):
            found = usual_test(fn, options.n, causal)
            verdict = "passes" if found["passes"] else "FAILS"
            words.append(
                f"{verdict}, error {found['error']:.1e} ({found['relative']:.1%} of the output)"
            )
        print(f"  {name:<10} {words[0]:<46} {words[1]}")

    reports = {name: check(fn, dtypes, options.seeds) for name, fn in kernels.items()}
    beside = {fn.__name__: check(fn, dtypes, options.seeds) for fn in (zeros, mean_of_v)}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        print(f"\n{name}: {BUGS[name]}\n{summary(report)}")
        data = json.dumps(report.as_dict(), indent=1, allow_nan=False)
        (options.out / f"{name}.json").write_text(data + "\n", encoding="utf-8")
    picture = options.picture or options.out / "check_kernel.svg"
    draw(reports, beside, picture)
    print(f"\n{picture}, {options.out}/*.json; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
