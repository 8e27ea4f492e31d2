"""Two levels of clusters: the formula, limits, safety of a decoder, errors, and long heads."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding
from naive import naive_two_levels
from numpy.typing import NDArray
from test_nearfar import changed, error, message, real

import sketchattn as sa
from sketchattn.errors.certificates import exact_rows
from sketchattn.kernels._threads import limit_threads
from sketchattn.operators.nearfar import frozen_from
from sketchattn.operators.nearfar_levels import TwoLevelAttention
from sketchattn.zoo.nearfar import levels

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]

pytestmark = pytest.mark.usefixtures("one_thread")

B, C = 8, 3
# Blocks of a superblock, keys of a coarse cluster: of `small`.
F, M = 2, 5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make superblocks of two blocks, and coarse clusters of five keys."""
    for name in ("CHILDREN", "BLOCKS", "GROUPS"):
        monkeypatch.setattr(levels, name, 2)


def matrix(method: sa.NearFar, problem: sa.AttentionProblem) -> TwoLevelAttention:
    ahat = method.approximate(problem)
    assert isinstance(ahat, TwoLevelAttention)
    return ahat


# --- the formula --------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "square": (61, 61, {}),
    "causal": (61, 61, {"causal": True}),
    "wide": (7, 61, {}),
    "bottom-right": (11, 61, {"causal": "bottom-right"}),
    "top-left": (66, 61, {"causal": "top-left"}),
    "masked": (61, 61, {"key_mask": np.arange(61) % 3 > 0}),
    "causal masked": (61, 61, {"causal": True, "key_mask": np.arange(61) % 4 > 0}),
    "tall bottom-right": (65, 61, {"causal": "bottom-right"}),
}
FORMS: list[dict[str, Any]] = [
    {"near": 2, "tau": 0},
    {"near": 3, "tau": 0.1, "first_order": 1},
    {"near": 1, "tau": 0.02, "first_order": 2, "metric": "query"},
    {"near": 2, "tau": 0.02, "second_order": "none"},
    {"near": 2, "tau": 0.02, "regions": "all"},
]


def sight(ahat: TwoLevelAttention, all_keys: bool) -> list[dict[str, Any]]:
    """Return own keys, clusters seen directly and coarse clusters of each row."""
    problem = ahat.problem
    n, parents = len(problem.kept_keys), ahat.groups.labels.tolist()
    first = [min(b * C, ahat.clusters.count) for b in range(-(-n // B) + 1)]
    every = list(range(ahat.groups.count))

    def clusters(low: int, high: int) -> list[int]:
        return list(range(first[low], first[min(high, len(first) - 1)]))

    def coarse(low: int, high: int) -> list[int]:
        return sorted({parents[c] for c in clusters(low, high)} - {-1})

    found = []
    for i in range(problem.n_q):
        if problem.causal:
            stop = int(problem.visible_counts()[i])
            block = max(stop - 1, 0) // B
            start = block // F * F
            found.append({
                "own": list(range(block * B, stop)), "clusters": clusters(start, block),
                "coarse": coarse(0, start),
            })  # fmt: skip
        elif all_keys or problem.n_q != problem.n_k:
            found.append({"own": [], "clusters": [], "coarse": every})
        else:
            # The last kept key up to its own, or the first.
            block = max(int((problem.kept_keys <= i).sum()) - 1, 0) // B
            start = block // F * F
            beside = [c for c in clusters(start, start + F) if c not in clusters(block, block + 1)]
            mine = coarse(start, start + F)
            found.append({
                "own": list(range(block * B, min(block * B + B, n))), "clusters": beside,
                "coarse": [c for c in every if c not in mine],
            })  # fmt: skip
    return found


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_those_of_the_loops(form: dict[str, Any], shape: str) -> None:
    n_q, n_k, given = SHAPES[shape]
    problem = make_problem(n_q, n_k, **given)
    options = {
        "block": B, "clusters": C, "regions": "blocks", "first_order": 0, "levels": 2, **form
    }  # fmt: skip
    ahat = matrix(sa.NearFar(**options), problem)
    kept, m = problem.kept_keys, ahat.moments
    all_keys = options["regions"] == "all" and not problem.causal
    seen = sight(ahat, all_keys)
    scores = np.zeros((len(m.z), len(kept)))
    scores[:, m.members] = m.z
    wanted, out, refined, near = naive_two_levels(
        problem.q, problem.k[kept], problem.values[kept], ahat.clusters.labels.tolist(),
        ahat.groups.labels.tolist(), seen, scale=problem.scale, refine=options["near"],
        most=options["near"], tau=options["tau"], scores=scores.tolist(),
        second_order=options.get("second_order") != "none",
    )  # fmt: skip
    assert [x[x >= 0].tolist() for x in ahat.refined] == refined
    assert [sorted(x[x >= 0].tolist()) for x in ahat.near] == near
    if n_q == n_k:
        assert any(refined)
        assert any(near)
    tolerance = rounding(problem)
    dense = ahat.to_dense()
    assert np.abs(dense[:, kept] - wanted).max() <= tolerance
    assert not np.delete(dense, kept, axis=1).any()
    assert np.abs(sa.NearFar(**options).attend(problem) - out).max() <= 4 * tolerance
    assert np.abs(ahat @ problem.values - out).max() <= 4 * tolerance
    y = np.random.default_rng(1).standard_normal((n_q, 5))
    assert np.abs((ahat.T @ y)[kept] - wanted.T @ y).max() <= 8 * tolerance * n_q
    some = [n_q - 1, 0]
    assert np.array_equal(ahat.rows(some), dense[some])
    sizes, children = np.diff(m.starts), np.diff(ahat.levels.first)
    reads = [
        len(s["own"]) + sum(children[c] > 0 for c in s["coarse"])
        + sum(sizes[c] > 0 for c in s["clusters"])
        + sum(children[c] - 1 for c in r) + sum(sizes[c] - 1 for c in x)
        for s, r, x in zip(seen, refined, near, strict=True)
    ]  # fmt: skip
    assert ahat.reads(problem).tolist() == reads


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", ["blocks", "all"])
def test_moments_of_groups_are_those_of_their_keys(mode: str) -> None:
    problem = make_problem(200, 200, d=6)
    ahat = matrix(sa.NearFar(block=16, clusters=5, levels=2, regions=mode), problem)
    labels, parents = ahat.clusters.labels, ahat.groups.labels
    coarse, counts = ahat.levels.coarse, ahat.levels.counts
    assert len(counts) > 5
    assert counts.sum() == 200
    for c, count in enumerate(counts):
        keys = problem.k[(labels >= 0) & (parents[labels] == c)]
        assert len(keys) == count
        if not count:
            assert coarse[14, c] == -np.inf
            continue
        assert np.abs(coarse[:6, c] - keys.mean(axis=0)).max() <= 1e-14
        variances = 2 / np.log(2) * coarse[6:12, c]
        assert np.abs(variances - keys.var(axis=0)).max() <= 1e-14
        reach = np.linalg.norm(keys - keys.mean(axis=0), axis=1).max()
        assert reach * (1 - 1e-14) <= coarse[12, c] <= 4 * reach + 1e-14
        assert coarse[13, c] == pytest.approx(float(frozen_from(np.array(count))))
        assert coarse[14, c] == pytest.approx(np.log2(count))
    # The children of each are together, and fill their columns.
    kids, first, wide = ahat.levels.kids, ahat.levels.first, ahat.levels.wide
    height = len(ahat.levels.table)
    for c in range(len(counts)):
        block = ahat.levels.tables[wide[c] * height : wide[c + 1] * height].reshape(height, -1)
        mine = kids[first[c] : first[c + 1]]
        assert (parents[mine] == c).all()
        assert np.array_equal(block[:, : len(mine)], ahat.levels.table[:, mine])
        assert (block[14, len(mine) :] == -np.inf).all()


# --- what a matrix is, and exact limits ---------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("shape", ["square", "causal", "masked", "wide"])
def test_rows_are_probabilities_and_outputs_lie_in_the_hull(order: int, shape: str) -> None:
    n_q, n_k, options = SHAPES[shape]
    problem = make_problem(n_q, n_k, np.float32, **options)
    method = sa.NearFar(block=B, clusters=C, near=1, first_order=order, regions="blocks", levels=2)
    ahat = matrix(method, problem)
    assert ahat.to_dense().min() >= 0
    assert np.abs(ahat.row_sums() - 1).max() <= 1e-6
    out, seen, v = method.attend(problem), problem.visible(), problem.values
    for i in range(n_q):
        assert (out[i] >= v[seen[i]].min(axis=0) - 1e-5).all()
        assert (out[i] <= v[seen[i]].max(axis=0) + 1e-5).all()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", ["square", "causal", "masked", "bottom-right", "wide"])
def test_exact_where_all_is_refined_and_read(shape: str, dtype: Any) -> None:
    n_q, n_k, options = SHAPES[shape]
    problem = make_problem(n_q, n_k, dtype, **options)
    exact = dense_attention(problem)
    for mode in ("blocks", "all"):
        method = sa.NearFar(block=B, clusters=C, near=99, tau=0.0, regions=mode, levels=2)
        assert np.abs(matrix(method, problem).to_dense() - exact).max() <= rounding(problem)
        # The same where all is refined and clusters are single keys.
        alone = sa.NearFar(block=B, clusters=B, near=40, tau=0.0, regions=mode, levels=2)
        assert np.abs(matrix(alone, problem).to_dense() - exact).max() <= rounding(problem)
        less = sa.NearFar(block=B, clusters=C, near=0, regions=mode, levels=2)
        assert np.abs(matrix(less, problem).to_dense() - exact).max() > 0.05


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("causal", [False, True])
def test_equal_keys_are_exact(causal: bool) -> None:
    problem = make_problem(61, 61, causal=causal)
    same = changed(problem, k=np.broadcast_to(problem.k[0], problem.k.shape).copy())
    for near in (0, 2):
        out = sa.NearFar(block=B, clusters=C, near=near, levels=2).attend(same)
        assert np.abs(out - same.output).max() <= 1e-13


def test_short_heads_have_no_coarse_cluster() -> None:
    for causal in (False, True):
        problem = make_problem(20, 20, causal=causal)
        ahat = matrix(sa.NearFar(levels=2, regions="blocks"), problem)
        assert np.abs(ahat.to_dense() - dense_attention(problem)).max() <= rounding(problem)


@pytest.mark.usefixtures("small")
def test_without_a_second_order_normalisers_are_lower_bounds() -> None:
    problem = make_problem(61, 61, causal=True)
    for near in (0, 1, 4):
        method = sa.NearFar(block=B, clusters=C, near=near, second_order="none", levels=2)
        _, lse = method.attend_with_lse(problem)
        assert (lse <= problem.logsumexp + 1e-12).all()
        assert (lse < problem.logsumexp - 1e-3).any()


@pytest.mark.usefixtures("small")
def test_huge_logits_are_finite_and_in_the_hull() -> None:
    rng = np.random.default_rng(0)
    q, k = (100 * rng.standard_normal((2, 300, 4))).astype(np.float32)
    v = rng.standard_normal((300, 3)).astype(np.float32)
    for scale in (0.5, 0.005):
        for causal in (False, True):
            problem = sa.AttentionProblem(q, k, v, scale=scale, causal=causal)
            method = sa.NearFar(block=32, clusters=4, near=3, tau=0, levels=2)
            out = method.attend(problem)
            assert np.isfinite(out).all()
            assert (out >= v.min(axis=0) - 1e-5).all()
            assert (out <= v.max(axis=0) + 1e-5).all()
            ahat = matrix(method, problem)
            dense = ahat.to_dense()
            assert np.abs(dense @ v - out).max() <= 2e-3  # logits of 1e3 in float32
            back = ahat.T @ out
            assert np.abs(dense.T @ out - back).max() <= 1e-4 * np.abs(back).max()


# --- safety of a decoder, threads ---------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_no_row_depends_on_what_comes_later() -> None:
    problem = make_problem(96, 96, d=4, causal=True)
    rng = np.random.default_rng(4)
    method = sa.NearFar(block=8, clusters=3, near=2, metric="query", levels=2)
    out = method.attend(problem)
    assert (matrix(method, problem).refined >= 0).any()
    for t in (1, 7, 8, 9, 15, 16, 17, 40, 64, 95):
        later = {x: getattr(problem, x).copy() for x in "qkv"}
        for x in later.values():
            x[t:] = 3 * rng.standard_normal(x[t:].shape)
        after = method.attend(changed(problem, **later))
        assert np.abs(after - out)[:t].max() <= 1e-6 * np.abs(problem.values).max()
        if t < 90:
            assert np.abs(after - out)[t:].max() > 1e-3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("t", [1, 15, 16, 17, 100, 128, 200, 255])
def test_prefixes_are_those_of_the_whole(t: int) -> None:
    problem = make_problem(256, 256, np.float32, d=4, causal=True)
    method = sa.NearFar(block=16, clusters=4, near=3, levels=2)
    whole = method.attend(problem)
    part = sa.AttentionProblem(
        problem.q[:t], problem.k[:t], problem.values[:t], scale=problem.scale, causal=True
    )
    assert np.abs(method.attend(part) - whole[:t]).max() <= 1e-5


@pytest.mark.usefixtures("small")
@pytest.mark.threads
@pytest.mark.parametrize("options", [{"causal": True}, {"regions": "blocks"}, {"regions": "all"}])
def test_the_same_bits_for_any_number_of_threads(options: dict[str, Any]) -> None:
    problem = make_problem(1500, 1500, np.float32, d=8, causal=bool(options.get("causal")))
    given = {k: v for k, v in options.items() if k != "causal"}
    method = sa.NearFar(block=32, clusters=4, near=4, first_order=1, levels=2, **given)
    results = []
    for threads in (1, 2):
        with limit_threads(threads):
            ahat = matrix(method, problem)
            results.append((
                method.attend(problem), ahat.T @ problem.values, ahat.to_dense(), ahat.near,
                ahat.refined, ahat.estimated_error(problem.values),
            ))  # fmt: skip
    assert all(np.array_equal(x, y) for x, y in zip(*results, strict=True))


# --- an operator as any other -------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_float64_and_copies_keep_the_choices() -> None:
    problem = make_problem(200, 200, np.float32, d=8)
    ahat = matrix(sa.NearFar(block=16, clusters=4, near=2, levels=2), problem)
    wide = ahat.wide()
    assert isinstance(wide, TwoLevelAttention)
    assert wide.dtype == np.float64
    assert wide.wide() is wide
    assert np.array_equal(wide.refined, ahat.refined)
    assert np.abs(wide.to_dense() - ahat.to_dense()).max() <= rounding(problem)
    assert ahat.nbytes > problem.q.nbytes + problem.k.nbytes
    again = pickle.loads(pickle.dumps(ahat))
    assert np.array_equal(again @ problem.values, ahat @ problem.values)
    assert 0 < ahat.work(problem) < 1


@pytest.mark.usefixtures("small")
def test_the_estimate_is_its_formula() -> None:
    problem = make_problem(61, 61)
    ahat = matrix(
        sa.NearFar(block=8, clusters=3, near=1, tau=0.02, regions="blocks", levels=2), problem
    )
    dense, labels, total = ahat.to_dense(), ahat.clusters.labels, 0.0
    parents = ahat.groups.labels
    for i, s in enumerate(sight(ahat, False)):
        refined = {c for c in ahat.refined[i].tolist() if c >= 0}
        near = set(ahat.near[i].tolist())
        seen = set(s["clusters"]) | {c for c, x in enumerate(parents) if x in refined}
        parts = [labels == c for c in seen - near]
        parts += [parents[labels] == c for c in set(s["coarse"]) - refined]
        for part in parts:
            if not part.any():
                continue
            k, v = problem.k[part], problem.values[part]
            sigma2 = (problem.scale * problem.q[i]) ** 2 @ k.var(axis=0)
            total += dense[i, part].sum() ** 2 * sigma2 * v.var(axis=0).sum()
    wanted = total**0.5 / np.linalg.norm(dense @ problem.values)
    assert ahat.estimated_error(problem.values) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.usefixtures("small")
def test_values_wider_than_a_piece() -> None:
    problem = make_problem(61, 61, causal=True)
    v = np.random.default_rng(0).standard_normal((61, 700))
    wide = changed(problem, v=v)
    method = sa.NearFar(block=B, clusters=C, near=2, first_order=1, levels=2)
    dense = matrix(method, problem).to_dense()
    assert np.abs(method.attend(wide) - dense @ v).max() <= 1e-12


def test_levels_are_chosen_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(64, 64, causal=True)
    monkeypatch.setattr(levels, "LONG", 64)
    monkeypatch.setattr("sketchattn.zoo.nearfar.method.LONG", 64)
    choices: list[tuple[dict[str, Any], bool]] = [
        ({}, True), ({"levels": 1}, False), ({"rank": 16}, False)
    ]  # fmt: skip
    for given, two in choices:
        ahat = sa.NearFar(**given).approximate(problem)
        assert isinstance(ahat, TwoLevelAttention) == two
    assert not isinstance(
        sa.NearFar().approximate(make_problem(63, 63, causal=True)), TwoLevelAttention
    )


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0, ValueError, "levels must be at least 1, got 0; 2 is for long heads"),
        (3, ValueError, "levels must be None, 1 or 2, got 3; 2 is for long heads"),
        (1.5, TypeError, "levels must be an integer, got float; 2 is for long heads"),
    ],
)
def test_other_levels_are_refused(value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=message(text)):
        sa.NearFar(levels=value).attend(make_problem(12, 12))


# --- real heads, and long ones ------------------------------------------------------------------


def one_more_level(problem: sa.AttentionProblem, **options: Any) -> tuple[float, float]:
    """Return the errors of one level and of two."""
    one, two = (sa.NearFar(block=256, clusters=8, levels=x, **options) for x in (1, 2))
    return error(one, problem), error(two, problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "causal", "mode", "factor"),
    [
        ("bytelm_n4096", True, "blocks", 1.25),
        ("bytelm_n4096", False, "blocks", 1.25),
        # Coarse clusters have no correction of first order, which diffuse heads live on.
        ("minilm_n4096_interp", False, "all", 1.6),
    ],
)
def test_a_second_level_adds_little_error(
    name: str, causal: bool, mode: str, factor: float
) -> None:
    # The median grows by a factor at most, and no head by more than that and a fifth.
    pairs = [one_more_level(p, near=16, tau=0.01, regions=mode) for p in real(name, causal)]
    one, two = np.array(pairs).T
    assert np.median(two) <= factor * np.median(one)
    assert (two <= 1.2 * factor * one).all()


def long_head(n: int) -> sa.AttentionProblem:
    """Return one causal head of n tokens: those of the development files one after the other.

    From the second time on queries and keys are turned by a rotation, and values by another.
    """
    heads = [*real("bytelm_n4096", True), *real("bytelm_n16384", True)]
    rng = np.random.default_rng(0)
    arrays = {x: np.concatenate([getattr(p, x) for p in heads]) for x in "qkv"}
    whole, d = len(arrays["q"]), arrays["q"].shape[1]
    parts: dict[str, list[Array]] = {x: [arrays[x][:n]] for x in "qkv"}
    for start in range(whole, n, whole):
        turns = [np.linalg.qr(rng.standard_normal((d, d)))[0].astype(np.float32) for _ in "kv"]
        for x in "qkv":
            parts[x].append(arrays[x][: n - start] @ turns[x == "v"])
    q, k, v = (np.concatenate(parts[x]) for x in "qkv")
    return sa.AttentionProblem(q, k, v, scale=heads[0].scale, causal=True)


@pytest.mark.slow
def test_a_head_of_65536_tokens() -> None:
    problem = long_head(65536)
    rows = np.sort(np.random.default_rng(5).choice(65536, 256, replace=False))
    exact = exact_rows(problem, rows)
    method = sa.NearFar()
    out = method.attend(problem)
    error_of_rows = np.linalg.norm(out[rows] - exact) / np.linalg.norm(exact)
    assert error_of_rows <= 0.06
    ahat = matrix(method, problem)
    assert ahat.work(problem) <= 0.07
    assert np.abs(ahat @ problem.values - out).max() <= 1e-5 * np.abs(problem.values).max()


MEMORY = """
import resource, sys
import numpy as np
import sketchattn as sa
from sketchattn.problem import AttentionProblem

n, d, folder = 262144, 64, sys.argv[1]
method = sa.NearFar()
rng = np.random.default_rng(0)
small = rng.standard_normal((3, 4096, d), dtype=np.float32)
sa.attention(*small, sa.NearFar(levels=2), causal=True)
files = [f"{folder}/{x}" for x in "qkv"]
for file in files:
    with open(file, "wb") as stream:
        for _ in range(n // 4096):
            rng.standard_normal((4096, d), dtype=np.float32).tofile(stream)
maps = [np.memmap(file, np.float32, "r", shape=(n, d)) for file in files]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = sa.attention(*maps, method, causal=True)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert np.isfinite(out).all()
print((after - before) * 1024 - 4 * n * d * 4)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory in units of Linux")
def test_memory_above_inputs_and_output(tmp_path: Path) -> None:
    # Keys and values once more, a third of that for columns that are filled up, and 128 MB.
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) <= 4 / 3 * 2 * 4 * 262144 * 64 + 128e6
