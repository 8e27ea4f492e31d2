"""Our methods beside packages of the same methods."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..functional.batched import attention
from .harness import Row, benchmark, compare, import_torch, normal, time_both

Array = NDArray[Any]

# Packages that compute what a method of ours computes: module and class.
PEERS = {
    "nystrom-attention": ("nystrom_attention", "NystromAttention"),
    "performer-pytorch": ("performer_pytorch", "FastAttention"),
    "linformer": ("linformer", "LinformerSelfAttention"),
}


def _peer(package: str) -> Any | None:
    """Return the class of attention of a package, None where it is not installed."""
    module, name = PEERS[package]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they import has been deprecated since
            return getattr(importlib.import_module(module), name)
    except ImportError:
        warnings.warn(
            f"{package} is not installed, so it is left out; pip install 'sketchattn[peers]'",
            stacklevel=2,
        )
        return None


def _peer_calls(
    torch: Any, q: Array, k: Array, v: Array, r: int
) -> Iterator[tuple[str, Any, Mapping[str, Any] | None, Callable[[], Array]]]:
    """Yield package, method of ours, its draw, and the attention of the package, without gradients.

    Linear layers before and after the attention are replaced by modules that hand on what they are
    given.  One head: with several, nystrom-attention scales each by all.
    """
    from ..zoo.linformer.method import Linformer
    from ..zoo.nystromformer import Nystromformer
    from ..zoo.performer import Performer

    n, d = q.shape
    queries, keys, values = (torch.from_numpy(x)[None] for x in (q, k, v))

    class Given(torch.nn.Module):  # type: ignore[misc]  # torch may be absent
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.output = output

        def forward(self, _: Any) -> Any:
            return self.output

    def without_gradients(module: Any, *arguments: Any) -> Callable[[], Array]:
        def call() -> Array:
            with torch.no_grad():
                out: Array = module(*arguments).numpy().reshape(n, d)
                return out

        return call

    same = torch.nn.Identity()
    kind = _peer("nystrom-attention")
    if kind is not None:
        module = kind(d, dim_head=d, heads=1, num_landmarks=r, residual=False)
        module.to_qkv = Given(torch.cat([queries, keys, values], dim=-1))
        module.to_out = same
        theirs = without_gradients(module, queries)
        yield "nystrom-attention", Nystromformer(r), None, theirs
    kind = _peer("performer-pytorch")
    if kind is not None:
        module = kind(d, nb_features=r)
        draw = {"features": module.projection_matrix.numpy()}
        theirs = without_gradients(module, *(x[None] for x in (queries, keys, values)))
        yield "performer-pytorch", Performer(r, preset="performer-pytorch"), draw, theirs
        yield "performer-pytorch", Performer(r), draw, theirs
    kind = _peer("linformer")
    if kind is not None:
        module = kind(d, n, k=r, heads=1)
        module.to_q, module.to_out = same, same
        module.to_k, module.to_v = Given(keys), Given(values)
        e, f = (np.ascontiguousarray(x.detach().numpy().T) for x in (module.proj_k, module.proj_v))
        theirs = without_gradients(module, queries)
        yield "linformer", Linformer(r, "given", E=e, F=f), None, theirs


@benchmark("peers", "nystromformer, performer, linformer against packages of the same methods")
def _peers(quick: bool, rounds: int) -> Iterator[Row]:
    torch = import_torch()
    if torch is None:
        warnings.warn(
            "torch is not installed, so peers are left out; pip install 'sketchattn[peers]'",
            stacklevel=2,
        )
        return
    n, r = (1024, 32) if quick else (8192, 256)
    q, k, v = (x[0] for x in normal(1, n, 64))
    for package, method, draw, theirs in _peer_calls(torch, q, k, v, r):
        ours = partial(attention, q, k, v, method, draw=draw)
        difference = float(np.linalg.norm(ours() - theirs()) / np.linalg.norm(theirs()))
        seconds = time_both({"ours": ours, "theirs": theirs}, 3 * rounds)
        preset = f", {method.preset}" if getattr(method, "preset", None) else ""
        yield compare(
            "peers",
            f"{method.name}{preset}, 1 head, n={n}, d=64, r={r}",
            seconds,
            "ours",
            "theirs",
            against=package,
            target=1 / 1.5,
            difference=difference,
        )
