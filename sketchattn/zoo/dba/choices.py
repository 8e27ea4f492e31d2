"""What can be chosen of DBA: parts that fit each other, presets, and what is claimed of them."""

from __future__ import annotations

from typing import NamedTuple

LANDMARKS = ("kmeans", "segment_means", "pivoted_qr", "leverage")
PACKS = ("exact_rows", "mean")
CORES = ("identity", "softmax_logcount", "pinv", "softmax_nocount")
UNPACKS = ("onehot", "softmax", "softmax_keys", "lsq")
# Combinations of pack, core and unpack that mean something: the inner sides have to be landmarks
# of the same kind.  An exact row belongs to a landmark query, a mean to a landmark key; a core
# leads from queries to keys; "pinv" undoes the softmax that both of its neighbours carry.
MEANINGFUL = {
    ("exact_rows", "identity", "onehot"),
    ("exact_rows", "identity", "softmax"),
    ("exact_rows", "identity", "lsq"),
    ("exact_rows", "pinv", "softmax_keys"),
    ("mean", "identity", "softmax_keys"),
    ("mean", "identity", "lsq"),
    ("mean", "softmax_logcount", "onehot"),
    ("mean", "softmax_logcount", "softmax"),
    ("mean", "softmax_nocount", "onehot"),
    ("mean", "softmax_nocount", "softmax"),
}
# About any product of three factors, and about means of queries and keys with their counts.
FACTOR_CLAIMS = ("dba.matrix_floor", "dba.output_floor", "dba.output_floor_attained")
MEANS_CLAIMS = ("dba.multiplicity", "dba.block_form", "dba.cluster_apriori")


class Choices(NamedTuple):
    """Name the choices that make one estimator; the defaults are the safe ones."""

    landmarks: str = "kmeans"
    pack: str = "exact_rows"
    core: str = "identity"
    unpack: str = "onehot"


# A preset settles all four.
PRESETS: dict[str, dict[str, str]] = {
    name: Choices(*choice)._asdict()
    for name, choice in {
        "clustered": (),
        "dba_means": ("kmeans", "mean", "softmax_logcount", "onehot"),
        "key_means": ("kmeans", "mean", "identity", "softmax_keys"),
        "nystrom": ("segment_means", "exact_rows", "pinv", "softmax_keys"),
        "softmax_interp": ("pivoted_qr", "exact_rows", "identity", "softmax"),
    }.items()
}


def not_meaningful(choice: Choices) -> str:
    """Say which part of a combination does not fit, and what does."""
    for fixed in (("pack", "core"), ("pack", "unpack"), ("core", "unpack")):
        given = tuple(getattr(choice, x) for x in fixed)
        if not any(
            tuple(c[Choices._fields.index(x) - 1] for x in fixed) == given for c in MEANINGFUL
        ):
            label, other = fixed
            at = Choices._fields.index(label) - 1, Choices._fields.index(other) - 1
            fitting = sorted({c[at[1]] for c in MEANINGFUL if c[at[0]] == given[0]})
            return (
                f"{other} must be one of {', '.join(fitting)} with {label} {given[0]!r}, got "
                f"{given[1]!r}; their landmarks do not belong together"
            )
    fitting = sorted({c[2] for c in MEANINGFUL if c[:2] == choice[1:3]})
    return (
        f"unpack must be one of {', '.join(fitting)} with pack {choice.pack!r} and core "
        f"{choice.core!r}, got {choice.unpack!r}; their landmarks do not belong together"
    )
