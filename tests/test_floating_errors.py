"""No public function raises or warns by a floating-point exception for input that it accepts."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_cases import CASES, IDS, MethodCase, make_problem, supports
from numpy.typing import NDArray

import sketchattn as sa
from sketchattn import compression, perturbation, sampling
from sketchattn.base.floating import without_floating_errors
from sketchattn.heads.families import FAMILIES
from sketchattn.kernels._threads import limit_threads, map_pieces
from sketchattn.sketches import make_sketch, sketches

Array = NDArray[Any]

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"key_mask": np.arange(8) > 5}]


def peaked(dtype: Any, **options: Any) -> sa.AttentionProblem:
    """Return a problem with logits of some hundreds: most exponentials underflow."""
    q, k, v = (np.array(x) for x in make_problem(8, 8, dtype))
    return sa.AttentionProblem(30 * q, 30 * k, v, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_methods_under_any_errstate(case: MethodCase, dtype: Any) -> None:
    for options in MASKS:
        problem = peaked(dtype, **options)
        if not supports(case, problem):
            continue
        method, y = case(3), np.ones((8, 2), dtype)
        with np.errstate(all="ignore"):
            wanted = method.approximate(peaked(dtype, **options), rng=0)
            dense, product, back = wanted.to_dense(), wanted @ problem.values, wanted.T @ y
        with np.errstate(all="raise"):
            assert method.traits.target
            draw = method.draw(problem, rng=0)
            ahat = method.approximate(problem, draw=draw)
            assert np.array_equal(ahat.to_dense(), dense)
            assert np.array_equal(ahat @ problem.values, product)
            assert np.array_equal(ahat.T @ y, back)
            assert np.isfinite(ahat.row_sums()).all()
            ahat.wide()
            ahat.columns([1])
            method.attend(problem, rng=0)
            method.attend_heads([problem, problem], [0, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_problems_and_attention_under_any_errstate(dtype: Any) -> None:
    for options in MASKS:
        with np.errstate(all="raise"):
            problem = peaked(dtype, **options)
            assert np.isfinite(problem.output).all()
            exact = problem.exact
            assert np.isfinite(exact.row_norms()).all()
            assert np.isfinite(exact.column_norms()).all()
            assert np.isfinite(exact.frobenius_norm())
            assert np.isfinite(exact.columns([0])).all()
            sa.attention(*problem, **options)
            for law in sampling.LAWS:
                p = sampling.probabilities(law, problem, rng=0, pilots=3)
                assert abs(p.sum() - 1) <= 1e-12
                sampling.sample_columns(p, 3, 0, replace=True)
                sampling.sample_gumbel(p, 3, 0)


@pytest.mark.parametrize("kind", sketches())
def test_sketches_under_any_errstate(kind: str) -> None:
    tiny = np.full((12, 2), 5e-324)
    with np.errstate(all="raise"):
        sketch = make_sketch(kind, 4, 12, rng=0)
        assert np.isfinite(sketch @ tiny).all()
        assert np.isfinite(sketch.T @ tiny[:4]).all()
        sketch.to_dense()


# --- everything that is public, on extreme input ------------------------------------------------


def problem_of(size: float, dtype: Any, **options: Any) -> sa.AttentionProblem:
    """Return a head of 12 tokens with logits and values of about a size."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 12, 4))
    root = np.sqrt(size)
    return sa.AttentionProblem(*((x * root).astype(dtype) for x in (q, k, v)), **options)


# Logits of half their range in powers of ten, where single precision still has them.
SIZES = {np.float32: (1e-60, 1e30), np.float64: (1e-320, 1e280)}
INPUTS: dict[str, Callable[[Any], sa.AttentionProblem]] = {
    "zeros": lambda dtype: problem_of(0.0, dtype),
    "tiny": lambda dtype: problem_of(SIZES[dtype][0], dtype),
    "huge": lambda dtype: problem_of(SIZES[dtype][1], dtype),
    "causal": lambda dtype: problem_of(1e6, dtype, causal=True),
    "one key": lambda dtype: problem_of(1e6, dtype, key_mask=np.arange(12) == 5),
}


def use(made: Any) -> None:
    """Look at a result: operators and sketches compute when they are asked."""
    if isinstance(made, sa.AttentionOperator):
        made.to_dense()
        made.row_sums()
        made.T @ np.ones((made.shape[0], 2), made.dtype)
        str(made)
    else:
        str(made)


def logits_of(p: sa.AttentionProblem) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(p.q.astype(np.float64) @ p.k.astype(np.float64).T)


def files(p: sa.AttentionProblem) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.npz", "a.safetensors"):
            sa.write_heads(Path(folder, name), p)
            found = sa.read_heads(Path(folder, name))
        return found.description, len(found), found[0].digest


def layer(p: sa.AttentionProblem, block: bool) -> Any:
    names = {x: (4, 4) for x in ("pq", "q", "pk", "k", "pv", "v", "out", "len")}
    maps: dict[str, Any] = {f"w_{x}": np.resize(p.k, shape).copy() for x, shape in names.items()}
    maps |= {f"b_{x}": np.zeros(4, p.dtype) for x in names}
    ones, zeros = np.ones(4, p.dtype), np.zeros(4, p.dtype)
    weights = sa.DBAWeights(**maps, ln_g=ones, ln_b=zeros)
    if not block:
        return sa.dba_layer(p.q, p.values[:2], weights, heads=2)
    rest = sa.DBABlockWeights(
        w_1=np.eye(4, dtype=p.dtype), b_1=zeros, w_2=np.eye(4, dtype=p.dtype), b_2=zeros,
        ln1_g=ones, ln1_b=zeros, ln2_g=ones, ln2_b=zeros,
    )  # fmt: skip
    return sa.dba_block(p.q, p.values[:2], weights, rest, heads=2)


def kernel(p: sa.AttentionProblem) -> Any:
    return sampling.ExponentialKernel(p.k, p.scale)


def even(_: sa.AttentionProblem) -> Array:
    return np.array([5e-324, *[1.0 / 11] * 11])


def decoder(p: sa.AttentionProblem) -> Any:
    head = sa.AttentionProblem(p.q, p.k, p.values, scale=p.scale, causal=True)
    found = []
    for method in (sa.Exact(), sa.NearFar(block=4, clusters=2, first_order=1)):
        state = method.state(head)
        state.append(p.k[0], p.values[0])
        found += [state.attend(p.q), state.attend(p.q[0])]
    return found


CALLS: dict[str, Callable[[sa.AttentionProblem], Any]] = {
    "attention": lambda p: sa.attention(p.q, p.k, p.v, return_lse=True),
    "attention_vjp": lambda p: sa.attention_vjp(p.q, p.k, p.v, p.v),
    "as_convention": lambda p: sa.as_convention("flash")(
        *(x[None, :, None] for x in (p.q, p.k, p.values))
    ),
    "certify": lambda p: sa.certify(p, p.v, rows=4),
    "certify_rows": lambda p: sa.certify_rows(sa.Combiner(rank=3).approximate(p, rng=0)),
    "dba_block": lambda p: layer(p, True),
    "dba_layer": lambda p: layer(p, False),
    "describe": sa.describe,
    "error_report": lambda p: [
        sa.error_report(p, np.zeros((12, 12)), path=path) for path in ("dense", "streaming")
    ],
    "fit_linformer": lambda p: sa.fit_linformer(p, rank=3),
    "linformer_projections": lambda p: sa.linformer_projections(2, 2, 12, 3, rng=0),
    "load_heads": lambda p: len(sa.load_heads("minilm")),
    "make_heads": lambda p: [sa.make_heads(x, n=24, d=8, rng=0, dtype=p.dtype) for x in FAMILIES],
    "read_heads": files,
    "write_heads": files,
    "row_statistic": lambda p: [sa.row_statistic(p, x) for x in ("max_mean", "kl", "m")],
    "selection_regret": lambda p: sa.selection_regret(p, [1, 2]),
    "recommend": lambda p: sa.recommend(p, 0.5, methods=["uniform", "vmean"]).tried,
    "study": lambda p: sa.study(
        [p], methods=["uniform"], ranks=[3], seeds=1, progress=False
    ).summary(),
    "AttentionProblem": lambda p: [p.output, p.logsumexp, p.digest, p.astype(np.float64).digest],
    "Heads": lambda p: [x.digest for x in sa.Heads(p.q[None], p.k[None], p.values[None])],
    "SoftmaxAttention": lambda p: [
        p.exact.to_dense(),
        p.exact.T @ p.q,
        p.exact.row_norms(),
        p.exact.column_norms(),
        p.exact.columns([1]),
    ],
    "FactoredAttention": lambda p: sa.FactoredAttention(p.q, None, p.k.T.copy()),
    "SparseAttention": lambda p: sa.SparseAttention(
        np.arange(len(p.q) + 1), np.zeros(len(p.q), np.int64), np.abs(p.q[:, 0]), n_k=12
    ),
    "SampledAttention": lambda p: sa.SampledAttention(np.arange(4), np.abs(p.q), n_k=12),
    "PartitionedAttention": lambda p: sa.Combiner(rank=3).approximate(p, rng=0),
    "ProductSketch": lambda p: sa.ProductSketch(p, make_sketch("srht", 4, 12, rng=0)),
    "DecodingState": decoder,
    "Draw": lambda p: sa.Skeinformer(rank=3).draw(p, rng=0),
    "sampling.around": lambda p: sampling.around(p.k, p.k[:3]),
    "sampling.chosen_rows": lambda p: sampling.chosen_rows(
        p.k, 3, "leverage", np.random.default_rng(0)
    ),
    "sampling.css_relative_error": lambda p: sampling.css_relative_error(p.k.T, [0, 1], 2),
    "sampling.d_eff": lambda p: sampling.d_eff(kernel(p), 0.5),
    "sampling.fast_sketch_rows": lambda p: sampling.fast_sketch_rows(12, 3),
    "sampling.inclusion_probabilities": lambda p: sampling.inclusion_probabilities(even(p), 3),
    "sampling.kmeans": lambda p: sampling.kmeans(p.k, 3, 0),
    "sampling.leverage_approx_factor": lambda p: sampling.leverage_approx_factor(1e-300),
    "sampling.leverage_quality": lambda p: sampling.leverage_quality(even(p), even(p)),
    "sampling.leverage_scores": lambda p: sampling.leverage_scores(p.k),
    "sampling.leverage_scores_fast": lambda p: sampling.leverage_scores_fast(p.k, rng=0),
    "sampling.nearest": lambda p: sampling.nearest(p.k, p.k[:3]),
    "sampling.nystrom_factor": lambda p: sampling.nystrom_factor(kernel(p), [0, 1]),
    "sampling.pilot_rows": lambda p: sampling.pilot_rows(p, 3, 0),
    "sampling.pivoted_rows": lambda p: sampling.pivoted_rows(p.k, 3, np.random.default_rng(0)),
    "sampling.probabilities": lambda p: [
        sampling.probabilities(law, p, rng=0, pilots=3) for law in sampling.LAWS
    ],
    "sampling.ridge_leverage": lambda p: sampling.ridge_leverage(kernel(p), 0.5),
    "sampling.ridge_leverage_recursive": lambda p: sampling.ridge_leverage_recursive(
        kernel(p), 0.5, rng=0
    ),
    "sampling.ridge_psd_check": lambda p: sampling.ridge_psd_check(kernel(p), np.eye(12), 0.5),
    "sampling.sample_columns": lambda p: sampling.sample_columns(even(p), 3, 0),
    "sampling.sample_gumbel": lambda p: sampling.sample_gumbel(even(p), 3, 0),
    "sampling.sample_poisson": lambda p: sampling.sample_poisson(even(p), 3, 0),
    "sampling.sample_uniform": lambda p: sampling.sample_uniform(12, 3, 0),
    "sampling.sample_with_replacement": lambda p: sampling.sample_with_replacement(even(p), 3, 0),
    "sampling.segment_labels": lambda p: sampling.segment_labels(12, 3),
    "sampling.segment_means": lambda p: sampling.segment_means(p.k, 3),
    "sampling.self_normalize": lambda p: sampling.self_normalize(np.abs(p.k), np.ones(4)),
    "sampling.ExponentialKernel": lambda p: kernel(p).diagonal(),
    "sketches.make_sketch": lambda p: [
        make_sketch(kind, 4, 12, rng=0, dtype=p.dtype) @ p.k for kind in sketches()
    ],
    "compression.apply_compression": lambda p: compression.apply_compression(
        p, compression.fit_compression(p, 2, "svd")
    ),
    "compression.compress": lambda p: compression.compress(p.q, p.k, 2, "svd"),
    "compression.compress_problem": lambda p: compression.compress_problem(p, 2, "pca_k").output,
    "compression.draw_projection": lambda p: compression.draw_projection(4, 2, "gaussian", 0),
    "compression.fit_compression": lambda p: [
        compression.fit_compression(p, 2, kind, 0) for kind in ("svd", "pca_k", "gaussian", "srht")
    ],
    "compression.mean_key": compression.mean_key,
    "perturbation.cluster_eta_apriori": lambda p: perturbation.cluster_eta_apriori(
        p.q, p.k, keys=(p.k[:3], np.arange(12) % 3)
    ),
    "perturbation.compression_eta": lambda p: perturbation.compression_eta(
        p.q, p.k, p.q[:, :2], p.k[:, :2]
    ),
    "perturbation.kl_bound": lambda p: perturbation.kl_bound(np.abs(logits_of(p))),
    "perturbation.lipschitz_bound": lambda p: perturbation.lipschitz_bound(logits_of(p)),
    "perturbation.log_ratio_bound": lambda p: perturbation.log_ratio_bound(np.abs(logits_of(p))),
    "perturbation.logit_eta": lambda p: perturbation.logit_eta(logits_of(p)),
    "perturbation.output_bound": lambda p: perturbation.output_bound(np.full(12, 1e-300), p.v),
    "perturbation.quantization_eta": lambda p: [
        perturbation.quantization_eta(p.q, p.k, x) for x in ("bfloat16", "int8")
    ],
    "perturbation.quantize": lambda p: [
        perturbation.quantize(p.k, x) for x in ("bfloat16", "float16", "int8")
    ],
    "perturbation.tv_bound": lambda p: perturbation.tv_bound(np.abs(logits_of(p))),
    "perturbation.value_diameter": lambda p: perturbation.value_diameter(p.v),
    "theory.Instance": lambda p: sa.theory.Instance("pair", (np.abs(p.k.T), p.k)).a,
    "theory.bound": lambda p: sa.theory.bound("softmax.hull", p),
    "theory.check": lambda p: sa.theory.check("softmax.hull", p, trials=3),
    "theory.spiked_attention": lambda p: [sa.theory.spiked_attention(12, t) for t in (0.0, 1e6)],
    "theory.validate": lambda p: sa.theory.validate(
        ["softmax.hull"], heads=[p], trials=3, progress=False
    ),
    "theory.default_factory": lambda p: sa.theory.default_factory(
        "gaussian", 3, 12, np.random.default_rng(0)
    ),
}
# Tables, records and checks of what was given: there is nothing to compute.
STILL = {
    "methods", "Method", "AttentionOperator", "Traits", "register", "partitions.check_block",
    "partitions.check_labels", "partitions.block_of_rank", "partitions.default_block",
    "partitions.label_plan", "partitions.make_plan", "sampling.check_probabilities",
    "sampling.check_unbiased", "sketches.check_sketch", "sketches.sketches",
    "compression.check_center", "compression.check_kind", "compression.check_width_in",
    "compression.largest_width", "theory.claim", "theory.claims", "theory.instance",
    "theory.instances", "theory.error_bounds", "theory.bound_claim",
}  # fmt: skip


def public_names() -> set[str]:
    """Return all functions, and the classes that compute, with the room that they are in."""
    found = set()
    for room in (sa, sampling, sa.sketches, sa.partitions, compression, perturbation, sa.theory):
        prefix = "" if room is sa else room.__name__.rpartition(".")[2] + "."
        names = getattr(room, "__all__", None) or [x for x in dir(room) if not x.startswith("_")]
        for name in names:
            made = getattr(room, name)
            own = str(getattr(made, "__module__", "")).startswith(room.__name__)
            record = isinstance(made, type) and (
                issubclass(made, tuple | sa.Method | sa.sketches.Sketch)
                or dataclasses.is_dataclass(made)
            )
            abstract = made in (sa.Method, sa.AttentionOperator)
            if callable(made) and own and (abstract or not record):
                found.add(prefix + name)
    return found


def test_every_public_name_is_called_on_extreme_input() -> None:
    assert public_names() - STILL <= set(CALLS)
    assert not STILL & set(CALLS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CALLS)
def test_public_functions_under_any_errstate(name: str, dtype: Any) -> None:
    calm, refusals = 0, list[str]()
    for make in INPUTS.values():
        problem = make(dtype)
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                use(CALLS[name](problem))
                calm += 1
            except ValueError as refusal:
                refusals.append(str(refusal))
    assert calm >= 2
    assert all(" must " in text and "\n" not in text for text in refusals)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_methods_on_extreme_input_under_any_errstate(case: MethodCase, dtype: Any) -> None:
    refusals = list[str]()
    for make in INPUTS.values():
        problem = make(dtype)
        if not supports(case, problem):
            continue
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                ahat = case(3).approximate(problem, rng=0)
                use(ahat)
                ahat.wide().to_dense()
                sa.error_report(problem, ahat)
                sa.attention(*problem.arrays, case(3), rng=0, causal=bool(problem.causal))
            except ValueError as refusal:
                refusals.append(str(refusal))
    assert all(" must " in text and "\n" not in text for text in refusals)


@pytest.mark.threads
def test_threads_do_not_warn_for_their_caller() -> None:
    tiny = np.full((4, 8), 1e-200)

    def square(piece: slice) -> Array:
        return np.asarray(tiny[piece] * tiny[piece])

    # A new thread warns, whatever the one that starts it does.
    with limit_threads(2), warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        made = list(map_pieces(square, [slice(i, i + 1) for i in range(4)]))
    assert not np.concatenate(made).any()


def test_functions_inside_each_other_are_quiet_whatever_is_set_between() -> None:
    tiny = np.full(3, 1e-200)
    inner = without_floating_errors(lambda: tiny * tiny)

    def between() -> Array:
        with np.errstate(all="raise"):
            first = inner()
            with pytest.raises(FloatingPointError):
                tiny * tiny  # noqa: B018
        return np.asarray(first + inner())

    with np.errstate(all="raise"):
        assert not without_floating_errors(between)().any()
        with pytest.raises(FloatingPointError):
            tiny * tiny  # noqa: B018
