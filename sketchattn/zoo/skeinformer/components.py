"""The parts of Skeinformer, which presets switch, and what each may be."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import ArrayLike

LAW_NAMES = ("pilot", "optimal", "value_norm", "uniform")
# Short names of laws beside those of `sketchattn.sampling`.
SYNONYMS = {"exact": "optimal", "value": "value_norm"}
# Laws that look at V, and so can look at V without its mean.
VALUE_LAWS = ("pilot", "optimal", "value_norm")
WEIGHTS = ("none", "importance")
NORMALIZERS = ("adaptive", "sampled", "exact")
FILLS = ("geometric", "arithmetic", "oracle")
CAUSAL_FORMS = ("corrected",)


class Components(NamedTuple):
    """Name the choices that make one estimator; defaults are those of the published method."""

    law: str | ArrayLike = "pilot"
    replace: bool = False
    weights: str = "none"
    normalizer: str = "adaptive"
    fill: str = "geometric"
    pilot_reuse: bool = True


# What each preset changes.  The first four differ from the published method in one component; the
# last four are the released code's flags, of which all but the first drop pilot reuse beside
# the component that they are named after.
PRESETS: dict[str, dict[str, Any]] = {
    "without_pilot_reuse": {"pilot_reuse": False},
    "uniform_law": {"law": "uniform"},
    "exact_normalizer": {"normalizer": "exact"},
    "sampled_normalizer": {"normalizer": "sampled"},
    "skein_nopilot": {"pilot_reuse": False},
    "skein_uniform": {"law": "uniform", "pilot_reuse": False},
    "skein_nonorm": {"normalizer": "exact", "pilot_reuse": False},
    "skein_simplenorm": {"normalizer": "sampled", "pilot_reuse": False},
}

# What is claimed of the estimator without weights, refuted statements about its pilots among it;
# and of its normalisers.
CLAIMS = (
    "skeinformer.pilot_law",
    "skeinformer.inflation",
    "skeinformer.lemma1",
    "skeinformer.lemma1_logarithmic",
    "skeinformer.column_floor",
    "skeinformer.coherence",
    "skeinformer.pilot_reuse",
    "skeinformer.pilot_reuse_factor",
    "skeinformer.key_shift",
    "skeinformer.permutation",
    "skeinformer.full_rank",
    "skeinformer.rank_floor",
)
STOCHASTIC_CLAIMS = (
    "skeinformer.stochastic",
    "skeinformer.hull",
    "skeinformer.value_shift",
    "skeinformer.posterior",
)
NORMALIZER_CLAIMS = {
    "adaptive": ("skeinformer.identity_adaptive", "skeinformer.fill_mass", *STOCHASTIC_CLAIMS),
    "sampled": ("skeinformer.identity_sampled", *STOCHASTIC_CLAIMS),
    "exact": ("skeinformer.identity_exact",),
}

# Child of a batch entry's seed that its heads share their pilot rows from; no head has it.
SHARED_STREAM = 2**32 - 1


def has_law(c: Components, name: str) -> bool:
    """Say whether columns are drawn by the law with this name; it may be an array."""
    return isinstance(c.law, str) and c.law == name


def uses_pilots(c: Components) -> bool:
    """Say whether exact rows are drawn: for the law, or to be kept."""
    return bool(c.pilot_reuse) or has_law(c, "pilot")
