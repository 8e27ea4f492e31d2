"""Approximate attention of a call: its heads as problems, given to a method a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_finite
from ..base.draws import (
    Draw,
    Rng,
    check_named,
    check_origin,
    entropy_of,
    head_generator,
    of_head,
)
from ..operators.steep import is_harmless
from ..problem import AttentionProblem
from .call import Call

if TYPE_CHECKING:
    from ..zoo.base import Method

Array = NDArray[Any]

# Entries of the arrays of heads that a method is given at a time; copies of them are made.
_HEADS_ENTRIES = 1 << 22
_OURS = __name__.partition(".")[0] + "."


Drawn = Mapping[str, Any] | list[Any] | tuple[Any, ...] | None


def approximate(call: Call, method: Method, rng: Rng, draw: Drawn) -> Array:
    """Return the output of a method for every head, in the layout and dtype of the call.

    Raises
    ------
    ValueError, TypeError
        For options and masks that the method cannot honour, keys and values that are not finite,
        ``rng`` beside ``draw``, and what the method itself refuses.
    """
    most_k = check_approximate(call, method, rng, draw)
    layout = call.layout
    shape = layout.entries * layout.h, layout.n_q, layout.d_v
    if not (shape[0] and layout.n_q and layout.n_k):
        return layout.output(np.zeros(shape, call.computing), call.q.dtype)
    problem_of, rng_of = _problems(call, most_k), _streams(call, rng, draw is not None)

    def some(heads: range) -> Array:
        problems = [problem_of(flat) for flat in heads]
        own = draw[heads.start : heads.stop] if isinstance(draw, list | tuple) else draw
        return method.attend_heads(problems, [rng_of(flat) for flat in heads], draw=own)

    numbers = (layout.n_q + layout.n_k) * (layout.d + layout.d_v)
    step = max(1, _HEADS_ENTRIES // numbers)
    out: Array | None = None
    for start in range(0, shape[0], step):
        heads = range(start, min(start + step, shape[0]))
        made = some(heads)
        if len(heads) == shape[0] and _is_ours(made, shape, call, method):
            out = made
            break
        out = np.empty(shape, call.computing) if out is None else out
        out[start : start + step] = made
    assert out is not None
    return layout.output(out, call.q.dtype)


def _is_ours(out: Array, shape: tuple[int, ...], call: Call, method: Method) -> bool:
    """Say whether an output can be given away as it is: nobody else has it.

    That is known of the methods of this library, which keep no arrays.  Memory for a copy of a long
    output has to be found first, which takes longer than the copy.
    """
    inside = (x for x in vars(method).values() if hasattr(x, "attend_heads"))
    return (
        all(type(x).__module__.startswith(_OURS) for x in (method, *inside))
        and (out.shape, out.dtype) == (shape, call.computing)
        and out.flags.carray
        and not any(np.may_share_memory(out, x) for x in (call.q, call.k, call.v))
    )


def approximate_with_lse(call: Call, method: Method, rng: Rng, draw: Drawn) -> tuple[Array, Array]:
    """Return the same and the logsumexp that a method has for every row, as the exact one's."""
    check_approximate(call, method, rng, draw)
    layout = call.layout
    heads = layout.entries * layout.h
    out = np.zeros((heads, layout.n_q, layout.d_v), call.computing)
    lse = np.full((heads, layout.n_q), -np.inf, call.computing)
    if layout.n_q > 0 and layout.n_k > 0:
        problem_of, rng_of = _problems(call), _streams(call, rng, draw is not None)
        draws = [] if draw is None else _shared(draw, heads)
        for flat in range(heads):
            own = draws[flat] if draws else None
            out[flat], lse[flat] = method.attend_with_lse(problem_of(flat), rng_of(flat), draw=own)
    return call.shaped(out, lse)


def check_approximate(call: Call, method: Method, rng: Rng, draw: Drawn) -> float:
    """Refuse what ``approximate`` refuses, but for what the method says of each head.

    Returns ``max |k|`` over the keys that are not masked.
    """
    for name, neutral, given in call.exact_only:
        raise ValueError(
            f"{name} must be {neutral!r} for method {method.name!r}, which cannot honour it, "
            f"got {given}; use method='exact'"
        )
    if call.return_lse and not method.traits.logsumexp:
        raise ValueError(
            f"return_lse must be False for method {method.name!r}, which does not know the "
            f"normaliser of its rows, got True; use a method whose traits.logsumexp is True"
        )
    layout, keys = call.layout, call.key_mask
    most_k, _ = (
        check_finite(x if keys is None else layout.keep(x, keys), label)
        for label, x in (("k", call.k), ("v", call.v))
    )
    if draw is not None and rng is not None:
        raise ValueError("rng must be None when draw is given, got both; pass one of them")
    heads = layout.entries * layout.h
    if isinstance(draw, list | tuple) and not all(isinstance(x, Mapping) for x in draw):
        check_named(draw)
    if isinstance(draw, list | tuple) and len(draw) != heads:
        raise ValueError(
            f"draw must be one draw for all heads or a sequence of one for each of {heads}, got "
            f"{len(draw)}; use method.draw_heads or return_draws=True"
        )
    if call.causal and not method.traits.causal:
        if layout.n_q > 0 and layout.n_k > 0 and layout.entries * layout.h > 0:
            method.check(_problems(call)(0))  # a method says better why, and what to do
        raise ValueError(
            f"causal must be False for method {method.name!r}, which sees all keys, got "
            f"{call.causal!r}; use a method whose traits.causal is True"
        )
    return most_k


def draws_of(call: Call, method: Method, rng: Rng, draw: Drawn) -> list[Mapping[str, Any]]:
    """Return the draw that ``approximate`` uses for each head; the call is checked."""
    heads, empty = call.layout.entries * call.layout.h, call.layout.n_q == 0 or call.layout.n_k == 0
    problem_of = _problems(call)
    if draw is not None:
        given = _shared(draw, heads)
        for flat in range(0 if empty else heads):
            check_origin(given[flat], problem_of(flat))
        return given
    if empty:
        return [{} for _ in range(heads)]
    rng_of = _streams(call, rng, drawn=False)
    drawn = [method.draw(problem_of(flat), rng_of(flat)) for flat in range(heads)]
    if call.layout.lead:  # one head alone has the stream of rng itself
        drawn = [of_head(x, rng, *divmod(flat, call.layout.h)) for flat, x in enumerate(drawn)]
    return list(drawn)


def _shared(draw: Mapping[str, Any] | list[Any] | tuple[Any, ...], heads: int) -> list[Any]:
    """Return the draw of each head; one that all share is meant for all of them."""
    if isinstance(draw, list | tuple):
        return list(draw)
    return [draw.detach() if isinstance(draw, Draw) and heads > 1 else draw] * heads


def attend_at(call: Call, method: Method, draws: Sequence[Mapping[str, Any]]) -> Array:
    """Return what ``approximate`` returns where each head has this draw, of ``draws_of``."""
    layout = call.layout
    out = np.zeros((len(draws), layout.n_q, layout.d_v), call.computing)
    if layout.n_q > 0 and layout.n_k > 0:
        problem_of = _problems(call)
        for flat, draw in enumerate(draws):
            out[flat] = method.attend(problem_of(flat), draw=dict(draw))
    return layout.output(out, call.q.dtype)


def approximate_vjp(
    call: Call, method: Method, draws: Sequence[Mapping[str, Any]], cotangent: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of flat heads for a cotangent (..., n_q, d_v), at these draws.

    A cotangent that is not finite makes the gradients of its head NaN.
    """
    layout = call.layout
    g = layout.flatten(cotangent, call.computing)
    q, k, v = (np.zeros_like(x) for x in call.flat())
    if layout.n_q > 0 and layout.n_k > 0:
        problem_of = _problems(call)
        for flat, draw in enumerate(draws):
            of = flat // layout.group
            if np.isfinite(g[flat]).all():
                q[flat], keys, values = method.vjp(problem_of(flat), g[flat], draw=dict(draw))
                k[of] += keys
                v[of] += values
            else:
                q[flat], k[of], v[of] = np.nan, np.nan, np.nan
    return q, k, v


def _problems(call: Call, most_k: float = math.nan) -> Callable[[int], AttentionProblem]:
    """Return the function that makes the problem of a flat head; ``max |k|`` if it is known."""
    layout, terms = call.layout, call.terms
    q, k, v = call.flat()
    # The largest of all heads say of each that it is harmless, but not which one is not.
    extent: tuple[float, float] | None = (call.most_q, most_k)
    if not is_harmless(terms.scale, layout.d, call.most_q, most_k):
        extent = None

    def problem_of(flat: int) -> AttentionProblem:
        head = (q[flat], k[flat // layout.group], v[flat // layout.group])
        if terms.key_mask is None:
            # Checked already, and nobody changes them during this call.
            return AttentionProblem.adopt(
                *head, scale=terms.scale, causal=call.causal, extent=extent
            )
        kept = terms.key_mask[terms.key_slab[flat]]
        return AttentionProblem(*head, scale=terms.scale, causal=call.causal, key_mask=kept)

    return problem_of


def _streams(call: Call, rng: Rng, drawn: bool) -> Callable[[int], Rng]:
    """Return the function that makes the randomness of a flat head."""
    # One head alone is the same call as the method's own: the same rng, the same bits.
    if drawn or not call.layout.lead:
        return lambda _: rng
    entropy = entropy_of(rng)
    return lambda flat: head_generator(entropy, *divmod(flat, call.layout.h))
