"""Every registered method, with its variants, ready for the contract tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sketchattn as sa

Array = NDArray[Any]

# Parameters that change what a method promises or how it computes; the defaults are always run.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "thinformer": [{"rule": "kt"}, {"value_factor": False, "bucket": 4}],
    "stream_halving": [{"block": 4}, {"block": 1, "rule": "kt", "value_factor": False}],
    "topk": [{"renormalize": False}],
    "uniform": [{"estimator": "horvitz-thompson"}],
    "informer": [
        {"mean_divisor": "n_keys", "samples": 3},
        {"key_sampling": "shared", "samples": 4},
        {"statistic": "kl", "key_sampling": "full"},
        {"statistic": "oracle"},
        {"statistic": "kl", "fill": "masked_mean"},
    ],
    "causal_tree": [{"leaf": 1}, {"leaf": 5, "inner": "uniform"}],
    "clustered": [
        {"improved": True, "top_keys": 3},
        {"clustering": "lsh"},
        {"clustering": "lsh", "improved": True, "steps": 3, "bits": 8},
    ],
    "compressed": [
        {"kind": "gaussian"},
        {"kind": "srht", "center": True},
        {"kind": "pca_k"},
        {"inner": "skeinformer", "d_in": 3},
        {"inner": "column_sampling", "d_in": 12, "kind": "gaussian"},
    ],
    "dba": [
        {"preset": "dba_means"},
        {"preset": "key_means", "landmarks": "kmeans"},
        {"preset": "nystrom"},
        {"landmarks": "leverage", "unpack": "softmax", "tau": 2.0},
        {"landmarks": "segment_means", "unpack": "lsq"},
        {
            "landmarks": "pivoted_qr",
            "pack": "mean",
            "core": "softmax_logcount",
            "hidden": "gaussian",
            "d_in": 64,
        },
    ],
    "combiner": [
        {"preset": "paper"},
        {"pattern": "logsparse"},
        {"pattern": "axial_vertical", "reference": "zero"},
        {"pattern": ("axial_horizontal", "fixed"), "second_order": "diag"},
        {"pattern": "routing", "direct": "top_mass(1)"},
        {"reference": "mass_weighted(2)", "direct": "own+top_mass(1)"},
        {"direct": "own+window(2)"},
    ],
    "hyperattention": [
        {"align": "rank", "order": "forward", "planes": 3},
        {"block": 2, "mask_overlap": False, "leaf": 2},
        {"planes": 0, "sample": 0, "leaf": 3},
        {"probabilities": "value", "exact_below": 5},
        {"preset": "released"},
    ],
    "kdeformer": [
        {"sample": 2, "leaf": 2},
        {"preset": "paper", "leaf": 2},
        {"preset": "released"},
    ],
    "jl": [{"sketch": "haar"}, {"sketch": "countsketch", "center": True}],
    "column_sampling": [
        {"law": "uniform", "replace": False},
        {"law": "uniform", "normalizer": "sampled"},
        {"law": "value_norm"},
    ],
    "magicpig": [
        {"preset": "hub", "bits": 4},
        {"least": 1, "bits": 5, "center": False},
        {"least": 3, "floor": 1e-4, "bits": 3},
    ],
    "nearfar": [
        {"preset": "fast", "regions": "all"},
        {"block": 4, "clusters": 2, "tau": 0.0, "regions": "blocks"},
        {"first_order": 2, "metric": "query", "tau": 0.1},
        {"second_order": "none", "first_order": 0},
        {"levels": 2, "block": 4, "clusters": 2, "tau": 0.0},
        {"far": "coreset", "block": 4, "clusters": 2},
    ],
    "nystromformer": [
        {"landmarks": "kmeans"},
        {"landmarks": "random", "iterations": None, "ridge": 1e-3},
        {"landmarks": "leverage"},
        {"preset": "nystrom-attention"},
        {"renormalize": True, "iterations": 3},
    ],
    "performer": [
        {"features": "hyperbolic"},
        {"features": "trigonometric", "orthogonal": False},
        {"preset": "google"},
        {"center_keys": True},
    ],
    "skeinformer": [
        {"causal_form": "corrected", "mix": 0.1},
        {"law": "uniform", "causal_form": "corrected", "fill": "arithmetic"},
        {"law": "optimal", "fill": "oracle", "mix": 0.1, "pilot_reuse": False},
        {"preset": "sampled_normalizer", "pilots": 3},
        {
            "law": "value_norm",
            "replace": True,
            "weights": "importance",
            "normalizer": "exact",
            "center_values": True,
        },
    ],
    "wildcat": [
        {"preset": "paper"},
        {"preset": "sklearn_nystroem"},
        {"pivots": "plain", "bins": 2},
        {"pivots": "uniform", "sinks": 1, "window": 2},
    ],
    "vattention": [
        {"top": 2, "sinks": 1, "window": 2, "replace": True},
        {"budget": "clt", "eps": 0.3, "delta": 0.3},
        {"preset": "paper"},
    ],
}

# The scale at which the error of a method falls with the rank, where logits of size 2 are too large
# for it: relative variances of random features grow with exp(|x + y|^2).
SMALL_LOGITS = {"performer": 0.02}


# By how much the error of a method falls from rank 4 to 48 of 64 keys, at least; 1.5 elsewhere.
# Spans of two of 64 independent keys still lose half their variance: at small logits the error of a
# plan of positions falls by sqrt((15/16 48/64) / (1/2 62/64)) = 1.2.
LEAST_FALL = {"combiner": 1.1}

# Methods that need no rank: their other parameters have defaults that say as much.
RANK_IS_OPTIONAL = frozenset({"combiner", "nearfar"})


@dataclass(frozen=True)
class MethodCase:
    """Make one method for any rank; ``rank`` is left out where it has none."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"

    def __call__(self, rank: int) -> sa.Method:
        cls = sa.methods()[self.name]
        known = cls._get_param_names()
        made: sa.Method = cls(**({"rank": rank} if "rank" in known else {}), **self.options)
        return made

    @property
    def traits(self) -> sa.Traits:
        return self(1).traits


def method_cases() -> list[MethodCase]:
    """Return every registered method by its defaults, and the variants."""
    return [
        MethodCase(name, options)
        for name in sa.methods()
        for options in ({}, *VARIANTS.get(name, []))
    ]


CASES = method_cases()
IDS = [str(case) for case in CASES]


def make_problem(
    n_q: int, n_k: int, dtype: Any = np.float64, *, d: int = 4, seed: int = 0, **options: Any
) -> sa.AttentionProblem:
    """Return a random problem whose logits have a standard deviation of about 2."""
    rng = np.random.default_rng(seed)
    q = (2 * rng.standard_normal((n_q, d))).astype(dtype)
    k, v = (rng.standard_normal((n_k, m)).astype(dtype) for m in (d, 3))
    return sa.AttentionProblem(q, k, v, **options)


def unit_roundoff(dtype: Any) -> float:
    return float(np.finfo(dtype).eps) / 2


def dense_attention(problem: sa.AttentionProblem) -> Array:
    """Return A by the plain formula in float64."""
    q, k = (x.astype(np.float64) for x in problem.arrays[:2])
    logits = problem.scale * (q @ k.T)
    seen = np.ones(logits.shape, bool)
    if problem.key_mask is not None:
        seen &= problem.key_mask
    if problem.causal:
        offset = len(k) - len(q) if problem.causal == "bottom-right" else 0
        seen &= np.arange(len(k)) <= np.arange(len(q))[:, None] + offset
    top = np.where(seen, logits, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.where(seen, np.exp(np.where(seen, logits - np.where(seen, top, 0), 0)), 0)
    total = weights.sum(axis=1, keepdims=True)
    out: Array = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return out


def largest_logit(problem: sa.AttentionProblem) -> float:
    q, k = (np.abs(x.astype(np.float64)) for x in problem.arrays[:2])
    return float((abs(problem.scale) * (q @ k.T)).max(initial=0.0))


def rounding(problem: sa.AttentionProblem) -> float:
    """Return a relative error that a matrix close to A, or its product, may have by rounding.

    Logits carry d + 4 roundings of terms up to max |L|, shifts and normalisers a few more of that
    size, sums over keys or rows n of size 1: 8 (n_q + n_k + d)(1 + max |L|) u covers them and the
    factorisations that methods compute, whose errors are normwise.
    """
    sizes = problem.n_q + problem.n_k + problem.d
    return 8 * sizes * (1 + largest_logit(problem)) * unit_roundoff(problem.dtype)


def supports(case: MethodCase, problem: sa.AttentionProblem) -> bool:
    """Say whether the traits promise that a method takes a problem."""
    traits = case.traits
    return (
        (not problem.causal or traits.causal or traits.oracle)
        and (problem.key_mask is None or traits.key_mask)
        and (problem.n_q == problem.n_k or traits.rectangular)
    )
