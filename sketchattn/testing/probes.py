"""Properties of attention that need no truth: P1 to P17.

The inputs are small integers, so that what a property does to them is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..operators.reference import merge
from .candidate import Candidate, ShapeError
from .inputs import Case, Setting, lattice, replaced
from .report import ProbeRecord
from .tolerance import growth, logsumexp_tolerance, tolerance, units

Array = NDArray[Any]

# Sizes: batch 2, 3 heads, 37 tokens, width 16.
_SIZES = (2, 3, 3, 37, 37, 16, 16)
# The row behind which keys change, and the keys of a first block.
_ROW = 20

CONTRACTS = ("exact", "tol", "not_claimed")


# What was found, and what is allowed: 0 is bit for bit.
Found = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """Hold what every property begins with.

    Attributes
    ----------
    candidate : Candidate
    case : Case
        Plain, with values from 1 to 4.
    out : array
        What the candidate returned for it.
    tol : float
        What its error may be.
    boolean : bool
        Masks are boolean; otherwise they are added.
    """

    candidate: Candidate
    case: Case
    out: Array
    tol: float
    boolean: bool

    def run(self, name: str, **changes: Any) -> Array:
        """Return the output for the case with other parts."""
        return self.candidate.run(replaced(self.case, name, **changes))

    def compare(self, name: str, want: Array, **changes: Any) -> Found:
        """Compare the output for other parts with what it should be: both may be off."""
        case = replaced(self.case, name, **changes)
        limit = self.tol + tolerance(case, case.truth()[0]).tol
        return _distance(self.candidate.run(case), want), limit


def _distance(a: Array, b: Array) -> float:
    gap = np.abs(a - b)
    return float(gap.max(initial=0.0)) if np.isfinite(gap).all() else float("inf")


def _ones(s: Stage) -> Found:
    w, u = units(s.case.dtype)
    limit = 4 * u + growth(2 * s.case.k.shape[2] + 12, w)
    return _distance(s.run("V = 1", v=np.ones_like(s.case.v)), np.ones(1)), limit


def _doubled(s: Stage) -> Found:
    return _distance(s.run("2 V", v=2 * s.case.v), 2 * s.out), 0.0


def _added(s: Stage) -> Found:
    other = 1.0 + np.arange(s.case.v.size).reshape(s.case.v.shape) % 3
    whole = replaced(s.case, "V + W", v=s.case.v + other)
    limit = 3 * tolerance(whole, whole.truth()[0]).tol
    return _distance(s.candidate.run(whole), s.out + s.run("W", v=other)), limit


def _hull(s: Stage) -> Found:
    v = np.repeat(s.case.v, s.case.group, axis=1)
    low, high = (f(axis=2, keepdims=True) for f in (v.min, v.max))
    beyond = np.maximum(low - s.out, s.out - high).max(initial=0.0)
    return float(beyond) if np.isfinite(beyond) else float("inf"), s.tol


def _shifted_keys(s: Stage) -> Found:
    shift = np.arange(s.case.k.shape[-1]) % 3 - 1.0
    return s.compare("K + c", s.out, k=s.case.k + shift)


def _permuted_keys(s: Stage) -> Found:
    order = np.random.default_rng(1).permutation(s.case.k.shape[2])
    return s.compare("keys permuted", s.out, k=s.case.k[:, :, order], v=s.case.v[:, :, order])


def _permuted_queries(s: Stage) -> Found:
    order = np.random.default_rng(2).permutation(s.case.q.shape[2])
    return s.compare("queries permuted", s.out[:, :, order], q=s.case.q[:, :, order])


def _one_query(s: Stage) -> Found:
    rows = s.case.q[:, :, _ROW : _ROW + 1]
    return s.compare("one query", s.out[:, :, _ROW : _ROW + 1], q=rows)


def _independent(s: Stage, axis: int, name: str) -> Found:
    """Compare the first head, or batch entry, alone and beside others that are three times it."""
    one: list[Any] = [slice(None)] * 4
    one[axis] = slice(0, 1)
    shape = [1, 1, 1, 1]
    shape[axis] = s.case.q.shape[axis]
    factor = np.full(shape, 3.0)
    factor[tuple(one)] = 1.0
    beside = s.run(f"other {name}", q=factor * s.case.q, k=factor * s.case.k, v=factor * s.case.v)
    index = tuple(one)
    alone = s.run(f"one {name}", q=s.case.q[index], k=s.case.k[index], v=s.case.v[index])
    return _distance(beside[index], alone), 2 * s.tol


def _other_keys(case: Case, hidden: Array) -> dict[str, Array]:
    """Return keys and values that differ where a key is hidden."""
    mask = hidden.reshape(-1, 1)
    return {
        "k": np.where(mask, case.k + 1, case.k),
        "v": np.where(mask, -3 * case.v, case.v),
    }


def _future(s: Stage) -> Found:
    later = np.arange(s.case.k.shape[2]) > _ROW
    rows = slice(0, _ROW + 1)
    before = s.run("causal", causal=True)[:, :, rows]
    after = s.run("future keys", causal=True, **_other_keys(s.case, later))[:, :, rows]
    return _distance(after, before), 0.0


def _masked(s: Stage) -> Found:
    hidden = np.arange(s.case.k.shape[2]) >= s.case.k.shape[2] - 7
    n_q = s.case.q.shape[2]
    mask = np.broadcast_to(~hidden, (n_q, len(hidden)))
    shown = mask if s.boolean else np.where(mask, 0.0, -np.inf)
    before = s.run("masked", mask=shown)
    return _distance(s.run("masked keys", mask=shown, **_other_keys(s.case, hidden)), before), 0.0


def _padded(s: Stage) -> Found:
    hidden = np.arange(s.case.k.shape[2]) >= s.case.k.shape[2] - 7
    keys = np.broadcast_to(~hidden, (len(s.case.k), len(hidden)))
    before = s.run("padded", key_mask=keys)
    after = s.run("padded keys", key_mask=keys, **_other_keys(s.case, hidden))
    return _distance(after, before), 0.0


def _duplicated(s: Stage) -> Found:
    twice = {"k": np.repeat(s.case.k, 2, axis=2), "v": np.repeat(s.case.v, 2, axis=2)}
    return s.compare("keys twice", s.out, **twice)


def _repeated(s: Stage) -> Found:
    return _distance(s.candidate.run(s.case), s.out), 0.0


def _one_key(s: Stage) -> Found:
    k, v = s.case.k[:, :, :1], s.case.v[:, :, :1]
    want = np.broadcast_to(np.repeat(v, s.case.group, axis=1), s.out.shape)
    return _distance(s.run("one key", k=k, v=v), want), 0.0


def _first_row(s: Stage) -> Found:
    want = np.repeat(s.case.v[:, :, 0], s.case.group, axis=1)
    return _distance(s.run("causal", causal=True)[:, :, 0], want), 0.0


def _merged(s: Stage) -> Found:
    parts = []
    limit = 0.0
    for name, keys in (
        ("all keys", slice(None)),
        ("first keys", slice(0, _ROW)),
        ("last keys", slice(_ROW, None)),
    ):
        part = replaced(s.case, name, k=s.case.k[:, :, keys], v=s.case.v[:, :, keys])
        parts.append(s.candidate.run_lse(part))
        limit += float(logsumexp_tolerance(part, part.truth()[1]).max())
    _, lse = merge(*parts[1], *parts[2])
    return _distance(lse, parts[0][1]), limit


@dataclass(frozen=True)
class Probe:
    """Hold one property.

    Attributes
    ----------
    id, name : str
    needs : set of str
        Features without which it is not asked.
    measure : callable
    reported : bool
        Said and never judged.
    """

    id: str
    name: str
    needs: frozenset[str]
    measure: Callable[[Stage], Found]
    reported: bool = False


def _probe(
    id: str, name: str, measure: Callable[[Stage], Found], *needs: str, reported: bool = False
) -> Probe:
    return Probe(id, name, frozenset(needs), measure, reported)


PROBES: tuple[Probe, ...] = (
    _probe("P1", "values of 1 give 1", _ones),
    _probe("P2", "twice the values give twice the output", _doubled),
    _probe("P3", "outputs of sums of values are sums of outputs", _added),
    _probe("P4", "outputs lie between the smallest and the largest value", _hull),
    _probe("P5", "one vector added to every key changes nothing", _shifted_keys),
    _probe("P6", "the order of keys changes nothing", _permuted_keys),
    _probe("P7", "rows move with their queries", _permuted_queries),
    _probe("P8", "a query alone has the same row", _one_query, "cross"),
    _probe("P9", "a head does not see other heads", lambda s: _independent(s, 1, "head")),
    _probe("P10", "a batch entry does not see others", lambda s: _independent(s, 0, "entry")),
    _probe("P11", "causal rows do not see future keys", _future, "causal"),
    _probe("P12", "masked keys are not seen", _masked, "any mask"),
    _probe("P12", "keys of the padding are not seen", _padded, "key_mask"),
    _probe("P13", "every key twice changes nothing", _duplicated, "cross"),
    _probe("P14", "two calls return the same bits", _repeated, reported=True),
    _probe("P16", "one key returns its value", _one_key, "cross"),
    _probe("P16", "the first causal row is the first value", _first_row, "causal"),
    _probe("P17", "logsumexps of two blocks of keys merge", _merged, "cross", "lse"),
)


def make_stage(
    candidate: Candidate, dtype: str, setting: Setting, supports: frozenset[str], seed: int
) -> Stage:
    """Run the case that the properties begin with."""
    rng = np.random.default_rng((seed, 200))
    q, k, _ = lattice(rng, _SIZES)
    b, _, h_kv, _, n_k, _, d_v = _SIZES
    # Positive, so that no output is near zero, where halves have fewer digits.
    v = rng.integers(1, 5, (b, h_kv, n_k, d_v)).astype(np.float64)
    case = Case(
        id=f"{dtype}/plain/properties",
        dtype=dtype,
        feature="plain",
        q=q,
        k=k,
        v=v,
        alignment=setting.alignment,
        empty_row=setting.empty_row,
    )
    tol = tolerance(case, case.truth()[0]).tol
    return Stage(candidate, case, candidate.run(case), tol, "bool_mask" in supports)


def run_probes(
    s: Stage, supports: frozenset[str], contract: Mapping[str, str] | None
) -> Iterator[ProbeRecord]:
    """Yield what became of every property; ``contract`` says which are claimed, None all."""
    known = supports | ({"any mask"} if supports & {"bool_mask", "additive_mask"} else set())
    for probe in PROBES:
        if not known >= probe.needs:
            continue
        claim = "" if contract is None else contract.get(probe.id, "not_claimed")
        judged = not probe.reported and claim != "not_claimed"
        try:
            error, limit = probe.measure(s)
        except ShapeError as wrong:
            yield _record(s, probe, "fail" if judged else "report", message=str(wrong))
            continue
        except Exception as wrong:  # noqa: BLE001  # a candidate may raise anything
            said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
            yield _record(s, probe, "fail" if judged else "report", message=said)
            continue
        if claim == "exact":
            limit = 0.0
        elif claim == "tol":
            limit = max(limit, 2 * s.tol)
        good = error <= limit
        status = ("pass" if good else "fail") if judged else "report"
        yield _record(s, probe, status, error, limit)
    yield from _inputs(s)


def _record(
    s: Stage,
    probe: Probe,
    status: str,
    error: float = float("nan"),
    limit: float = float("nan"),
    message: str = "",
) -> ProbeRecord:
    return ProbeRecord(probe.id, probe.name, s.case.dtype, status, error, limit, message)


def first_line(error: BaseException) -> str:
    """Return the first line of a message, cut to a readable length."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


def _inputs(s: Stage) -> Iterator[ProbeRecord]:
    """Yield P15: inputs are not written, and may be strided and, in NumPy, read-only."""
    name = "inputs are left as they are"
    positional, options = s.candidate.arguments(s.case)
    arrays = [x for x in positional if hasattr(x, "dtype")]
    before = [s.candidate.to.read(x).copy() for x in arrays]
    s.candidate.fn(*positional, **options)
    changed = any(
        not np.array_equal(s.candidate.to.read(x), y) for x, y in zip(arrays, before, strict=True)
    )
    yield ProbeRecord(
        "P15",
        name,
        s.case.dtype,
        "fail" if changed else "pass",
        message="an input was written" if changed else "",
    )
    if s.candidate.arrays == "jax":
        return
    name = "strided inputs return the same"
    positional, options = s.candidate.arguments(s.case)
    views = [_strided(x) if hasattr(x, "dtype") else x for x in positional]
    try:
        error = _distance(s.candidate.read_output(s.candidate.fn(*views, **options), s.case), s.out)
    except Exception as wrong:  # noqa: BLE001  # it may refuse them
        said = f"raised {type(wrong).__name__}: {first_line(wrong)}"
        yield ProbeRecord("P15", name, s.case.dtype, "report", message=said)
        return
    status = "pass" if error <= 2 * s.tol else "fail"
    yield ProbeRecord("P15", name, s.case.dtype, status, error, 2 * s.tol)


def _strided(x: Any) -> Any:
    """Return equal numbers with other strides, read-only in NumPy."""
    if isinstance(x, np.ndarray):
        wide = np.repeat(x, 2, axis=-1)[..., ::2]
        wide.flags.writeable = False
        return wide
    return x.transpose(1, 2).contiguous().transpose(1, 2)  # heads side by side, as models have
