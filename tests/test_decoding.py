"""States of a decoder: steps are the rows of the causal output, whatever was appended and when."""

from __future__ import annotations

import copy
import pickle
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from method_cases import dense_attention, make_problem, rounding, unit_roundoff
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn.kernels._threads import deal, limit_threads
from sketchattn.kernels.decoding import exact_rows
from sketchattn.operators.steep import steep_rows
from sketchattn.zoo.nearfar import method as nearfar
from sketchattn.zoo.nearfar.regions import Sizes
from sketchattn.zoo.nearfar.state import NearFarState

Array = NDArray[Any]
PRECISIONS = [np.float32, np.float64]
# Between a step and its row there are sums in another order; logits are of size 10.
TOLERANCES = {np.float32: 1e-5, np.float64: 1e-12}
B = 128

pytestmark = pytest.mark.usefixtures("one_thread")


def prefix(problem: sa.AttentionProblem, n: int) -> sa.AttentionProblem:
    """Return the prompt of the first n positions."""
    return sa.AttentionProblem(
        *(x[:n] for x in (problem.q, problem.k, problem.values)), scale=problem.scale, causal=True
    )


def steps(
    state: sa.DecodingState, problem: sa.AttentionProblem, chunk: int = 1, stop: int | None = None
) -> Array:
    """Return the rows of all positions that a state has not seen, appended ``chunk`` at a time."""
    rows = []
    n = problem.n_q if stop is None else stop
    for low in range(len(state), n, chunk):
        high = min(low + chunk, n)
        state.append(problem.k[low:high], problem.values[low:high])
        rows.append(state.attend(problem.q[low:high]))
    return np.concatenate(rows) if rows else np.zeros((0, problem.values.shape[1]))


def small(**options: Any) -> sa.NearFar:
    return sa.NearFar(**{"block": 8, "clusters": 3, "near": 2, **options})


# --- steps are rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("second_order", nearfar.SECOND_ORDERS)
@pytest.mark.parametrize("first_order", [0, 1])
@pytest.mark.parametrize("n", [1, B - 1, B, B + 1, 1025])
def test_a_loop_of_single_steps_is_the_causal_output(
    n: int, first_order: int, second_order: str, dtype: Any
) -> None:
    problem = make_problem(n, n, dtype, d=8, causal=True)
    method = sa.NearFar(
        block=B, clusters=8, near=4, first_order=first_order, second_order=second_order
    )
    state = method.state(prefix(problem, 0))
    out = np.empty_like(problem.values)
    for i in range(n):
        state.append(problem.k[i], problem.values[i])
        out[i] = state.attend(problem.q[i])
    assert len(state) == n
    assert np.abs(out - method.attend(problem)).max() <= TOLERANCES[dtype]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"near": 0}, {"near": 99, "tau": 0}, {"first_order": 2}, {"clusters": 8}],
    ids=str,
)
def test_small_states_are_their_causal_output(options: dict[str, Any], dtype: Any) -> None:
    problem = make_problem(45, 45, dtype, causal=True)
    method = small(**options)
    whole = method.attend(problem)
    for prompt in (0, 5, 8, 21):
        rows = steps(method.state(prefix(problem, prompt)), problem)
        assert np.abs(rows - whole[prompt:]).max() <= TOLERANCES[dtype]
    if options.get("near") == 99:
        assert np.abs(whole - problem.output).max() <= rounding(problem)


@pytest.mark.parametrize(
    "options",
    [{"tau": 0.0}, {"preset": "fast"}, {"near": 40, "tau": 0.001}, {"clusters": 16, "near": 1}],
    ids=str,
)
def test_long_states_are_their_causal_output(options: dict[str, Any]) -> None:
    heads = sa.load_heads("minilm")
    q, k, v = (np.concatenate([getattr(heads[h], x) for h in range(6)]) for x in "qkv")
    problem = sa.AttentionProblem(q, k, v, causal=True)
    method = sa.NearFar(block=256, **options)
    state = method.state(prefix(problem, 2500))
    rows = steps(state, problem)
    assert np.abs(rows - method.attend(problem)[2500:]).max() <= 1e-5 * np.abs(v).max()


class Eager(NearFarState):
    """Cluster blocks before they are complete: those of half the length."""

    def __init__(self, problem: sa.AttentionProblem, sizes: Sizes, *rest: Any) -> None:
        super().__init__(problem, sizes._replace(block=sizes.block // 2), *rest)


class Forgetful(NearFarState):
    """Read the complete blocks alone, and forget the keys of the last one."""

    def _attend(self, q: Array, stops: Array, most: float, out: Array) -> None:
        whole = stops // self.sizes.block * self.sizes.block
        super()._attend(q, np.where(whole > 0, whole, stops), most, out)


@pytest.mark.parametrize("wrong", [Eager, Forgetful])
def test_a_state_that_is_wrong_is_found(
    wrong: type[NearFarState], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(300, 300, d=8, causal=True)
    method = sa.NearFar(block=64, clusters=4, near=2)
    whole = method.attend(problem)
    assert np.abs(steps(method.state(prefix(problem, 0)), problem) - whole).max() <= 1e-12
    monkeypatch.setattr(nearfar, "NearFarState", wrong)
    assert np.abs(steps(method.state(prefix(problem, 0)), problem) - whole).max() > 1e-2


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("method", [sa.Exact(), small(), small(first_order=1)], ids=str)
def test_chunks_and_prompts_do_not_matter(method: sa.Method, dtype: Any) -> None:
    problem = make_problem(61, 61, dtype, causal=True)
    whole = method.attend(problem)
    found = []
    for prompt in (0, 7, 16, 60, 61):
        for chunk in (1, 3, 8, 61):
            state = method.state(prefix(problem, prompt))
            rows = steps(state, problem, chunk)
            assert np.abs(rows - whole[prompt:]).max(initial=0) <= TOLERANCES[dtype]
            found.append(state.attend(problem.q))
            assert np.abs(found[-1] - whole).max() <= TOLERANCES[dtype]
            # The same steps are the same bits.
            again = method.state(prefix(problem, prompt))
            assert np.array_equal(steps(again, problem, chunk), rows)
    # What is held at the end is the same, however it came.
    assert all(np.array_equal(x, found[0]) for x in found)


@pytest.mark.parametrize("method", [sa.Exact(), small(near=1, tau=0)], ids=str)
@pytest.mark.parametrize("causal", [True, "bottom-right", "top-left"])
def test_keys_that_the_prompt_removes_stay_removed(method: sa.Method, causal: Any) -> None:
    n, t = 61, 41
    mask = np.arange(n) % 3 > 0
    mask[t:] = True  # the first position has no key, and what is appended is there
    problem = make_problem(n, n, causal=True, key_mask=mask)
    n_q = t if causal is True else 5
    prompt = sa.AttentionProblem(
        problem.q[:n_q], problem.k[:t], problem.values[:t], causal=causal, key_mask=mask[:t]
    )
    whole = method.attend(problem)
    state = method.state(prompt)
    assert len(state) == t
    assert np.abs(state.attend(problem.q[:t]) - whole[:t]).max() <= 1e-12
    assert np.abs(steps(state, problem) - whole[t:]).max() <= 1e-12
    out = state.attend(problem.q)
    assert np.abs(out - whole).max() <= 1e-12
    assert not out[0].any()
    nothing = method.state(sa.AttentionProblem(*problem, causal=True, key_mask=np.zeros(n, bool)))
    assert not nothing.attend(problem.q).any()


@pytest.mark.parametrize("method", [sa.Exact(), small()], ids=str)
def test_query_heads_share_the_keys_of_one_head(method: sa.Method) -> None:
    problem = make_problem(30, 30, causal=True)
    state = method.state(prefix(problem, 30))
    q = np.random.default_rng(1).standard_normal((2, 3, 5, 4))
    out = state.attend(q)
    assert out.shape == (2, 3, 5, 3)
    for h in np.ndindex(2, 3):
        assert np.array_equal(out[h], state.attend(q[h]))
    # Four heads at one position.
    grouped = state.attend(q[0, 0, :4][:, None])
    assert grouped.shape == (4, 1, 3)
    assert np.array_equal(grouped[2, 0], state.attend(q[0, 0, 2]))
    assert state.attend(np.zeros((0, 5, 4))).shape == (0, 5, 3)


# --- the exact state ----------------------------------------------------------------------------


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_rows_of_the_exact_state_are_exact(n: int, dtype: Any) -> None:
    problem = make_problem(n, n, dtype, causal=True)
    rows = steps(sa.Exact().state(prefix(problem, 0)), problem)
    wanted = dense_attention(problem) @ problem.values.astype(np.float64)
    assert np.abs(rows - wanted).max() <= rounding(problem)


def test_many_keys_of_the_exact_state_are_folded_in_pieces() -> None:
    problem = make_problem(1300, 1300, np.float32, d=8, causal=True)
    state = sa.Exact().state(prefix(problem, 1300))
    assert np.abs(state.attend(problem.q[-9:]) - problem.output[-9:]).max() <= 1e-5
    # The largest logit comes last, and first.
    for order in (1, -1):
        k = np.ones((1300, 1), np.float32) * np.linspace(-300, 300, 1300, dtype=np.float32)[:, None]
        head = sa.AttentionProblem(
            np.ones((1300, 1), np.float32), k[::order].copy(), k[::order].copy(), scale=1.0,
            causal=True,
        )  # fmt: skip
        row = sa.Exact().state(head).attend(head.q[-1])
        assert np.abs(row - head.output[-1]).max() <= 1e-4 * 300


# --- large logits -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 0.005])
def test_large_logits_are_right(scale: float) -> None:
    rng = np.random.default_rng(0)
    q, k = (100 * rng.standard_normal((2, 300, 4))).astype(np.float32)
    v = rng.standard_normal((300, 3)).astype(np.float32)
    problem = sa.AttentionProblem(q, k, v, scale=scale, causal=True)
    method = sa.NearFar(block=64, clusters=4, near=3, tau=0)
    rows = steps(method.state(prefix(problem, 0)), problem)
    assert np.isfinite(rows).all()
    seen = np.maximum.accumulate(v, axis=0) + 1e-5
    assert (rows <= seen).all()
    # Logits carry d + 4 roundings of terms up to the largest one, an output twice what they do.
    # A few rows may choose another cluster by them.
    largest = scale * float(np.abs(q @ k.T).max())
    unit = 2 * 8 * unit_roundoff(np.float32) * float(np.abs(v).max())
    error = np.abs(rows - method.attend(problem)).max(axis=1)
    assert np.quantile(error, 0.99) <= 2 * unit * (1 + largest)
    wide = problem.astype(np.float64)
    # The exact state has float64 for rows whose logits exceed 4096.
    exact = steps(sa.Exact().state(prefix(problem, 0)), problem)
    assert np.abs(exact - wide.output).max() <= unit * (1 + min(largest, 4096))
    steep = steep_rows(problem)
    assert (len(steep) > 0) == (scale == 0.5)
    assert np.abs(exact - wide.output)[steep].max(initial=0) <= unit
    found = steps(method.state(prefix(wide, 0)), wide)
    assert np.abs(found - method.attend(wide)).max() <= 1e-9


@pytest.mark.parametrize("method", [sa.Exact(), small()], ids=str)
def test_logits_beyond_the_precision_are_refused(method: sa.Method) -> None:
    k = np.ones((20, 2), np.float32)
    state = method.state(sa.AttentionProblem(k, k, k, scale=1.0, causal=True))
    state.append(np.full(2, 1e20, np.float32), k[0])
    # Far below and far above one: neither is mistaken.
    assert np.array_equal(state.attend(np.full(2, 1e-35, np.float32)).shape, (2,))
    text = "scale * q @ k.T must be finite in float32, got an overflow in row (1,); make scale,"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        state.attend(np.array([[1e-20, 1e-20], [1e20, 1e20]], np.float32))
    state = method.state(sa.AttentionProblem(k, k, k, scale=1.0, causal=True))
    assert np.array_equal(state.attend(np.full(2, 1e19, np.float32)), k[0])


# --- what is held -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [sa.Exact(), small()], ids=str)
@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(method: sa.Method, through: Callable[[Any], Any]) -> None:
    problem = make_problem(40, 40, causal=True)
    state = method.state(prefix(problem, 21))
    other = through(state)
    assert type(other) is type(state)
    assert repr(other) == repr(state)
    other.append(np.ones((9, 4)), np.ones((9, 3)))
    assert (len(state), len(other)) == (21, 30)
    rows = steps(state, problem)
    assert np.array_equal(steps(through(method.state(prefix(problem, 21))), problem), rows)
    assert np.abs(rows - method.attend(problem)[21:]).max() <= 1e-12


@pytest.mark.parametrize("method", [sa.Exact(), sa.NearFar(block=64, clusters=8)], ids=str)
def test_memory_grows_with_the_keys_alone(method: sa.Method) -> None:
    problem = make_problem(3000, 3000, np.float32, d=16, causal=True)
    state = method.state(prefix(problem, 0))
    for i in range(3000):
        state.append(problem.k[i], problem.values[i])
        state.attend(problem.q[i])
        # A cluster of 8 keys has a mean key, variances, a mean value and a few numbers, less than
        # half as much again; there is room for twice as many, and for a few panels at first.
        held = (i + 1) * 4 * (16 + 3)
        assert state.nbytes <= 3 * held + 100_000
    assert state.nbytes >= 3000 * 4 * (16 + 3)
    tracemalloc.start()
    try:
        state.attend(problem.q[-1])
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            state.attend(problem.q[-1])
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before <= 2000


def test_defaults_are_those_of_the_expected_length() -> None:
    def sizes(length: int | None = None, n: int = 1, **options: Any) -> tuple[int, ...]:
        problem = make_problem(n, n, d=2, causal=True)
        state = sa.NearFar(**options).state(problem, length)
        assert isinstance(state, NearFarState)
        return (*state.sizes[:3], int(1000 * state.tau))

    assert sizes() == sizes(4096) == (256, 16, 32, 3)
    assert sizes(65536) == (1024, 16, 128, 3)
    assert sizes(n=16384) == sizes(1, n=16384) == (512, 16, 64, 3)
    assert sizes(1) == (4, 4, 1, 3)
    assert sizes(block=128) == (128, 8, 16, 10)  # as the method itself
    assert sizes(block=4) == (4, 4, 16, 10)
    fast = nearfar.PRESETS["fast"]
    wanted = {"clusters": 16, "near": 32, "tau": 0.003, **fast}
    assert sizes(preset="fast") == (
        256, wanted["clusters"], wanted["near"], int(1000 * wanted["tau"])
    )  # fmt: skip
    assert sizes(near=5, tau=0.5) == (256, 16, 5, 500)
    assert sizes(rank=256, block=256, clusters=8) == (256, 8, 8, 10)
    assert sizes(rank=256)[1:3] == (8, 8)


@pytest.mark.threads
@pytest.mark.parametrize("method", [sa.Exact(), small(first_order=1)], ids=str)
def test_rows_have_the_same_bits_for_any_number_of_threads(method: sa.Method) -> None:
    problem = make_problem(90, 90, np.float32, causal=True)
    found = []
    for threads in (1, 2, 4):
        with limit_threads(threads):
            found.append(method.state(prefix(problem, 90)).attend(problem.q))
    assert all(np.array_equal(x, found[0]) for x in found)
    state = method.state(prefix(problem, 90))
    assert np.array_equal(state.attend(problem.q[-1]), found[0][-1])


@pytest.mark.interpreted
def test_the_kernel_reads_as_many_keys_as_a_row_sees() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 9, 4))
    stops = np.array([0, 4, 9, 1, 5, 7, 2, 8, 3])
    out = np.full((9, 4), np.nan)
    deal(exact_rows, q, stops, k, v, 0.5 * np.log2(np.e), out, work=0)
    for row, stop, x in zip(out, stops, q, strict=True):
        weights = np.exp(0.5 * k[:stop] @ x)
        wanted = weights @ v[:stop] / weights.sum() if stop else np.zeros(4)
        assert np.abs(row - wanted).max() <= 1e-14


# --- refusals -----------------------------------------------------------------------------------

Call = Callable[[sa.DecodingState], object]
WRONG: list[tuple[Call, type[Exception], str]] = [
    (lambda s: s.append(np.ones(4), np.ones(4)), ValueError,
     "v must have shape (3,) or (t, 3), got (4,); a state is of one key head"),
    (lambda s: s.append(np.ones((1, 2, 4)), np.ones((1, 2, 3))), ValueError,
     "k must have shape (4,) or (t, 4), got (1, 2, 4); a state is of one key head"),
    (lambda s: s.append(np.ones((2, 4)), np.ones((1, 3))), ValueError,
     "v must have one row for each key, got k of shape (2, 4) and v of (1, 3); append both of the "
     "same positions"),
    (lambda s: s.append(np.ones(4), np.ones((1, 3))), ValueError,
     "v must have one row for each key, got k of shape (4,) and v of (1, 3); append both of the "
     "same positions"),
    (lambda s: s.append(np.ones(4, np.float32), np.ones(3)), TypeError,
     "k must have the precision of the state, float64, got float32; convert it with astype"),
    (lambda s: s.append(np.ones(4, int), np.ones(3)), TypeError,
     "k must be float16, bfloat16, float32 or float64, got int64; convert it with "
     "astype(np.float32)"),
    (lambda s: s.append(np.ones(4), np.array([1, np.nan, 2])), ValueError,
     "v must be finite, got nan at index (1,); replace it, or hide its key with a mask"),
    (lambda s: s.append(np.array([1, 2, 3, np.inf]), np.ones(3)), ValueError,
     "k must be finite, got inf at index (3,); replace it, or hide its key with a mask"),
    (lambda s: s.attend(np.ones(3)), ValueError,
     "q must have shape (4,), (t, 4) or (..., t, 4), got (3,); a state is of one key head"),
    (lambda s: s.attend(np.float64(3)), ValueError,
     "q must have shape (4,), (t, 4) or (..., t, 4), got (); a state is of one key head"),
    (lambda s: s.attend(np.ones((6, 4))), ValueError,
     "q must have at most one row for each of the 5 positions, got 6; append the keys first"),
    (lambda s: s.attend(np.array([1, np.nan, 2, 3])), ValueError,
     "q must be finite, got nan at index (1,); replace it, or hide its key with a mask"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), WRONG)
def test_wrong_rows_are_refused_and_nothing_is_added(
    call: Call, kind: type[Exception], text: str
) -> None:
    problem = make_problem(5, 5, causal=True)
    for method in (sa.Exact(), small()):
        state = method.state(problem)
        before = state.attend(problem.q)
        with pytest.raises(kind, match=f"^{re.escape(text)}$"):
            call(state)
        assert len(state) == 5
        assert np.array_equal(state.attend(problem.q), before)


def test_every_method_holds_keys_where_its_traits_say_so() -> None:
    problem = make_problem(6, 6, causal=True)
    names = []
    for name, cls in sa.methods().items():
        method = cls(**({"rank": 3} if "rank" in cls._get_param_names() else {}))
        if method.traits.decoding:
            assert len(method.state(problem)) == 6
            names.append(name)
        else:
            with pytest.raises(ValueError, match=r"^method must hold keys of a decoder, got"):
                method.state(problem)
        # What holds another method inside has no state of its own.
        if "inner" in cls._get_param_names():
            assert not cls(rank=3, inner=sa.NearFar()).traits.decoding
    assert {"exact", "nearfar"} <= set(names)


def test_prompts_that_are_none_are_refused() -> None:
    problem = make_problem(5, 5, causal=True)

    def refused(
        method: sa.Method,
        given: Any,
        text: str,
        length: Any = None,
        kind: type[Exception] = ValueError,
    ) -> None:
        with pytest.raises(kind, match=f"^{re.escape(text)}"):
            method.state(given, length)

    refused(
        sa.VMean(), problem, "method must hold keys of a decoder, got VMean(); use a method whose "
        "traits.decoding is True",
    )  # fmt: skip
    refused(
        small(), make_problem(5, 5), "causal must be True for the prompt of a decoder, got False; "
        "make the problem with causal=True",
    )  # fmt: skip
    keys = sa.AttentionProblem(problem.q, problem.k, causal=True)
    refused(small(), keys, "v must be given for an output, got None")
    refused(small(), problem, "length must be at least 1, got 0; it is the number of positions", 0)
    refused(small(), None, "problem must be an AttentionProblem, got NoneType", kind=TypeError)
    refused(small(near=-1), problem, "near must be at least 0, got -1")
    refused(small(levels=2), problem, "levels must be None or 1 for a decoder, got 2")
    refused(sa.NearFar(tolerance=0.1), problem, "tolerance must be None for a decoder")
    refused(sa.NearFar(rank=5000), problem, "rank must be", 4000)
    sa.NearFar(rank=64).state(problem)  # more than the prompt has


def test_halves_are_computed_in_float32() -> None:
    problem = make_problem(9, 9, np.float16, causal=True)
    state = small().state(prefix(problem, 4))
    assert state.dtype == np.float32
    low, high = slice(4, 9), slice(7, 9)
    k, v, q = (x.astype(np.float16) for x in (problem.k[low], problem.values[low], problem.q[high]))
    state.append(k, v)
    assert np.abs(state.attend(q) - small().attend(problem)[high]).max() <= 1e-5


def test_methods_with_a_state_say_so() -> None:
    named = {x for x in sa.methods() if hasattr(sa.methods()[x], "_state")}
    assert named == set(sa.methods())
    own = {x for x, cls in sa.methods().items() if cls._state is not sa.Method._state}
    assert own == {"exact", "nearfar"}
