"""What can be chosen of Informer: presets, what they come to, and what is claimed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # What the paper's text says.
        "paper": {"statistic": "zero_filled", "fill": "mean", "factor": 5},
        # What its public code computes.
        "released": {
            "statistic": "max_mean",
            "mean_divisor": "n_keys",
            "fill": "mean",
            "factor": 5,
        },
        "released_causal": {
            "statistic": "max_mean",
            "mean_divisor": "n_keys",
            "scope": "all",
            "fill": "cumsum",
            "factor": 5,
        },
        # What both mean.
        "corrected": {
            "statistic": "max_mean",
            "mean_divisor": "n_samples",
            "fill": "mean",
            "factor": 5,
        },
        "corrected_causal": {
            "statistic": "kl",
            "mean_divisor": "n_samples",
            "scope": "visible",
            "fill": "cummean",
            "factor": 5,
        },
    }
)
# What is claimed of its measures and its choice of rows, refuted statements among it.
CLAIMS = (
    "informer.lemma1",
    "informer.sandwich",
    "informer.proposition1",
    "informer.key_shift",
    "informer.row_selection",
    "informer.regret",
    "informer.oracle",
    "informer.random_rows",
    "informer.variation",
    "informer.total_bound",
    "informer.total_bound_surrogate",
    "informer.measure_orders_rows",
    "informer.divisor",
    "informer.miss_rate",
    "informer.sampled_maximum",
)


class Choices(NamedTuple):
    """What the parameters and the preset come to; None where a choice has no meaning."""

    statistic: str
    mean_divisor: str | None
    key_sampling: str | None
    scope: str | None
    fill: str
    factor: int | None
