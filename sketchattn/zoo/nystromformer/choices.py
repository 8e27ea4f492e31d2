"""What can be chosen of Nystromformer, and what is claimed of each choice."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import ArrayLike

LANDMARKS = ("segment_means", "kmeans", "random", "leverage")
MASKING = ("delete", "zero")
# About the iteration, about the inverse that it stands for, and about any product of so few
# factors.
ITERATION_CLAIMS = (
    "lowrank_baselines.residual_recursion",
    "lowrank_baselines.residual_norm",
    "lowrank_baselines.iteration_filter",
    "lowrank_baselines.iteration_order",
    "lowrank_baselines.iteration_norm",
    "lowrank_baselines.row_sums_iterated",
    "lowrank_baselines.more_accurate",
)
INVERSE_CLAIMS = (
    "lowrank_baselines.all_landmarks",
    "lowrank_baselines.all_landmarks_singular",
    "lowrank_baselines.queries_suffice",
    "lowrank_baselines.keys_suffice",
    "lowrank_baselines.every_token",
    "lowrank_baselines.row_sums",
)
FACTOR_CLAIMS = ("lowrank_baselines.rank_floor", "dba.matrix_floor", "dba.output_floor")


class Core(NamedTuple):
    """Name the choices that make one estimator; defaults are those of the paper."""

    landmarks: str | ArrayLike = "segment_means"
    iterations: int | None = 6
    ridge: float = 0.0
    masking: str = "delete"


# What each released variant changes; both are the paper's where r divides n and no key is masked.
PRESETS: dict[str, dict[str, Any]] = {
    "original": {"iterations": 6, "masking": "zero"},
    "nystrom-attention": {"iterations": 6},
}
