"""Which curves of a study the claims of this topic bound."""

from __future__ import annotations

from typing import Any

from ..engine.curves import curve, root, root_relative
from . import leverage_claims as leverage_claims
from . import product_claims as product_claims
from .moment_claims import MOMENT_FORMULAS, MOMENT_PARAMETERS


def _jl(kind: str) -> dict[str, Any]:
    options = {k: x for k, x in MOMENT_PARAMETERS.get(kind, {}).items() if k != "s"}
    return {"sketch": kind, **({"sketch_options": options} if options else {})}


_LAWS = {name: {"law": name} for name in ("uniform", "value_norm2", "optimal", "leverage")}
_DRAWS: dict[str, dict[str, Any]] = {
    **_LAWS,
    "without": {"law": "uniform", "replace": False},
    "gumbel": {"law": "optimal", "replace": False},
}
_COLUMNS = "column_sampling"

for _kind in MOMENT_FORMULAS:
    curve(f"sketching.moment_{_kind}", "jl", _jl(_kind), convert=root_relative)
for _name, _given in _DRAWS.items():
    curve(f"sketching.moment_sample_{_name}", _COLUMNS, _given, convert=root_relative)
curve("sketching.amm_jl_moment", "jl", _jl("gaussian"), convert=root)
curve("sketching.amm_markov", "jl", _jl("countsketch"))
curve("sketching.amm_sampling_tail", _COLUMNS, _LAWS["optimal"])
curve("sketching.amm_sampling_tail_sharp", _COLUMNS, _LAWS["optimal"])
curve("sketching.amm_bernstein_mean", _COLUMNS, {"law": "spectral"}, field="output_spec_amm")
curve("sketching.leverage_sampling", _COLUMNS, _LAWS["leverage"], convert=root)
