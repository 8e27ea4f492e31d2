"""Thinning: keys halved until few are left, each with the weight of those that it stands for.

Sources: Carrell, Gong, Shetty, Dwivedi and Mackey, "Low-rank thinning" (2025), Thinformer;
Dwivedi and Mackey, "Kernel thinning" (2024) and Goodpoints for the rule "kt"; Shetty, Dwivedi and
Mackey, "Distribution compression in near-linear time" (2022) for the buckets.  Any length, by
weights, is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.arguments import check_choice, check_flag, check_integer, check_positive
from ..base.draws import Draw, check_columns
from ..operators.base import AttentionOperator
from ..operators.pullback import Gradient, columns_pullback
from ..operators.sampled import SampledAttention
from ..operators.solve import softmax_over, solve_over
from ..problem import AttentionProblem
from ..sampling.halving import RULES, Kernel, Weighted, halve
from .base import Method, Traits, check_preset, register

Array = NDArray[Any]

CLAIMS = (
    "training_free.halving_bound",
    "training_free.thinning_mass",
    "training_free.thinning_unbiased",
)
# Weights of a draw that may have been stored in float32 sum to the keys this far.
WEIGHT_TOLERANCE = 1e-5


class Choices(NamedTuple):
    """Hold what a preset settles."""

    rule: str = "simple"
    value_factor: bool = True
    bucket: int | None = None
    delta: float = 0.5


DEFAULT = Choices()
# They differ in which keys are read, in lengths, and in the bits that are drawn.
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "released": {}}


class Round(NamedTuple):
    """Hold the points of a bucket, and the failure probability of one."""

    bucket: int
    delta: float


@register("thinformer")
class Thinformer(Method):
    """Attend to r keys that are left of repeated halvings, weighted: ``softmax(L_ij + ln w_j)``.

    Keys are paired with their neighbours, and of each pair one stays, with the weight of both: the
    one that keeps signed sums of the kernel ``exp(|scale| k.k')(v.v' + b^2)``, ``b = max |v_jl|``,
    small.  After ``ceil(log2(n_k/r))`` rounds at most r are left, whose weights sum to n_k.

    Parameters
    ----------
    rank : int
        Number r of keys, in 1..n_k.
    rule : {"simple", "kt"}
        How likely the larger sum is avoided: by the threshold of Thinformer, or of kernel thinning.
    value_factor : bool, default True
        False leaves the factor of the values out of the kernel: the choice of keys then does not
        look at V.
    bucket : int, optional
        Points that are halved together in the first round, even; twice as many in each further
        round.  None ends with one bucket of 2r, the cost of which is that of KH-COMPRESS.
    delta : float, default 0.5
        Failure probability of a bucket, in (0, 1): smaller is closer to random halvings.
    preset : {None, "paper", "released"}
        "paper" is KH-COMPRESS(g): n_k a power of 4 and ``rank = 2^g sqrt(n_k)``, otherwise refused.
        "released" is the public code: of other lengths it reads ``4^floor(log4 n_k)`` keys at equal
        steps, see `unread`, at most ``2^g sqrt`` of these stay, and one bit a round flips all
        buckets.  It takes all keys that it reads where r allows that, which is exact attention for
        a power of 4, and ``path`` says so.

    Raises
    ------
    TypeError, ValueError
        For values out of range, problems without values unless ``value_factor`` is False, and
        lengths and ranks that a preset cannot honour.

    Notes
    -----
    Rows sum to one and no entry is negative.  Each key stays with probability one over its weight,
    so that numerator and denominator are unbiased; their quotient is not.  An odd key waits with
    its weight; in a pair with different weights the heavier one is likelier to stay.

    The draw is ``kept`` (r_eff,), ascending, and ``log_weights`` (r_eff,).

    Selection costs ``O(r^2 log(n_k/r) (d + d_v))``, attention ``O(n_q r (d + d_v))``.  Causal
    problems are for `CausalTree` with this method inside, and for `StreamHalving`.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=100, d=4, rng=0)[0]
    >>> draw = sa.Thinformer(rank=16).draw(problem, rng=0)
    >>> len(draw["kept"]), round(float(np.exp(draw["log_weights"]).sum()), 9)
    (13, 100.0)
    """

    draw_names = ("kept", "log_weights")

    def __init__(
        self,
        rank: int,
        rule: str = "simple",
        value_factor: bool = True,
        bucket: int | None = None,
        delta: float = 0.5,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.rule = rule
        self.value_factor = value_factor
        self.bucket = bucket
        self.delta = delta
        self.preset = preset

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured; all queries share the keys, so no causal mask."""
        return Traits(
            key_mask=True,
            row_stochastic=True,
            nonnegative=True,
            claims=CLAIMS if self.preset is None else (),
            exact_at_full_rank=self.preset != "released",
            differentiable=True,
            logsumexp=True,
        )

    # --- arguments --------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        super().check(problem)
        if self.value_factor:
            _ = problem.values
        if len(problem.kept_keys):
            self._rounds(len(self._read(problem)))

    def _check_parameters(self) -> None:
        check_halving(self)
        if self.bucket is not None:
            check_bucket(self.bucket)
        check_preset(self, DEFAULT, PRESETS, whole=True)

    # --- which keys are read, and in what rounds ----------------------------------------------

    def unread(self, problem: AttentionProblem) -> Array:
        """Return the keys that are not masked and that a preset never reads, int64.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=17, d=4, rng=0)[0]
        >>> sa.Thinformer(4, preset="released").unread(problem).tolist()
        [16]
        >>> sa.Thinformer(4).unread(problem).tolist()
        []
        """
        self.check(problem)
        return np.setdiff1d(problem.kept_keys, self._read(problem))

    def _read(self, problem: AttentionProblem) -> Array:
        """Return the keys that are halved."""
        keys = problem.kept_keys
        if self.preset != "released" or not len(keys):
            return keys
        count = 4 ** ((len(keys).bit_length() - 1) // 2)
        return keys[:: len(keys) // count][:count]

    def _rounds(self, n: int) -> list[Round]:
        """Return the rounds that n keys go through."""
        r = int(self.rank)
        if self.preset is not None:
            return self._compress(n)
        count = max(0, math.ceil(math.log2(n / r))) if n > r else 0
        sizes = [2 * max(1, r >> (count - 1 - t)) for t in range(count)]
        if self.bucket is not None:
            sizes = [int(self.bucket) << t for t in range(count)]
        return [Round(size, float(self.delta)) for size in sizes]

    def _compress(self, n: int) -> list[Round]:
        """Return the rounds of KH-COMPRESS(g) of ``n = 4^l`` keys."""
        half = (n.bit_length() - 1) // 2  # l
        paper = self.preset == "paper"
        if n != 4**half:
            raise ValueError(
                f"n_k must be a power of 4 for preset 'paper', got {n}; leave preset at None, "
                f"which takes any length"
            )
        g = (int(self.rank) >> half).bit_length() - 1
        if g < 0 or (paper and int(self.rank) != 2 ** (g + half)):
            wanted = "2^g" if paper else "at least 1"
            raise ValueError(
                f"rank must be {wanted} times sqrt({n}) = {2**half} for preset {self.preset!r}, "
                f"got {self.rank}; use {2 ** (max(g, 0) + half)}, or leave preset at None"
            )
        g = min(g, half)
        sizes = [4 ** (g + 1) << t for t in range(half - g)]
        spread = 4 ** (g + 1) * max(half - g, 1) * n
        return [Round(size, float(self.delta) * size * size / spread) for size in sizes]

    # --- draws ------------------------------------------------------------------------------

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        keys = self._read(problem)
        if not len(keys):
            return Draw(kept=keys, log_weights=np.zeros(0))
        kernel = kernel_of(self, problem)
        if kernel.values is not None:
            kernel = kernel._replace(bound=float(np.abs(kernel.values[keys]).max(initial=0.0)))
        points = Weighted(keys, np.ones(len(keys)))
        for bucket, delta in self._rounds(len(keys)):
            points = halve(
                points,
                kernel._replace(delta=delta),
                bucket,
                rng,
                one_flip=self.preset == "released",
            )
        return Draw(kept=points.positions, log_weights=np.log(points.weights))

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        checked = super()._check_draw(problem, draw)
        kept = check_columns(checked["kept"], problem.kept_keys)
        read = len(self._read(problem))
        count = read
        for _ in self._rounds(read) if read else ():
            count = -(-count // 2)
        if len(kept) != count:
            raise ValueError(
                f"kept must hold {count} keys for rank = {self.rank}, got {len(kept)}; change rank "
                f"or the draw"
            )
        log_weights = check_log_weights(checked["log_weights"], count)
        total = float(np.exp(log_weights).sum())
        if not abs(total - read) <= WEIGHT_TOLERANCE * read:
            raise ValueError(
                f"log_weights must be those of weights with the sum {read}, got {total:.9g}; each "
                f"key that is kept stands for some of them"
            )
        return Draw(kept=kept, log_weights=log_weights)

    # --- the approximation ------------------------------------------------------------------

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        kept = draw["kept"]
        weights = softmax_over(problem, kept, np.exp(draw["log_weights"]))
        made = SampledAttention(kept, weights, problem.n_k, len(kept))
        if self.preset == "released" and len(kept) == len(problem.kept_keys):
            made.path = "exact"
        return made

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        kept = draw["kept"]
        return solve_over(problem, kept, problem.values[kept], draw["log_weights"])

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        return columns_pullback(problem, draw["kept"], cotangent, np.exp(draw["log_weights"]))


# --- what the methods with halvings share ---------------------------------------------------------


def check_halving(method: Any) -> None:
    """Refuse parameters of a halving that are out of range."""
    check_choice(method.rule, "rule", RULES)
    check_flag(method.value_factor, "value_factor", "False leaves the values out of the kernel")
    check_positive(method.delta, "delta", below=1.0)


def check_bucket(bucket: object) -> None:
    """Refuse a number of points that cannot be halved."""
    size = check_integer(bucket, "bucket", 2, "give an even number of keys, or None")
    if size % 2:
        raise ValueError(f"bucket must be even, got {size}; of each pair one key is kept")


def kernel_of(method: Any, problem: AttentionProblem) -> Kernel:
    """Return the kernel of the keys of a problem."""
    _, k, v = problem.arrays
    values = v if method.value_factor else None
    return Kernel(k, values, problem.scale, str(method.rule), float(method.delta))


def check_log_weights(x: Array, length: int) -> Array:
    """Return finite logarithms of weights, one a key, as float64."""
    if x.dtype.kind != "f":
        raise TypeError(f"log_weights must hold floating-point numbers, got {x.dtype}; convert it")
    if x.shape != (length,):
        raise ValueError(
            f"log_weights must have shape ({length},), got {x.shape}; give one for each kept key"
        )
    if not np.isfinite(x).all():
        raise ValueError("log_weights must be finite, got some that are not; drop those keys")
    return x.astype(np.float64)
