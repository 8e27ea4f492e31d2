"""Packages of other authors beside ours: equal where the formulas are, and where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from peer_packages import peer

import sketchattn as sa
from sketchattn.sampling.landmarks import segment_means
from sketchattn.zoo.linformer.initialisations import INITIALISATIONS

Array = NDArray[Any]

EPS = float(np.finfo(np.float64).eps)


def heads(count: int, n: int, d: int, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((count, n, d)) for _ in range(3))
    return q, k, v


def call(module: Any, *arguments: Array, **options: Any) -> Array:
    """Return the output of a module in float64 for arrays with an axis for the batch in front."""
    import torch

    with torch.no_grad():
        tensors = [torch.from_numpy(np.ascontiguousarray(x))[None] for x in arguments]
        out: Array = module(*tensors, **options)[0].numpy()
        return out


def set_weights(parameter: Any, weights: Array) -> None:
    import torch

    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights)))


def side_by_side(x: Array) -> Array:
    """Return (h, n, d) as (n, h d), the layout of a token's heads."""
    return np.ascontiguousarray(x.transpose(1, 0, 2).reshape(x.shape[1], -1))


# --- nystrom-attention --------------------------------------------------------------------------


def nystrom(
    q: Array, k: Array, v: Array, r: int, *, filters: Array | None = None, mask: Any = None
) -> Array:
    """Return the output (h, n, d) of nystrom-attention, its linear layers set to the identity."""
    count, n, d = q.shape
    width = count * d
    options = {} if filters is None else {"residual_conv_kernel": len(filters)}
    module = peer("nystrom-attention")(
        3 * width, dim_head=d, heads=count, num_landmarks=r, residual=filters is not None, **options
    ).double()
    set_weights(module.to_qkv.weight, np.eye(3 * width))
    set_weights(module.to_out[0].weight, np.eye(3 * width, width))
    set_weights(module.to_out[0].bias, np.zeros(3 * width))
    if filters is not None:
        set_weights(module.res_conv.weight, np.tile(filters[:, None], (count, 1, 1, 1)))
    tokens = np.concatenate([side_by_side(x) for x in (q, k, v)], axis=1)
    given = {} if mask is None else {"mask": mask[None]}
    out = call(module, tokens, **given)[:, :width]
    return out.reshape(n, count, d).transpose(1, 0, 2)


def nystrom_tolerance(q: Array, k: Array, v: Array, r: int) -> float:
    """Return what six steps of the iteration in float64 may differ by.

    A step rounds ``Z (13 I - X (15 I - X (7 I - X))) / 4``: at most (13 + 15 + 7 + 1)/4 = 9 times
    r products of size |Z|, and multiplies what is there by f'(1) = 13/4: 9 r eps |Z| 3.25^6/2.25 in
    all.  F and B are averages, so that the output differs by r times that at most.
    """
    scale = q.shape[-1] ** -0.5
    m = np.exp(scale * segment_means(q[0], r) @ segment_means(k[0], r).T)
    m /= m.sum(axis=1, keepdims=True)
    size = float(np.abs(sa.Nystromformer(r).inverse(m)).max())
    return 9 * r * EPS * max(size, 1.0) * 3.25**6 / 2.25 * r * float(np.abs(v).max())


@pytest.mark.parametrize(("n", "r"), [(64, 8), (96, 32), (16, 16)])
def test_nystrom_attention_agrees_on_one_head(n: int, r: int, global_random_seed: int) -> None:
    q, k, v = heads(1, n, 6, global_random_seed)
    theirs = nystrom(q, k, v, r)
    tolerance = nystrom_tolerance(q, k, v, r)
    assert tolerance < 1e-4
    ours = sa.attention(q, k, v, sa.Nystromformer(r, preset="nystrom-attention"))
    assert np.abs(ours - theirs).max() <= tolerance
    # Another number of steps would be seen.
    other = sa.attention(q, k, v, sa.Nystromformer(r, iterations=5))
    assert np.abs(other - theirs).max() > 10 * tolerance


def test_nystrom_attention_lets_heads_depend_on_each_other() -> None:
    q, k, v = heads(2, 64, 6)
    q[1] *= 4
    theirs = nystrom(q, k, v, 8)
    tolerance = nystrom_tolerance(q[:1], k[:1], v[:1], 8)
    alone = nystrom(q[:1], k[:1], v[:1], 8)
    ours = sa.attention(q, k, v, "nystromformer", rank=8)
    assert np.abs(ours[0] - alone[0]).max() <= tolerance
    # Its start is scaled by the largest sums of both heads, ours by those of the head.
    assert np.abs(theirs[0] - alone[0]).max() > 1e-3


def test_nystrom_attention_pads_with_tokens_that_take_part() -> None:
    q, k, v = heads(1, 61, 6)
    theirs = nystrom(q, k, v, 8)
    padded = [np.pad(x, ((0, 0), (3, 0), (0, 0))) for x in (q, k, v)]
    ours = sa.attention(padded[0], padded[1], padded[2], sa.Nystromformer(8))[:, 3:]
    tolerance = nystrom_tolerance(padded[0], padded[1], v, 8)
    assert np.abs(ours - theirs).max() <= tolerance
    # Ours has segments of two lengths, and no tokens but those given.
    assert np.abs(sa.attention(q, k, v, sa.Nystromformer(8)) - theirs).max() > 1e-3


def test_nystrom_attention_adds_the_same_convolution() -> None:
    q, k, v = heads(1, 64, 6)
    filters = np.random.default_rng(1).standard_normal(33)
    theirs = nystrom(q, k, v, 8, filters=filters)
    method = sa.Nystromformer(8, convolution=filters)
    tolerance = nystrom_tolerance(q, k, v, 8) + 33 * EPS * 33 * np.abs(filters).max()
    assert np.abs(sa.attention(q, k, v, method) - theirs).max() <= tolerance
    turned = sa.Nystromformer(8, convolution=filters[::-1])
    assert np.abs(sa.attention(q, k, v, turned) - theirs).max() > 1e-3


def test_nystrom_attention_keeps_masked_tokens_in_its_segments() -> None:
    import torch

    q, k, v = heads(1, 64, 6)
    keep = np.arange(64) % 3 > 0
    theirs = nystrom(q, k, v, 8, mask=torch.from_numpy(keep))[:, keep]
    problem = sa.AttentionProblem(q[0][keep], k[0], v[0], key_mask=keep)
    # Its landmarks are the means of what is left of segments of positions: given to ours they make
    # the same output.
    segments = np.arange(64) // 8
    marks = np.array(
        [[x[0][keep & (segments == s)].mean(axis=0) for s in range(8)] for x in (q, k)]
    )
    ours = sa.Nystromformer(8, landmarks=marks).attend(problem)
    # It divides by the number of tokens plus 1e-8, of 5 or 6.
    assert np.abs(ours - theirs[0]).max() <= 1e-8 * 3.25**6
    # Ours makes segments of the tokens that are left.
    assert np.abs(sa.Nystromformer(8).attend(problem) - theirs[0]).max() > 1e-3


# --- performer-pytorch --------------------------------------------------------------------------


def performer(q: Array, k: Array, v: Array, features: Array, causal: bool = False) -> Array:
    """Return the output (h, n, d) of performer-pytorch with features (r, d) handed in."""
    r, d = features.shape
    module = peer("performer-pytorch")(d, nb_features=r, causal=causal).double()
    set_weights(module.projection_matrix, features)
    return call(module, q, k, v)


def performer_tolerance(q: Array, k: Array, v: Array, features: Array) -> float:
    """Return what two computations in float64 may differ by.

    Exponents up to M carry d + 4 roundings of terms of that size, sums over keys and features
    n + r of terms of one sign: a weight is off by 8 (n + r + d)(1 + M) eps of itself, and so is a
    quotient of sums of weights.
    """
    n, d = q.shape[1:]
    x, y = (z * d**-0.25 for z in (q, k))
    sizes = [np.abs(z @ features.T).max() + np.square(z).sum(axis=-1).max() for z in (x, y)]
    high = float(max(sizes))
    return float(8 * (n + len(features) + d) * (1 + 2 * high) * EPS * np.abs(v).max())


def test_performer_pytorch_agrees(global_random_seed: int) -> None:
    q, k, v = heads(3, 40, 6, global_random_seed)
    features = sa.Performer(20).draw(sa.AttentionProblem(q[0], k[0]), global_random_seed)
    theirs = performer(q, k, v, features["features"])
    tolerance = performer_tolerance(q, k, v, features["features"])
    assert tolerance < 1e-9
    method = sa.Performer(20, preset="performer-pytorch")
    ours = sa.attention(q, k, v, method, draw=features)
    assert np.abs(ours - theirs).max() <= tolerance
    named = sa.attention(q, k, v, "performer", rank=20, eps=1e-4, draw=features)
    assert np.abs(named - theirs).max() <= tolerance
    # Its constant is no rounding: without it the outputs are others.
    for eps in (0.0, 1e-6):
        other = sa.attention(q, k, v, "performer", rank=20, eps=eps, draw=features)
        assert np.abs(other - theirs).max() > 1e3 * tolerance


def test_performer_pytorch_draws_by_the_law_of_its_preset() -> None:
    module = peer("performer-pytorch")(6, nb_features=9)
    drawn = module.projection_matrix.numpy().astype(np.float64)
    ours = sa.Performer(9, preset="performer-pytorch").draw(
        sa.AttentionProblem(np.ones((9, 6)), np.ones((9, 6))), rng=0
    )["features"]
    for w in (drawn, ours):
        products = w @ w.T - np.diag((w**2).sum(axis=1))
        size = (w**2).sum(axis=1).max()
        for block in (slice(0, 6), slice(6, 9)):
            assert np.abs(products[block, block]).max() <= 1e-5 * size  # float32
        assert np.abs(products[:6, 6:]).max() > 1e-3
        # Without the sign fix the first entry of a basis is never positive.
        assert w[0, 0] <= 0
        assert w[6, 0] <= 0


def test_performer_pytorch_lets_later_keys_change_earlier_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    q, k, v = heads(1, 24, 6)
    features = sa.Performer(20).draw(sa.AttentionProblem(q[0], k[0]), rng=0)
    changed = k.copy()
    changed[:, -1] *= 20
    # It divides keys by their maximum, later ones included, before its constant is added.
    first, second = (performer(q, x, v, features["features"], causal=True) for x in (k, changed))
    assert np.abs(first - second)[:, :-1].max() > 0.1
    ours = [
        sa.attention(q, x, v, "performer", rank=20, causal=True, draw=features)
        for x in (k, changed)
    ]
    assert np.array_equal(ours[0][:, :-1], ours[1][:, :-1])
    assert "unable to import cuda code" in capsys.readouterr().out


# --- linformer ----------------------------------------------------------------------------------


def linformer(
    q: Array, k: Array, v: Array, e: Array, f: Array, *, share: bool = False, **options: Any
) -> Array:
    """Return the output (h, n, d) of linformer with E and F (r, n_max) handed in."""
    count, n, d = q.shape
    width = count * d
    r, most = e.shape
    module = (
        peer("linformer")(3 * width, most, k=r, heads=count, dim_head=d, share_kv=share)
        .double()
        .eval()
    )
    parts = np.eye(3 * width).reshape(3, width, 3 * width)
    set_weights(module.to_q.weight, parts[0])
    set_weights(module.to_k.weight, parts[1])
    set_weights(module.proj_k, e.T)
    if not share:
        set_weights(module.to_v.weight, parts[2])
        set_weights(module.proj_v, f.T)
    set_weights(module.to_out.weight, parts[0].T)
    set_weights(module.to_out.bias, np.zeros(3 * width))
    tokens = np.concatenate([side_by_side(x) for x in (q, k, v)], axis=1)
    out = call(module, tokens, **options)[:, :width]
    return out.reshape(n, count, d).transpose(1, 0, 2)


def linformer_tolerance(q: Array, k: Array, v: Array, e: Array, f: Array) -> float:
    """Return what two computations in float64 may differ by.

    Logits of size M are sums of n and of d products and weights r terms, all of size at most
    ``S = scale |q||E||k|``: 4 (n + d + r)(1 + S) eps, of values of size |F||v|, and n of these.
    """
    n, d = q.shape[1:]
    size = d**-0.5 * float((np.abs(q) @ (np.abs(e) @ np.abs(k)).transpose(0, 2, 1)).max())
    values = float((np.abs(f) @ np.abs(v)).max())
    return float(4 * (n + d + len(e)) * (1 + size) * EPS * values)


def projections(r: int, n: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(5)
    e, f = (rng.uniform(-(r**-0.5), r**-0.5, (r, n)) for _ in range(2))
    return e, f


def ours_of(q: Array, k: Array, v: Array, e: Array, f: Array) -> Array:
    return sa.attention(q, k, v, sa.Linformer(len(e), "given", E=e, F=f))


@pytest.mark.parametrize("longer", [0, 7])
def test_linformer_agrees(longer: int, global_random_seed: int) -> None:
    q, k, v = heads(2, 40, 6, global_random_seed)
    e, f = projections(8, 40 + longer)
    theirs = linformer(q, k, v, e, f)
    used = (e[:, :40], f[:, :40])
    tolerance = linformer_tolerance(q, k, v, *used)
    assert tolerance < 1e-10
    assert np.abs(ours_of(q, k, v, e, f) - theirs).max() <= tolerance
    # E and F are not interchangeable.
    assert np.abs(ours_of(q, k, v, f, e) - theirs).max() > 1e6 * tolerance


def test_linformer_is_initialised_as_recorded() -> None:
    module = peer("linformer")(6, 400, k=16, heads=1)
    e = module.proj_k.detach().numpy().T
    half = 3**0.5 * INITIALISATIONS["lucidrains"].deviation(16, 400)
    # 6400 entries uniform in +-half: none in the outer tenth has probability 0.9^6400.
    assert 0.9 * half < np.abs(e).max() <= half * (1 + 1e-6)


def test_linformer_ignores_a_mask() -> None:
    import torch

    q, k, v = heads(1, 40, 6)
    e, f = projections(8, 40)
    keep = np.arange(40) < 30
    theirs = linformer(q, k, v, e, f, mask=torch.from_numpy(keep)[None])
    assert np.array_equal(theirs, linformer(q, k, v, e, f))
    ours = sa.attention(q, k, v, sa.Linformer(8, "given", E=e, F=f), key_mask=keep)
    assert np.abs(ours - theirs).max() > 1e-3


def test_linformer_shares_values_too() -> None:
    q, k, v = heads(1, 40, 6)
    e, f = projections(8, 40)
    theirs = linformer(q, k, v, e, f, share=True)
    tolerance = linformer_tolerance(q, k, k, e, e)
    method = sa.Linformer(8, "given", "kv", E=e)
    # share_kv makes the keys the values; ours shares the matrix alone, as the paper does.
    assert np.abs(sa.attention(q, k, k, method) - theirs).max() <= tolerance
    assert np.abs(sa.attention(q, k, v, method) - theirs).max() > 1e-3


# --- what the benchmark times -------------------------------------------------------------------


def test_the_benchmark_compares_equals() -> None:
    from sketchattn.bench import harness, peers

    packages: Sequence[str] = list(peers.PEERS)
    for package in packages:
        peer(package)
    import torch

    q, k, v = (x[0] for x in harness.normal(1, 256, 16))
    seen = []
    for package, method, draw, theirs in peers._peer_calls(torch, q, k, v, 16):
        ours = sa.attention(q, k, v, method, draw=draw)
        out = theirs()
        assert out.dtype == np.float32
        error = float(np.linalg.norm(ours - out) / np.linalg.norm(out))
        same = package != "performer-pytorch" or method.preset is not None
        # Float32: 6e-8 a rounding, 3.25^6 of them in the iteration of nystrom-attention.
        assert (error < 1e-4) == same
        seen.append(package)
    assert seen == ["nystrom-attention", *["performer-pytorch"] * 2, "linformer"]
