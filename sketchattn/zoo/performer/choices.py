"""What can be chosen of Performer, and what is claimed of each choice."""

from __future__ import annotations

from typing import Any, NamedTuple


class Form(NamedTuple):
    """Name the choices that make one estimator; defaults are those of the paper, without eps."""

    features: str = "positive"
    orthogonal: bool = True
    sign_fix: bool = True
    eps: float = 0.0


# What each released variant sets.
PRESETS: dict[str, dict[str, Any]] = {
    "google": {"sign_fix": False, "eps": 1e-6},
    "performer-pytorch": {"sign_fix": False, "eps": 1e-4},
}


def claims_of(form: Form) -> tuple[str, ...]:
    """Return the ids of the claims of ``sketchattn.theory`` about one estimator."""
    named = [f"mse_{form.features}" + ("_orthogonal" if form.orthogonal else "")]
    if form.orthogonal:
        named.append("signed_unbiased" if form.sign_fix else "unsigned_unbiased")
        named.append("unsigned_entry")
        if form.features != "trigonometric":
            named.append("orthogonal_gain")
    if form.features == "trigonometric":
        named += ["fourier_tail"]
        named += ["orthogonal_trigonometric"] if form.orthogonal else []
    else:
        named += ["eps_mixture", "eps_released"] if form.eps != 0 else []
        named += [] if form.eps != 0 else ["favor_factors", "favor_stochastic"]
        named += ["hyperbolic"] if form.features == "hyperbolic" else ["chebyshev", "rank_floor"]
    if form.features == "positive" and form.orthogonal:
        named += ["theorem2", "theorem2_coefficients", "theorem2_camera_ready"]
    return tuple(f"lowrank_baselines.{name}" for name in named)
