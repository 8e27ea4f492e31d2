"""Near keys and far moments: the formula, limits, safety of a decoder, and errors on real heads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding, unit_roundoff
from naive import naive_farthest_first, naive_nearfar
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels._jit import kernel, row_products
from sketchattn.kernels._threads import limit_threads
from sketchattn.kernels.nearfar import _choose
from sketchattn.operators.nearfar import NearFarAttention, expected_maximum, frozen_from
from sketchattn.zoo.nearfar import method as nearfar
from sketchattn.zoo.nearfar import regions

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]
# Long heads, which are no part of the repository.
SHARED = Path(os.environ.get("SKETCHATTN_SHARED", Path(__file__).parents[2] / "shared")) / "heads"

pytestmark = pytest.mark.usefixtures("one_thread")


def message(text: str) -> str:
    """Return a pattern for a whole message."""
    return f"^{re.escape(text)}$"


def matrix(method: sa.NearFar, problem: sa.AttentionProblem) -> NearFarAttention:
    ahat = method.approximate(problem)
    assert isinstance(ahat, NearFarAttention)
    return ahat


def error(method: sa.NearFar, problem: sa.AttentionProblem) -> float:
    out = method.attend(problem).astype(np.float64)
    return float(np.linalg.norm(out - problem.output) / np.linalg.norm(problem.output))


def changed(problem: sa.AttentionProblem, **arrays: Any) -> sa.AttentionProblem:
    """Return a problem with some of its arrays replaced."""
    q, k, v = (arrays.get(x, getattr(problem, x)) for x in "qkv")
    return sa.AttentionProblem(
        q, k, v, scale=problem.scale, causal=problem.causal, key_mask=problem.key_mask
    )


# --- the formula --------------------------------------------------------------------------------

B, C = 8, 3
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "square": (29, 29, {}),
    "causal": (29, 29, {"causal": True}),
    "wide": (7, 29, {}),
    "bottom-right": (11, 29, {"causal": "bottom-right"}),
    "top-left": (33, 29, {"causal": "top-left"}),
    "masked": (29, 29, {"key_mask": np.arange(29) % 3 > 0}),
    "causal masked": (29, 29, {"causal": True, "key_mask": np.arange(29) % 4 > 0}),
    "tall bottom-right": (35, 29, {"causal": "bottom-right"}),
}
FORMS: list[dict[str, Any]] = [
    {"near": 0},
    {"near": 2, "tau": 0},
    {"near": 4, "tau": 0.1},
    {"near": 1, "tau": 0.02, "first_order": 1},
    {"near": 2, "tau": 0.02, "first_order": 2, "metric": "query"},
    {"near": 2, "tau": 0.02, "second_order": "none"},
    {"near": 2, "tau": 0.02, "regions": "all"},
]


def sight(problem: sa.AttentionProblem, form: dict[str, Any]) -> list[dict[str, Any]]:
    """Return own keys and visible clusters of each row, in numbers of kept keys."""
    n = len(problem.kept_keys)
    rest = -(-(n % B) * C // B)
    if problem.causal:
        counts = problem.visible_counts().tolist()
        blocks = [max(x - 1, 0) // B for x in counts]
        return [
            {"own": list(range(b * B, x)), "clusters": list(range(b * C))}
            for x, b in zip(counts, blocks, strict=True)
        ]
    if form.get("regions") == "all":
        return [{"own": [], "clusters": list(range(-(-n * C // B)))}] * problem.n_q
    count = n // B * C + rest
    if problem.n_q != problem.n_k:
        return [{"own": [], "clusters": list(range(count))}] * problem.n_q
    found = []
    for i in range(problem.n_q):
        # The last kept key up to its own, or the first.
        b = max(int((problem.kept_keys <= i).sum()) - 1, 0) // B
        mine = range(b * C, min(b * C + C, count))
        own = list(range(b * B, min(b * B + B, n)))
        found.append({"own": own, "clusters": [c for c in range(count) if c not in mine]})
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_those_of_the_loops(form: dict[str, Any], shape: str) -> None:
    n_q, n_k, options = SHAPES[shape]
    problem = make_problem(n_q, n_k, **options)
    options = {"block": B, "clusters": C, "regions": "blocks", "first_order": 0, **form}
    ahat = matrix(sa.NearFar(**options), problem)
    kept, m = problem.kept_keys, ahat.moments
    seen = sight(problem, form)
    scores = np.zeros((len(m.z), len(kept)))
    scores[:, m.members] = m.z
    wanted, out, near = naive_nearfar(
        problem.q, problem.k[kept], problem.values[kept], ahat.clusters.labels.tolist(), seen,
        scale=problem.scale, most=options["near"], tau=options.get("tau", nearfar.TAU),
        scores=scores.tolist(), second_order=options.get("second_order") != "none",
    )  # fmt: skip
    assert [sorted(x[x >= 0].tolist()) for x in ahat.near] == near
    tolerance = rounding(problem)
    dense = ahat.to_dense()
    assert np.abs(dense[:, kept] - wanted).max() <= tolerance
    assert not np.delete(dense, kept, axis=1).any()
    method = sa.NearFar(**options)
    assert np.abs(method.attend(problem) - out).max() <= 4 * tolerance
    assert np.abs(ahat @ problem.values - out).max() <= 4 * tolerance
    y = np.random.default_rng(1).standard_normal((n_q, 5))
    assert np.abs((ahat.T @ y)[kept] - wanted.T @ y).max() <= 8 * tolerance * n_q
    some = [n_q - 1, 0]
    assert np.array_equal(ahat.rows(some), dense[some])
    assert np.abs(ahat.columns([3])[:, 0] - dense[:, 3]).max() <= tolerance
    reads = [
        len(s["own"])
        + sum((m.starts[c + 1] - m.starts[c] if c in x else m.starts[c + 1] > m.starts[c])
              for c in s["clusters"])
        for s, x in zip(seen, near, strict=True)
    ]  # fmt: skip
    assert ahat.reads(problem).tolist() == reads
    far = np.mean(reads) - np.mean([len(s["own"]) for s in seen])
    assert ahat.effective_rank == min(int(np.ceil(far)), len(kept))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_clusters_are_those_of_the_loops(count: int) -> None:
    x = np.random.default_rng(0).standard_normal((21, 5))
    starts, first = np.array([0, 13, 21]), np.array([0, count, 2 * count])
    labels, middles, centers = regions.clustered(x, starts, first)
    wanted = naive_farthest_first(x[:13], count, 4)
    wanted += [count + c for c in naive_farthest_first(x[13:], count, 4)]
    assert labels.tolist() == wanted
    assert np.abs(middles[0] - x[:13].mean(axis=0)).max() <= 1e-14
    # Equal keys leave clusters empty.
    twice = np.repeat(x[:2], 4, axis=0)
    labels, _, centers = regions.clustered(twice, np.array([0, 8]), np.array([0, 4]))
    assert sorted(set(labels.tolist())) == [0, 1]
    assert np.isinf(centers[2:]).all()


def test_directions_are_the_leading_ones() -> None:
    problem = make_problem(64, 64, d=6)
    ahat = matrix(
        sa.NearFar(block=32, clusters=1, first_order=2, regions="blocks", near=0), problem
    )
    m = ahat.moments
    x = problem.k[m.members[:32]]
    x = x - x.mean(axis=0)
    values = np.linalg.eigvalsh(x.T @ x)[::-1]
    z = m.z[:, :32] * np.abs(x).max()
    # Four steps of subspace iteration: a few percent of the leading variances are missed.
    assert (z[0] @ z[0], z[1] @ z[1]) == pytest.approx(values[:2], rel=0.1)
    assert abs(z[0] @ z[1]) <= 0.1 * values[0]


def chosen_by_rule(g: Array, u: Array, top: float, total: float, tau: float, most: int) -> Array:
    """Return the near clusters of a row by the rule, in float64, and how close it was."""
    g, u = g.astype(np.float64), u.astype(np.float64)
    order = np.lexsort((np.arange(len(g)), -g))[:most]
    order = order[g[order] > -np.inf]
    ref = max(float(np.max(g[order], initial=-np.inf)), top)
    weights = np.exp2(g[order] - ref)
    sums = weights.sum() + (total * np.exp2(top - ref) if top > -np.inf else 0.0)
    ratio = weights * 2 * np.log(2) * u[order] / sums
    return np.array([np.sort(order), ratio[np.argsort(order)] - tau])


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_rows_choose_by_the_rule(dtype: type[np.floating[Any]]) -> None:
    # Sharp rows, of which a limit leaves few clusters, diffuse ones, ties, and rows with nothing.
    rng = np.random.default_rng(0)
    few = many = 0
    for case in range(300):
        count, most = int(rng.integers(1, 90)), int(rng.integers(1, 20))
        spread = 10 ** rng.uniform(-1, 1.5)
        g = (spread * rng.standard_normal(count) + rng.choice([0, 1e3])).astype(dtype)
        if case % 7 == 0:
            g = np.round(g)
        g[rng.random(count) < 0.1] = -np.inf
        u = rng.gamma(1.0, 10 ** rng.uniform(-1, 1), count).astype(dtype)
        top, total = (-np.inf, 0.0) if case % 3 == 0 else (float(g.max()) - 2.0, 1.7)
        top = top if np.isfinite(top) else -np.inf
        tau = [0.0, 0.01, 0.05, 0.3][case % 4]
        chosen = np.empty(most, np.int32)
        best, place = np.empty(most, dtype), np.empty(most, np.int64)
        kept = _choose(
            g, u, dtype(top), dtype(total if np.isfinite(top) else 0.0), dtype(tau), best, place,
            chosen,
        )  # fmt: skip
        order, margin = chosen_by_rule(g, u, top, total, tau, most)
        # Weights of a row differ by the rounding of logits.
        close = 16 * np.finfo(dtype).eps * (1 + np.abs(g[np.isfinite(g)]).max(initial=0.0))
        sure = np.abs(margin) > close * (tau + np.abs(margin))
        if tau == 0:
            sure[:] = True
        found = np.isin(order, chosen[:kept])
        assert np.array_equal(found[sure], (margin >= 0)[sure])
        assert set(chosen[:kept]) <= set(order)
        assert (chosen[kept:] == -1).all()
        few, many = few + (kept < most), many + (len(order) == most < count)
    assert few > 50
    assert many > 50


# --- N1: what a matrix is -----------------------------------------------------------------------

SIGHTS = ["square", "causal", "masked", "wide"]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("shape", SIGHTS)
def test_rows_are_probabilities_and_outputs_lie_in_the_hull(order: int, shape: str) -> None:
    n_q, n_k, options = SHAPES[shape]
    problem = make_problem(n_q, n_k, np.float32, **options)
    method = sa.NearFar(block=8, clusters=2, near=1, first_order=order, regions="blocks")
    ahat = method.approximate(problem)
    assert ahat.to_dense().min() >= 0
    assert np.abs(ahat.row_sums() - 1).max() <= 1e-6
    out, seen, v = method.attend(problem), problem.visible(), problem.values
    for i in range(n_q):
        low, high = v[seen[i]].min(axis=0), v[seen[i]].max(axis=0)
        assert (out[i] >= low - 1e-5).all()
        assert (out[i] <= high + 1e-5).all()
    other = np.random.default_rng(3).standard_normal(v.shape).astype(np.float32)
    both = method.attend(changed(problem, v=v - 2 * other))
    parts = out - 2 * method.attend(changed(problem, v=other))
    assert np.abs(both - parts).max() <= 1e-6 * (1 + np.abs(parts).max()) * 4


# --- N2: exact limits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", ["square", "causal", "masked", "bottom-right"])
def test_exact_where_all_is_read_or_far_keys_are_alone(shape: str, dtype: Any) -> None:
    n_q, n_k, options = SHAPES[shape]
    problem = make_problem(n_q, n_k, dtype, **options)
    exact = dense_attention(problem)
    choices: list[dict[str, Any]] = [
        {"block": 8, "clusters": 3, "near": 99, "tau": 0.0},
        {"block": 8, "clusters": 8, "near": 0},
        {"block": 8, "clusters": 8, "near": 0, "regions": "all"},
    ]
    for given in choices:
        dense = sa.NearFar(**{"regions": "blocks", **given}).approximate(problem).to_dense()
        assert np.abs(dense - exact).max() <= rounding(problem)
    # The same without near keys is far from exact.
    less = sa.NearFar(block=8, clusters=3, near=0, regions="blocks").approximate(problem)
    assert np.abs(less.to_dense() - exact).max() > 0.05
    if problem.causal:
        dense = sa.NearFar(block=64).approximate(problem).to_dense()
        assert np.abs(dense - exact).max() <= rounding(problem)


@pytest.mark.parametrize("causal", [False, True])
def test_equal_keys_in_each_cluster_are_exact(causal: bool) -> None:
    rng = np.random.default_rng(0)
    q, v = rng.standard_normal((2, 96, 4))
    k = rng.standard_normal((8, 4))[rng.integers(8, size=96)]
    problem = sa.AttentionProblem(q, k, v, causal=causal)
    choices: list[dict[str, Any]] = [{"regions": "blocks"}, {"regions": "all", "clusters": 32}]
    for given in choices:
        method = sa.NearFar(block=32, near=0, **{"clusters": 8, **given})
        assert np.abs(method.attend(problem) - problem.output).max() <= 1e-13
    same = changed(problem, k=np.broadcast_to(k[0], k.shape).copy())
    out = sa.NearFar(block=32, near=0).attend(same)
    assert np.abs(out - same.output).max() <= 1e-13


def test_a_row_that_sees_nothing_is_zero() -> None:
    problem = make_problem(35, 29, causal="bottom-right")
    output, lse = sa.NearFar(block=8).attend_with_lse(problem)
    assert not output[:6].any()
    assert np.array_equal(lse == -np.inf, np.arange(35) < 6)


def test_huge_logits_are_finite_and_in_the_hull() -> None:
    rng = np.random.default_rng(0)
    q, k = (100 * rng.standard_normal((2, 300, 4))).astype(np.float32)
    v = rng.standard_normal((300, 3)).astype(np.float32)
    for scale in (0.5, 0.005):  # of steep rows, and of those that fold near keys above the rest
        problem = sa.AttentionProblem(q, k, v, scale=scale)
        for regions_ in ("blocks", "all"):
            method = sa.NearFar(block=64, clusters=4, near=3, tau=0, regions=regions_)
            out = method.attend(problem)
            assert np.isfinite(out).all()
            assert (out >= v.min(axis=0) - 1e-5).all()
            assert (out <= v.max(axis=0) + 1e-5).all()
            dense = method.approximate(problem).to_dense()
            assert np.abs(dense @ v - out).max() <= 2e-3  # logits of 1e3 in float32


def test_near_keys_far_above_all_others_move_the_largest_logit() -> None:
    # One key of a cluster has a logit of 200 above what the cluster's moments say.
    k = np.zeros((64, 2))
    k[5, 0] = 200.0
    k[:, 1] = np.arange(64) * 1e-3
    q = np.zeros((64, 2))
    q[:, 0] = 1.0
    v = np.eye(64)
    for dtype in PRECISIONS:
        problem = sa.AttentionProblem(
            q.astype(dtype), k.astype(dtype), v.astype(dtype), scale=1.0, causal=True
        )
        method = sa.NearFar(block=16, clusters=1, near=3, tau=0)
        out = method.attend(problem)
        assert np.abs(out[16:] - v[5]).max() <= 1e-6


# --- N3: symmetries -----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_shifts_rotations_and_orders_of_keys_leave_the_output(causal: bool) -> None:
    problem = make_problem(64, 64, d=4, causal=causal)
    rng = np.random.default_rng(2)
    shift = rng.standard_normal(4)
    shift *= 24 / np.linalg.norm(shift)
    turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    for metric in ("key", "query"):
        method = sa.NearFar(
            block=16, clusters=4, near=2, metric=metric, first_order=1, regions="blocks"
        )
        out = method.attend(problem)
        moved = method.attend(changed(problem, k=problem.k + shift))
        assert np.abs(moved - out).max() <= 1e-10
        if not causal:
            order = np.concatenate([16 * b + rng.permutation(16) for b in range(4)])
            mixed = changed(problem, k=problem.k[order], v=problem.values[order])
            assert np.abs(method.attend(mixed) - out).max() <= 1e-10
    # Variances of coordinates turn with them only without a second order.
    method = sa.NearFar(block=16, clusters=4, near=2, tau=0, second_order="none", regions="blocks")
    turned = changed(problem, q=problem.q @ turn, k=problem.k @ turn)
    assert np.abs(method.attend(turned) - method.attend(problem)).max() <= 1e-10


# --- N4, N5: safety of a decoder ----------------------------------------------------------------


def leaky(problem: sa.AttentionProblem) -> Array:
    """Return an output whose clusters were found with a metric of all queries."""
    sizes = regions.Sizes(16, 4, 2)
    root = regions.metric_root(problem)
    made = regions.in_blocks(problem, sizes, root, 0, True)
    ahat = NearFarAttention(problem, made.clusters, made.rows, 2, 0.0)
    return np.asarray(ahat @ problem.values)


@pytest.mark.parametrize("preset", [None, "fast"])
def test_no_row_depends_on_what_comes_later(preset: str | None) -> None:
    problem = make_problem(96, 96, d=4, causal=True)
    rng = np.random.default_rng(4)
    method = sa.NearFar(block=16, preset=preset, metric="query")

    def largest_change(attend: Any, t: int) -> float:
        later = {x: getattr(problem, x).copy() for x in "qkv"}
        for x in later.values():
            x[t:] = 3 * rng.standard_normal(x[t:].shape)
        difference = attend(changed(problem, **later))[:t] - attend(problem)[:t]
        return float(np.abs(difference).max())

    for t in (1, 15, 16, 17, 40, 64, 95):
        assert largest_change(method.attend, t) <= 1e-6 * np.abs(problem.values).max()
    assert max(largest_change(leaky, t) for t in (40, 64)) > 1e-3


@pytest.mark.parametrize("t", [1, 63, 64, 65, 128, 200, 255])
def test_prefixes_are_those_of_the_whole(t: int) -> None:
    problem = make_problem(256, 256, np.float32, d=4, causal=True)
    method = sa.NearFar(block=64, clusters=4, near=3)
    whole = method.attend(problem)
    part = sa.AttentionProblem(
        problem.q[:t], problem.k[:t], problem.values[:t], scale=problem.scale, causal=True
    )
    assert np.abs(method.attend(part) - whole[:t]).max() <= 1e-5


# --- N6: the frozen second order ----------------------------------------------------------------


def phi(sigma: Array, m: int) -> Array:
    """Return the second-order term, natural, as kernels compute it from bits."""
    f = frozen_from(np.array(m)) * np.log(2)
    u = sigma**2 / 2
    return np.where(u <= f, u, 2 * np.sqrt(f * u) - f)


@pytest.mark.parametrize("m", [1, 2, 8, 32, 64])
def test_the_second_order_is_smooth_and_below_its_parabola(m: int) -> None:
    sigma = np.linspace(0, 12, 4001)
    values, s = phi(sigma, m), float(expected_maximum(np.array(m)))
    step = sigma[1]
    assert (values <= sigma**2 / 2 + 1e-12).all()
    assert np.diff(values).min() >= -1e-12
    slope = np.diff(values) / step
    assert np.abs(np.diff(slope)).max() <= 2 * step  # the slope is sigma up to s, then s
    if m == 1:
        assert not values.any()
    beyond = sigma > s
    assert np.abs(values[beyond] - (s * sigma[beyond] - s * s / 2)).max() <= 1e-12


@pytest.mark.statistical
@pytest.mark.parametrize("m", [8, 32, 64])
def test_the_second_order_is_near_that_of_normal_logits(m: int, global_random_seed: int) -> None:
    rng = np.random.default_rng(global_random_seed)
    for sigma in (0.5, 1.0, 2.0, 4.0, 6.0, 10.0):
        draws = sigma * rng.standard_normal((2000, m))
        top = draws.max(axis=1)
        mean = (top + np.log(np.exp(draws - top[:, None]).mean(axis=1))).mean()
        difference = float(phi(np.array(sigma), m) - mean)
        # Means of 2000 have an error of sigma/40 at most: five of them beside the window.
        assert -0.05 - sigma / 8 <= difference <= 1.3 + sigma / 8


# --- N7: threads --------------------------------------------------------------------------------


@pytest.mark.threads
@pytest.mark.parametrize("options", [{"causal": True}, {"regions": "blocks"}, {"regions": "all"}])
def test_the_same_bits_for_any_number_of_threads(options: dict[str, Any]) -> None:
    causal = bool(options.get("causal"))
    problem = make_problem(700, 700, np.float32, d=8, causal=causal)
    given = {k: v for k, v in options.items() if k != "causal"}
    method = sa.NearFar(block=64, clusters=4, near=4, first_order=1, **given)
    results = []
    for threads in (1, 2, 4):
        with limit_threads(threads):
            ahat = matrix(method, problem)
            results.append(
                (method.attend(problem), ahat.T @ problem.values, ahat.to_dense(), ahat.near)
            )
    for other in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(results[0], other, strict=True))


# --- N8, N9, N10: real heads --------------------------------------------------------------------


def real(name: str, causal: bool) -> list[sa.AttentionProblem]:
    path = SHARED / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [
        sa.AttentionProblem(p.q, p.k, p.v, scale=p.scale, causal=causal)
        for p in sa.read_heads(path)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "causal"), [("bytelm_n4096", True), ("minilm_n4096_interp", False)]
)
def test_the_estimate_of_the_error_is_within_its_factors(name: str, causal: bool) -> None:
    method = sa.NearFar(
        block=256, clusters=8, near=16, tau=0.03, first_order=0, regions="blocks", metric="query"
    )
    for problem in real(name, causal):
        ahat = matrix(method, problem)
        found = np.linalg.norm(ahat @ problem.values - problem.output)
        true = float(found / np.linalg.norm(problem.output))
        assert 0.5 <= ahat.estimated_error(problem.values) / true <= 3


def test_the_estimate_is_its_formula() -> None:
    problem = make_problem(29, 29)
    ahat = matrix(sa.NearFar(block=8, clusters=3, near=2, tau=0.02, regions="blocks"), problem)
    m, dense, total = ahat.moments, ahat.to_dense(), 0.0
    for c, (low, high) in enumerate(zip(m.starts[:-1], m.starts[1:], strict=True)):
        members = m.members[low:high]
        k, v = problem.k[members], problem.values[members]
        spread = ((v - v.mean(axis=0)) ** 2).sum() / max(len(v), 1)
        for i in range(29):
            own = i // 8 * 3 <= c < i // 8 * 3 + 3
            if c in ahat.near[i] or own or high == low:
                continue
            sigma2 = (problem.scale * problem.q[i]) ** 2 @ k.var(axis=0)
            total += dense[i, members].sum() ** 2 * sigma2 * spread
    wanted = total**0.5 / np.linalg.norm(dense @ problem.values)
    assert ahat.estimated_error(problem.values) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("mode", ["blocks", "all"])
def test_the_error_falls_with_the_near_clusters(mode: str) -> None:
    problem = sa.load_heads("minilm")[2]
    errors = [
        error(sa.NearFar(block=64, clusters=4, near=p, tau=0, regions=mode), problem)
        for p in (0, 4, 8, 16, 32)
    ]
    for before, after in zip(errors[:-1], errors[1:], strict=True):
        assert after <= 1.05 * before + 1e-6
    assert errors[2] < errors[0] / 2


METRIC: dict[str, Any] = {"regions": "blocks", "metric": "query"}
GOLDEN: list[tuple[str, bool, dict[str, Any], str]] = [
    ("bytelm_n4096", True, {"near": 0}, ".1271 .1786 .1289 .0714 .5168 .0959 .1031 .2830"),
    (
        "bytelm_n4096", True, {"near": 8, "tau": 0},
        ".0483 .0605 .0076 .0032 .1172 .0150 .0136 .0216",
    ),
    (
        "bytelm_n4096", True, {"near": 16, "tau": 0.01},
        ".0408 .0492 .0057 .0039 .0614 .0108 .0092 .0246",
    ),
    (
        "bytelm_n4096", True, {"clusters": 4, "near": 8, "tau": 0.03},
        ".0620 .0658 .0103 .0068 .1048 .0278 .0298 .0792",
    ),
    (
        "minilm_n4096_interp", False, {"near": 0, **METRIC},
        ".2392 .1992 .1209 .1023 .1171 .1938",
    ),
    (
        "minilm_n4096_interp", False, {"near": 16, "tau": 0.01, **METRIC},
        ".1270 .0641 .0218 .0579 .0518 .1263",
    ),
    (
        "minilm_n4096_interp", False, {"near": 16, "tau": 0.01, "first_order": 1, **METRIC},
        ".0985 .0558 .0204 .0464 .0406 .0796",
    ),
]  # fmt: skip
SMALL: list[tuple[int, str]] = [
    (0, ".1344 .1434 .0747 .0775 .0530 .1176 .1129 .0311 .1225 .1174 .1017 .1616"),
    (1, ".1093 .1109 .0610 .0770 .0515 .0905 .0871 .0285 .1045 .0913 .0776 .1236"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "causal", "options", "errors"), GOLDEN)
def test_errors_on_real_heads(
    name: str, causal: bool, options: dict[str, Any], errors: str
) -> None:
    method = sa.NearFar(**{"block": 256, "clusters": 8, "first_order": 0, **options})
    for problem, wanted in zip(real(name, causal), errors.split(), strict=True):
        assert error(method, problem) == pytest.approx(float(wanted), rel=0.1, abs=0.002)


@pytest.mark.parametrize(("order", "errors"), SMALL)
def test_errors_on_the_bundled_heads(order: int, errors: str) -> None:
    method = sa.NearFar(
        block=64, clusters=4, near=4, tau=0, first_order=order, regions="blocks", metric="query"
    )
    for problem, wanted in zip(sa.load_heads("minilm"), errors.split(), strict=True):
        assert error(method, problem) == pytest.approx(float(wanted), rel=0.1, abs=0.002)


# --- what is chosen -----------------------------------------------------------------------------


def test_heads_with_mass_near_their_own_position_have_blocks() -> None:
    rng = np.random.default_rng(0)
    angle = 0.3 * np.arange(256)[:, None] * 10.0 ** -np.arange(4)
    near = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    v = rng.standard_normal((256, 3))
    local = sa.AttentionProblem(4 * near, 4 * near, v, scale=1.0)
    flat = make_problem(256, 256, d=8)
    assert regions.own_share(local, 64) > 0.5
    assert abs(regions.own_share(flat, 64) - 0.25) < 0.15
    # An own block is read key by key: reads are more than clusters and near keys.
    for problem, own in ((local, True), (flat, False)):
        ahat = matrix(sa.NearFar(block=64, clusters=4), problem)
        assert bool(ahat._own().any()) == own


GIVEN: list[dict[str, Any]] = [
    {"tau": 0}, {"preset": "fast"}, {"tau": 0, "levels": 2}, {"tau": 0, "near": 2},
    {"tau": 0, "block": 4, "clusters": 2},
]  # fmt: skip


def test_the_rank_bounds_clusters_and_near_keys() -> None:
    problem = make_problem(512, 512, d=4)
    for causal in (False, True):
        head = changed(problem) if not causal else sa.AttentionProblem(
            problem.q, problem.k, problem.values, causal=True
        )  # fmt: skip
        for rank in (1, 8, 32, 40, 64, 126, 128, 256, 512):
            for given in GIVEN:
                ahat = matrix(sa.NearFar(rank=rank, **given), head)
                # Clusters differ in size: of each row what it reads counts.
                sizes = np.append(np.diff(ahat.moments.starts), 0)
                near = sizes[ahat.near].sum(axis=1)
                assert ahat.clusters.count + near.max(initial=0) <= rank
                assert ahat.effective_rank is not None
                assert ahat.effective_rank <= rank
                if given == {"tau": 0} and not causal:
                    assert ahat.effective_rank >= 0.7 * min(rank, 256)


@pytest.mark.parametrize("causal", [False, True])
def test_near_keys_within_a_rank_are_those_of_the_largest_clusters_that_fit(causal: bool) -> None:
    problem = make_problem(256, 256, causal=causal)
    ahat = matrix(sa.NearFar(rank=64, block=64, clusters=4, tau=0), problem)
    free = matrix(sa.NearFar(block=64, clusters=4, near=99, tau=0), problem)
    sizes = np.diff(ahat.moments.starts)
    # Masses of clusters, as a matrix without near keys has them.
    alone = NearFarAttention(problem, ahat.clusters, ahat.layout, 0, 0.0).to_dense()
    masses = np.stack([alone[:, ahat.clusters.labels == c].sum(axis=1) for c in range(16)], axis=1)
    fewer = 0
    for i in range(256):
        # All candidates, by the mass that the matrix gives a cluster beside others.
        left, wanted = 64 - 16, set()
        seen = [int(c) for c in free.near[i] if c >= 0]
        for c in sorted(seen, key=lambda c: -masses[i, c])[: ahat.most]:
            if sizes[c] <= left:
                wanted.add(int(c))
                left -= sizes[c]
        assert {int(c) for c in ahat.near[i] if c >= 0} == wanted
        fewer += len(wanted) < min(ahat.most, len(seen))
    assert fewer > 50  # the budget did decide


def test_what_a_rank_is_spent_on() -> None:
    def spent(n: int, rank: int, near: int | None = None, blocks: bool = True) -> Any:
        sizes = regions.Sizes(min(256, n), 8, 16)
        return tuple(regions.within_rank(n, rank, sizes, near, blocks))

    # Half for clusters where the other half holds two of them.
    assert spent(4096, 256) == (256, 8, 8, 128)
    assert spent(4096, 128) == (256, 8, 0, 0)
    assert spent(4096, 128, near=0) == (256, 8, 0, 0)
    assert spent(4096, 40) == (256, 2, 2, 8)
    assert spent(4096, 10) == (410, 1, 0, 0)
    assert spent(4096, 40, blocks=False) == (4096, 40, 0, 0)


@pytest.mark.parametrize("options", [{"regions": "blocks"}, {}, {"levels": 2}])
def test_a_row_owns_the_block_of_its_own_key_where_others_are_hidden(
    options: dict[str, Any],
) -> None:
    rng = np.random.default_rng(0)
    n, d = 256, 8
    angle = 0.3 * np.arange(n)[:, None] * 10.0 ** -np.arange(4)
    near = 4 * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    v = rng.standard_normal((n, d))
    mask = rng.random(n) < 0.8
    mask[[0, 1, n - 1]] = False
    problem = sa.AttentionProblem(near, near, v, scale=1.0, key_mask=mask)
    ahat = matrix(sa.NearFar(block=32, clusters=4, near=0, **options), problem)
    place = np.maximum(np.cumsum(mask) - 1, 0)
    kept = np.flatnonzero(mask)
    dense = ahat.to_dense()
    true = problem.exact.to_dense()
    for i in range(n):
        own = kept[place[i] // 32 * 32 : place[i] // 32 * 32 + 32]
        # Own keys are read one by one: their weights differ as the exact ones do.
        shares = dense[i, own] / true[i, own]
        assert np.allclose(shares, shares[0], rtol=1e-6, atol=0)
    error = np.linalg.norm(ahat @ v - problem.output) / np.linalg.norm(problem.output)
    whole = sa.AttentionProblem(near, near, v, scale=1.0)
    other = matrix(sa.NearFar(block=32, clusters=4, near=0, **options), whole)
    assert error < 2 * np.linalg.norm(other @ v - whole.output) / np.linalg.norm(whole.output)


def test_rows_of_long_heads_sum_to_one_in_float32() -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    q, k = (rng.standard_normal((m, 2)).astype(np.float32) for m in (3, n))
    problem = sa.AttentionProblem(q, k, np.ones((n, 1), np.float32))
    for levels in (1, 2):
        ahat = matrix(sa.NearFar(near=n, tau=0, block=4096, levels=levels), problem)
        # Every weight has a rounding or two, and the sum is formed in float64.
        sums = ahat.rows(np.arange(3)).sum(axis=1, dtype=np.float64)
        assert np.abs(sums - 1).max() < 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("preset", ["accurate", "fast"])
def test_presets_are_their_arguments(preset: str) -> None:
    problem = make_problem(200, 200)
    method = sa.NearFar(preset=preset)
    assert np.array_equal(
        method.attend(problem), sa.NearFar(**nearfar.PRESETS[preset]).attend(problem)
    )


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"block": 0}, ValueError, "block must be at least 1, got 0; it is the number of keys of a "
     "block"),
    ({"near": -1}, ValueError, "near must be at least 0, got -1; 0 reads no far key"),
    ({"clusters": 1.5}, TypeError, "clusters must be an integer, got float; 1 makes one cluster of "
     "a block"),
    ({"tau": -0.1}, ValueError, "tau must be finite and at least 0, got -0.1; 0 reads all "
     "candidates"),
    ({"block": 4, "clusters": 5}, ValueError, "clusters must be at most block = 4, got 5; lower "
     "it"),
    ({"regions": "block"}, ValueError, "regions must be one of auto, blocks, all, got 'block'; did "
     "you mean 'blocks'?"),
    ({"preset": "accurate", "near": 3}, ValueError, "near must be left at None with preset "
     "'accurate', which sets it to 16, got 3; drop one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), WRONG)
def test_parameters_out_of_range_are_refused(
    options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=message(text)):
        sa.NearFar(**options).attend(make_problem(12, 12))


def test_float64_keeps_the_choice() -> None:
    problem = make_problem(200, 200, np.float32, d=8)
    ahat = matrix(sa.NearFar(block=32, clusters=4, near=2), problem)
    wide = ahat.wide()
    assert isinstance(wide, NearFarAttention)
    assert wide.dtype == np.float64
    assert np.array_equal(wide.near, ahat.near)
    assert np.abs(wide.to_dense() - ahat.to_dense()).max() <= rounding(problem)
    assert wide.wide() is wide
    assert ahat.nbytes > problem.q.nbytes + problem.k.nbytes
    sums = np.abs(ahat.log_normalizer - wide.log_normalizer)
    assert sums.max() <= 1e3 * unit_roundoff(np.float32)


# --- products of few rows -----------------------------------------------------------------------


@kernel(dealt=True)
def few_rows(
    turn: Array, a: Array, ia: Array, b: Array, k: int, n: int, out: Array, io: Array, fresh: bool
) -> None:
    """Run `row_products` as kernels do."""
    row_products(a, ia, b, k, n, out, io, fresh)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 3), (13, 0, 9), (15, 33, 50), (6, 20, 40)])
def test_products_of_few_rows_are_products(size: tuple[int, int, int], dtype: Any) -> None:
    rows, k, n = size
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rows + 3, k + 2)), rng.standard_normal((k + 1, n + 4))
    out = rng.standard_normal((rows + 5, n + 1))
    a, b, out = (x.astype(dtype) for x in (a, b, out))
    ia, io = rng.permutation(rows + 3)[:rows], rng.permutation(rows + 5)[:rows]
    turn = np.array([0, 1])
    size_of = np.abs(a[ia, :k]) @ np.abs(b[:k, :n])
    for fresh in (True, False):
        wanted = out.astype(np.float64)
        product = a[ia, :k].astype(np.float64) @ b[:k, :n].astype(np.float64)
        wanted[io, :n] = product if fresh else wanted[io, :n] + product
        found = out.copy()
        few_rows(turn, a, ia, b, k, n, found, io, fresh)
        bound = (k + 2) * 2 * unit_roundoff(dtype) * (size_of + np.abs(wanted[io, :n]))
        assert (np.abs(found - wanted)[io, :n] <= bound).all()
        found[io, :n], wanted[io, :n] = 0, 0
        assert np.array_equal(found, wanted.astype(dtype))
    # A row has the same bits alone.
    together, alone = out.copy(), out.copy()
    few_rows(turn, a, ia, b, k, n, together, io, True)
    for p in range(rows):
        few_rows(turn, a, ia[p : p + 1], b, k, n, alone, io[p : p + 1], True)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_one_key_head_share_its_clusters(
    causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 6, 90, 8), dtype=np.float32)
    k, v = rng.standard_normal((2, 2, 3, 90, 8), dtype=np.float32)
    mask = rng.random((2, 90)) < 0.8 if masked else None
    made: list[int] = []
    def counted(*arguments: Any) -> Any:
        made.append(1)
        return regions.in_blocks(*arguments)

    monkeypatch.setattr(nearfar, "in_blocks", counted)
    method = sa.NearFar(block=16, clusters=4, near=2, regions="blocks")
    out = sa.attention(q, k, v, method, causal=causal, key_mask=mask, enable_gqa=True)
    assert len(made) == (6 if causal else 12)
    for b in range(2):
        for h in range(6):
            kept = None if mask is None else mask[b]
            alone = sa.AttentionProblem(
                q[b, h], k[b, h // 2], v[b, h // 2], causal=causal, key_mask=kept
            )
            assert np.array_equal(out[b, h], method.attend(alone))
