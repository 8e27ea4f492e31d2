"""How often an interval of `certify` holds the error, and how wide it is, on real heads.

Exact rows are computed once a head; each draw then costs well under a millisecond.  Coverage is the
share of draws whose interval holds the error, to be compared with 0.95; 300 draws resolve it to
about 0.025.  The last lines count cases below 0.93 and give the median of the widths, the upper end
over the lower one.

    python examples/certificate_coverage.py [HEADS] --rows 48 --draws 300 [--causal]
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.errors.certificates import KINDS, certify_known, exact_rows, know


def outputs(problem: sa.AttentionProblem, rank: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the name and the output of every method that can do this head."""
    for name, method in sa.methods().items():
        options: dict[str, Any] = (
            {"rank": rank} if "rank" in inspect.signature(method).parameters else {}
        )
        made = method(**options)
        if name != "exact" and (made.traits.causal or not problem.causal):
            yield name, np.asarray(made.attend(problem, rng=0), np.float64)


def main() -> None:
    """Print a line for each head and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", nargs="?", default="minilm")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    heads = sa.load_heads("minilm") if options.heads == "minilm" else sa.read_heads(options.heads)
    print(f"{'head':24} {'method':16} error    " + "   ".join(f"{k}: holds, ends" for k in KINDS))
    coverage: dict[str, list[float]] = {kind: [] for kind in KINDS}
    widths: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for problem in heads:
        if options.causal:
            problem = sa.AttentionProblem(*problem, causal=True, name=problem.name)
        exact = exact_rows(problem, np.arange(problem.n_q))
        for name, output in outputs(problem, options.rank):
            theta = float(np.linalg.norm(output - exact) / np.linalg.norm(exact))
            if theta == 0.0:
                continue
            known, cells = know(problem, output), []
            for kind in KINDS:
                rng = np.random.default_rng(0)
                made = [
                    certify_known(known, exact.__getitem__, options.rows, 0.95, rng, kind)
                    for _ in range(options.draws)
                ]
                holds = sum(c.low <= theta <= c.high for c in made) / len(made)
                low, high = (median(getattr(c, end) for c in made) for end in ("low", "high"))
                coverage[kind].append(holds)
                widths[kind].append(median(c.width for c in made))
                cells.append(f"{holds:.2f}, {low / theta:.2f} to {high / theta:.2f}")
            print(f"{problem.name or '':24} {name:16} {theta:.2e} " + "   ".join(cells), flush=True)
    for kind in KINDS:
        below = sum(x < 0.93 for x in coverage[kind])
        print(
            f"{kind}: {below} of {len(coverage[kind])} cases below 0.93, the least "
            f"{min(coverage[kind]):.2f}; median width {median(widths[kind]):.2f}"
        )


if __name__ == "__main__":
    main()
