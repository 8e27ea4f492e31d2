"""What is measured, in words and as a formula."""

from __future__ import annotations

from collections.abc import Sequence

# field -> what it is, as text and as a formula
MEASURES = {
    "output_fro_rel": ("relative output error", r"$\|\hat{O}-O\|_F \,/\, \|O\|_F$"),
    "output_fro_amm": (
        "output error over the norms of A and V",
        r"$\|\hat{O}-O\|_F \,/\, (\|A\|_F\,\|V\|_F)$",
    ),
    "output_spec_rel": ("relative output error, spectral", r"$\|\hat{O}-O\|_2 \,/\, \|O\|_2$"),
    "output_spec_amm": (
        "spectral output error over the norms of A and V",
        r"$\|\hat{O}-O\|_2 \,/\, (\|A\|_2\,\|V\|_2)$",
    ),
    "matrix_fro_rel": ("relative matrix error", r"$\|\hat{A}-A\|_F \,/\, \|A\|_F$"),
    "matrix_spec_rel": ("relative matrix error, spectral", r"$\|\hat{A}-A\|_2 \,/\, \|A\|_2$"),
    "row_tv_mean": (
        "total variation of a row, mean over rows",
        r"mean$_i$ $\frac{1}{2}\Sigma_j|\hat{A}_{ij}-A_{ij}|$",
    ),
    "row_tv_max": (
        "total variation of a row, worst row",
        r"max$_i$ $\frac{1}{2}\Sigma_j|\hat{A}_{ij}-A_{ij}|$",
    ),
    "row_kl_mean": (
        "divergence of a row, mean over rows",
        r"mean$_i$ $\Sigma_j A_{ij}\,\log(A_{ij}/\hat{A}_{ij})$",
    ),
    "skill": (
        "skill over the mean of V",
        r"$1-\|\hat{O}-O\|_F \,/\, \|O_{\mathrm{mean\ of\ V}}-O\|_F$",
    ),
}


def shorten(text: str, most: int) -> str:
    """Return a text of at most so many letters, cut in the middle."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-(most // 2 - 2) :]}"


def some_of(names: Sequence[str], most: int) -> str:
    """Return names separated by commas, so many of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def lower_edge(field: str) -> str:
    """Return what no axis can show at its lower end."""
    return "minus infinity" if field == "skill" else "zero"


def seconds_as_text(x: float) -> str:
    """Return a time with three digits at most and its unit.

    Examples
    --------
    >>> seconds_as_text(0.00123), seconds_as_text(2e-5), seconds_as_text(3.0)
    ('1.23 ms', '20 us', '3 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if x >= size * 0.9995:
            return f"{x / size:.3g} {unit}"
    return f"{x / 1e-6:.3g} us"
