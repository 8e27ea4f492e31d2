"""PyTorch's function: values, gradients, dtypes, memory, and what is refused."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from packaging_checks import ROOT

import sketchattn as sa
from sketchattn.base.draws import head_generator

torch: Any = pytest.importorskip("torch")
attend: Any = importlib.import_module("sketchattn.integrations.torch").scaled_dot_product_attention
own = torch.nn.functional.scaled_dot_product_attention

Array = NDArray[Any]
FENCE = re.compile(r"^```([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HALVES = [torch.float16, torch.bfloat16]


def tensors(
    *shapes: tuple[int, ...], dtype: Any = torch.float64, seed: int = 0, gradient: bool = True
) -> list[Any]:
    """Return normal tensors of these shapes that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(gradient)
        for shape in shapes
    ]


def differentiated(function: Any, arguments: list[Any], **options: Any) -> list[Any]:
    """Return the output and the gradients of its sum times a fixed cotangent."""
    out = function(*arguments, **options)
    weights = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad(out, arguments, weights)]


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)), {}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)), {"scale": 0.3}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)), {"is_causal": True}),
        (((2, 3, 7, 4), (2, 3, 5, 4), (2, 3, 5, 6)), {"is_causal": True}),
        (((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 6)), {"enable_gqa": True}),
        (((2, 6, 5, 4), (2, 1, 7, 4), (2, 1, 7, 6)), {}),
        (((2, 6, 5, 4), (1, 6, 7, 4), (2, 1, 7, 6)), {}),
        (((3, 5, 4), (3, 7, 4), (3, 7, 6)), {}),
        (((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6)), {}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (3, 5, 7)), {}),
        (((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), (5, 1)), {}),
        (((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 6), (1, 7)), {"enable_gqa": True}),
    ],
)
def test_values_and_gradients_are_those_of_torch(shapes: Any, options: dict[str, Any]) -> None:
    arguments = tensors(*shapes)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = differentiated(own, arguments, **options)
    for x, y in zip(differentiated(attend, arguments, **options), expected, strict=True):
        assert x.shape == y.shape
        # Sums of at most 42 terms below 10, each with a few roundings of 2^-53, on both sides.
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_boolean_masks_and_empty_rows_are_those_of_torch() -> None:
    q, k, v = tensors((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
    mask = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[1, 0, 2] = False
    found, expected = (differentiated(f, [q, k, v], attn_mask=mask) for f in (attend, own))
    assert not found[0][1, :, 2].any()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    both = attend(q, k, v, mask, is_causal=True)
    torch.testing.assert_close(both, attend(q, k, v, mask & torch.ones(5, 7).tril().bool()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"causal": "bottom-right", "window": (2, 1)},
        {"softcap": 0.7},
        {"key_mask": torch.tensor([True, True, False, True])},
        {"offset": 1, "causal": True, "scale": 0.4},
        {"compute_dtype": np.float64, "softcap": 2.0},
    ],
)
def test_gradcheck_of_exact_attention(options: dict[str, Any]) -> None:
    arguments = tensors((4, 3, 2), (2, 4, 2), (2, 4, 3), (4, 3, 4), (4,))

    def run(q: Any, k: Any, v: Any, bias: Any, sink: Any) -> Any:
        return attend(q, k, v, bias, enable_gqa=True, sink=sink, **options)

    assert torch.autograd.gradcheck(run, arguments)


METHODS = sorted(
    name
    for name, cls in sa.methods().items()
    if cls(**({"rank": 4} if "rank" in cls._get_param_names() else {})).traits.differentiable
)


@pytest.mark.parametrize("name", METHODS)
def test_gradcheck_of_methods_at_their_draw(name: str) -> None:
    q, k, v = tensors((9, 4), (9, 4), (9, 3), seed=2)
    cls = sa.methods()[name]
    parameters = {"rank": 4} if "rank" in cls._get_param_names() else {}
    problem = sa.AttentionProblem(*(x.detach().numpy() for x in (q, k, v)))
    options: dict[str, Any] = {"method": name, **parameters}
    if name != "exact":
        options["draw"] = cls(**parameters).draw(problem, rng=0)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, **options), (q, k, v))


@pytest.mark.parametrize("rng", [0, "generator"])
def test_backward_uses_the_draw_of_forward(rng: Any) -> None:
    q, k, v = tensors((2, 4, 9, 4), (2, 2, 9, 4), (2, 2, 9, 3))
    g = torch.ones(2, 4, 9, 3, dtype=torch.float64)
    seed = 0 if rng == 0 else np.random.default_rng(5)
    out = attend(q, k, v, enable_gqa=True, method="skeinformer", rank=3, rng=seed)
    found = torch.autograd.grad(out, (q, k, v), g)
    arrays = [x.detach().numpy() for x in (q, k, v)]
    again = 0 if rng == 0 else np.random.default_rng(5)
    options: dict[str, Any] = {"rank": 3, "rng": again, "enable_gqa": True}
    expected = sa.attention(arrays[0], arrays[1], arrays[2], "skeinformer", **options)
    np.testing.assert_array_equal(out.detach().numpy(), expected)
    if rng != 0:
        return  # the streams of heads grow from what the generator gave
    method = sa.Skeinformer(rank=3)
    gradients = [np.zeros_like(x) for x in arrays]
    for b, h in np.ndindex(2, 4):
        head = (arrays[0][b, h], arrays[1][b, h // 2], arrays[2][b, h // 2])
        problem = sa.AttentionProblem(*head)
        parts = method.vjp(problem, g[b, h].numpy(), head_generator(0, b, h))
        gradients[0][b, h] = parts[0]
        gradients[1][b, h // 2] += parts[1]
        gradients[2][b, h // 2] += parts[2]
    for x, y in zip(found, gradients, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=0, atol=1e-13)


def test_a_method_without_gradients_says_so_in_backward() -> None:
    q, k, v = tensors((5, 4), (5, 4), (5, 3))
    out = attend(q, k, v, method="topk", rank=2)
    with pytest.raises(ValueError, match=r"differentiable for a backward pass, got TopK"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_are_computed_in_float32_and_rounded_once(dtype: Any) -> None:
    half = tensors((2, 9, 4), (2, 7, 4), (2, 7, 3), (9, 7), dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in half]
    out = attend(*half)
    assert out.dtype == dtype
    assert torch.equal(out, attend(*wide).to(dtype))
    g = torch.ones_like(out)
    found = torch.autograd.grad(out, half, g)
    expected = torch.autograd.grad(attend(*wide), wide, g.float())
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        assert torch.equal(x, y.to(dtype))
    exact = attend(*half, compute_dtype=np.float64)
    assert exact.dtype == dtype
    truth = attend(*(x.double() for x in half))
    # One rounding to nearest; rounding twice, through float32, could go to the other side.
    spacing = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert ((exact.double() - truth).abs() <= spacing * truth.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_errors_are_at_most_twice_those_of_torch(dtype: Any) -> None:
    half = tensors((4, 300, 64), (4, 300, 64), (4, 300, 64), dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in half]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = differentiated(own, wide)
    theirs, ours = (differentiated(f, half) for f in (own, attend))
    for x, y, z in zip(ours, theirs, truth, strict=True):
        error, limit = ((a.double() - z).norm() for a in (x, y))
        assert error <= 2 * limit


def test_autocast_is_that_of_torch() -> None:
    q, k, v = tensors((2, 5, 4), (2, 5, 4), (2, 5, 3), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = attend(q, k, v), own(q, k, v)
        wide = attend(q.double(), k.double(), v.double())
    assert found.dtype == expected.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert torch.equal(found, attend(*(x.bfloat16() for x in (q, k, v))))
    found.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_tensors_are_read_in_place_and_never_written() -> None:
    q, k, v = tensors((2, 6, 8), (2, 6, 8), (2, 6, 8), gradient=False)
    expected = attend(q, k, v)
    before = [x.clone() for x in (q, k, v)]
    views = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([k, k], dim=-1)[..., 1],
        torch.cat([v, v])[::1][:2],
    ]
    assert torch.equal(attend(*views), expected)
    frozen = q.numpy().copy()
    frozen.flags.writeable = False
    with pytest.warns(UserWarning, match="not writ"):
        read_only = torch.from_numpy(frozen)
    assert torch.equal(attend(read_only, k, v), expected)
    one = k[:1].expand(2, 6, 8)
    assert torch.equal(attend(q, one, one), attend(q, one.contiguous(), one.contiguous()))
    for x, y in zip((q, k, v), before, strict=True):
        assert torch.equal(x, y)


def test_what_needs_no_gradient_gets_none() -> None:
    q, k, v = tensors((2, 5, 4), (2, 5, 4), (2, 5, 3))
    out = attend(q, k.detach(), v)
    assert [x is None for x in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)] == [
        False,
        True,
        False,
    ]
    assert not attend(*(x.detach() for x in (q, k, v))).requires_grad
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v), out)


def test_a_tensor_that_was_changed_is_noticed() -> None:
    q, k, v = tensors((2, 5, 4), (2, 5, 4), (2, 5, 3))
    moved = k * 1
    out = attend(q, moved, v)
    moved += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_transforms_work_or_say_what_to_do() -> None:
    q, k, v = tensors((2, 5, 4), (2, 5, 4), (2, 5, 3))
    found = torch.func.grad(lambda x: attend(x, k, v).sum())(q)
    torch.testing.assert_close(found, torch.autograd.grad(attend(q, k, v).sum(), q)[0])
    with pytest.raises(RuntimeError, match="pass the batch as leading axes"):
        torch.vmap(attend)(q, k, v)
    gradient = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="must not be differentiated again"):
        gradient.sum().backward()


class Twice:
    """A model whose attention is run between two other operations."""

    def __call__(self, q: Any, k: Any, v: Any) -> Any:
        return (attend(2 * q, k, v, is_causal=True) + 1).sum()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks, and hides it if it may
def test_compiled_programs_leave_their_graph_and_return() -> None:
    q, k, v = tensors((2, 5, 4), (2, 5, 4), (2, 5, 3))
    counter = importlib.import_module("torch._dynamo.testing").CompileCounter()
    compiled = torch.compile(Twice(), backend=counter)
    for _ in range(2):
        found, expected = compiled(q, k, v), Twice()(q, k, v)
        torch.testing.assert_close(found, expected)
        for x, y in zip(
            *(torch.autograd.grad(z, (q, k, v)) for z in (found, expected)), strict=True
        ):
            torch.testing.assert_close(x, y)
    frames = counter.frame_count
    compiled(q, k, v)
    assert frames == counter.frame_count == 2  # before attention, and after it


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"query": np.ones((2, 5, 4))},
            TypeError,
            r"query must be a tensor, got ndarray; pass tor",
        ),
        (
            {"key": torch.ones(2, 5, 4, device="meta")},
            ValueError,
            r"key must be on the CPU, .* meta",
        ),
        ({"value": torch.ones(2, 5, 4).to_sparse()}, ValueError, "value must be dense"),
        (
            {"query": torch.ones(2, 5, 4).long()},
            TypeError,
            r"got torch.int64; pass query.float\(\)",
        ),
        ({"query": torch.ones(2, 5, 4).double()}, TypeError, "dtype"),
        ({"attn_mask": torch.ones(5, 5).int()}, TypeError, "attn_mask must be boolean or floating"),
        ({"attn_mask": np.ones((5, 5), bool)}, TypeError, "attn_mask must be a tensor"),
        (
            {"attn_mask": torch.ones(5, 5, device="meta")},
            ValueError,
            "attn_mask must be on the CPU",
        ),
        ({"sink": torch.ones(3)}, ValueError, r"sink must have shape \(2,\)"),
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0.0, got 0.1"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"is_causal": True, "causal": True}, ValueError, "causal must be False beside is_causal"),
        ({"key": torch.ones(3, 5, 4), "value": torch.ones(3, 5, 4)}, ValueError, "heads"),
        ({"rank": 3}, TypeError, "rank must be a parameter of method 'exact'"),
        ({"method": "uniform"}, TypeError, "rank must be given for method 'uniform'"),
        ({"draw": {}}, ValueError, "draw must be None for method 'exact'"),
        ({"query": torch.full((2, 5, 4), torch.nan)}, ValueError, "q must be finite"),
        (
            {"method": "uniform", "rank": 2, "softcap": 1.0},
            ValueError,
            "softcap must be 0 for method 'uniform'",
        ),
        (
            {"method": "uniform", "rank": 2, "sink": torch.ones(2)},
            ValueError,
            "sink must be None for method 'uniform'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    given = {"query": torch.ones(2, 5, 4), "key": torch.ones(2, 5, 4), "value": torch.ones(2, 5, 4)}
    with pytest.raises(kind, match=message) as caught:
        attend(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_without_torch_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "sketchattn.integrations.torch")
    with pytest.raises(ImportError, match=r"run: python -m pip install torch"):
        importlib.import_module("sketchattn.integrations.torch")


def test_the_blocks_of_the_page_run() -> None:
    text = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
    blocks = FENCE.findall(text)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for language, source in blocks:
        assert language == "python"
        exec(compile(source, "docs/pytorch.md", "exec"), names)
