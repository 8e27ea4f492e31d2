"""The cheapest setting on one head whose error is certified: a search, then fresh rows.

What is promised, and why it holds, is the text of `sketchattn.recommend`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors.certificates import (
    LARGEST_OUTPUT,
    ErrorCertificate,
    RememberedRows,
    certify_known,
    check_output,
    know,
    scale_of,
)
from ..functional.batched import attention
from ..kernels._threads import cpu_count, limit_threads
from ..problem import AttentionProblem
from ..zoo.base import Method
from .grid import Variant

Array = NDArray[Any]

# Heads of at most this many entries (n = 16384) have all of their rows computed, in the time of a
# few runs of exact attention; the search takes dozens of them.
ALL_ENTRIES = 1 << 28
# Exact rows by which settings are compared where not all are known, and of an approximate interval.
COMPARED_ROWS = 512
APPROXIMATE_ROWS = 1024
# Certificates from samples of rows, at most; each has its share of the error probability.
ATTEMPTS = 4
# Where errors are estimated, part of the tolerance that an estimate may use; after a certificate
# that was not below the tolerance, the part of that.
MARGIN = 0.9
# Shares of the tolerance, where rows are as many as it needs: of the certificate that the output
# would have without any error, and of this together with its estimated error, as squares add.
OUTPUT_SHARE = 0.6
TOGETHER = 0.97
# A setting within the tolerance is run again while all its runs took less than this.
TIMED_SECONDS = 0.05
# Pairs of runs, beside exact attention, of a setting before it is recommended, and their seconds.
PAIRS = 5
PAIRED_SECONDS = 2.0
# Ranks are doubled from here on, then halved in between this often.
FIRST_RANK = 2
HALVINGS = 2


def ladder(n_k: int) -> list[int]:
    """Return the ranks of the search: powers of two from 2 to n_k, 1 if there is none.

    Examples
    --------
    >>> ladder(100), ladder(1)
    ([2, 4, 8, 16, 32, 64], [1])
    """
    return [2**i for i in range(1, n_k.bit_length())] or [1]


@dataclass
class Setting:
    """A method at a rank, and what is known of it.

    Attributes
    ----------
    label : str
    rank : int or None
    method : Method
    seconds : float
        Of one call of ``attention``; the median of several where it is within the tolerance.
    estimate : float
        Error on the rows by which settings are compared.
    confirmed : bool
        Whether ``seconds`` were measured again, in turn with exact attention.
    refused : bool
        Whether it failed, cannot be certified, or is not quicker than exact attention after all.
    """

    label: str
    rank: int | None
    method: Method
    seconds: float
    estimate: float
    confirmed: bool = False
    refused: bool = False


class HeadTask(NamedTuple):
    """What the search on one head is given: ``ranks`` are those that each method accepts."""

    problem: AttentionProblem
    variants: Sequence[tuple[Variant, Sequence[int]]]
    tolerance: float
    confidence: float
    rows: int | None
    kind: str
    seed: int
    jobs: int


@dataclass
class Found:
    """What was found on one head; ``best`` is None where exact attention is to be taken."""

    head: str
    best: Setting | None
    certificate: ErrorCertificate | None
    exact_seconds: float
    reason: str
    tried: list[Setting]
    failures: dict[str, str]
    attempts: int
    closest: Setting | None = field(default=None)


def run(problem: AttentionProblem, method: Method | None, seed: int) -> tuple[Array, float]:
    """Return the output of the call that is recommended, exact without a method, and seconds."""
    options: dict[str, Any] = {} if method is None else {"method": method}
    if method is not None and method.traits.randomized:
        options["rng"] = seed
    start = time.perf_counter()
    output = attention(
        problem.q,
        problem.k,
        problem.v,
        scale=problem.scale,
        causal=problem.causal,
        key_mask=problem.key_mask,
        **options,
    )
    return output, time.perf_counter() - start


def refusal_of(variant: Variant, problem: AttentionProblem, rank: int) -> Exception | None:
    """Return why a method does not honour a head at a rank, None where it does."""
    try:
        variant.check(problem, [rank])
    except (TypeError, ValueError) as error:
        return error
    return None


def find(task: HeadTask) -> Found:
    """Return the cheapest certified setting of a head, alone or beside others."""
    return search(task)


def search(task: HeadTask, tell: Callable[[], None] = lambda: None) -> Found:
    """Return the cheapest certified setting of a head; ``tell`` is called once a method."""
    with ExitStack() as stack:
        if task.jobs > 1:
            stack.enter_context(limit_threads(max(1, cpu_count() // task.jobs)))
        return _Search(task, tell).result()


class _Search:
    """The state of a search on one head."""

    def __init__(self, task: HeadTask, tell: Callable[[], None]) -> None:
        self.task = task
        self.tell = tell
        self.problem = task.problem
        self.settings: dict[tuple[str, int | None], Setting] = {}
        self.failures: dict[str, str] = {}
        self.warm: set[str] = set()
        self.attempts = 0
        self.least = 0.0  # below which nothing can be certified, of the last that could not
        _, factor = scale_of(self.problem)
        self.exact = RememberedRows(self.problem, factor)
        seen = np.flatnonzero(self.problem.visible_counts() > 0)
        if task.rows is None:
            few = self.problem.n_q * self.problem.n_k <= ALL_ENTRIES
            self.everything = few or len(seen) <= COMPARED_ROWS
        else:
            self.everything = task.rows >= len(seen)
        self.seen = len(seen)
        count = min(task.rows or COMPARED_ROWS, COMPARED_ROWS)
        chosen = seen if self.everything else self.stream(0).choice(seen, count, replace=False)
        self.index = np.sort(chosen)
        self.rows = self.exact(self.index)
        self.size = math.sqrt(float((self.rows**2).sum()))
        self.threshold = task.tolerance * (1.0 if self.everything else MARGIN)
        run(self.problem, None, task.seed)
        times = [run(self.problem, None, task.seed)[1]]
        while len(times) < 3 and sum(times) < PAIRED_SECONDS:
            times.append(run(self.problem, None, task.seed)[1])
        self.exact_seconds = statistics.median(times)
        self.budget = self.exact_seconds

    def stream(self, purpose: int, attempt: int = 0) -> np.random.Generator:
        """Return a stream that no method's draw, no other purpose and no other attempt shares."""
        entropy = [self.task.seed, int(self.problem.digest[:16], 16)]
        return np.random.default_rng(
            np.random.SeedSequence(entropy, spawn_key=(len(self.problem.digest), purpose, attempt))
        )

    # --- settings -------------------------------------------------------------------------------

    def error(self, output: Array) -> float:
        """Return the error of an output on the rows by which settings are compared."""
        peak = float(np.abs(output).max(initial=0.0))
        if not peak <= LARGEST_OUTPUT / self.exact.factor:  # NaN, or a square that overflows
            return math.inf
        part = output[self.index].astype(np.float64)
        part *= self.exact.factor
        part -= self.rows
        size = math.sqrt(float((part**2).sum()))
        return size / self.size if self.size > 0.0 else math.inf if size > 0.0 else 0.0

    def look(self, variant: Variant, rank: int) -> Setting:
        """Run a setting, unless it was run before, and return what is known of it."""
        own = rank if variant.ranked else None
        key = (variant.label, own)
        if key in self.settings:
            return self.settings[key]
        method, seed = variant.at(rank), self.task.seed
        found = Setting(variant.label, own, method, math.inf, math.inf)
        self.settings[key] = found
        try:
            if variant.label not in self.warm:  # the first run may compile kernels
                run(self.problem, method, seed)
                self.warm.add(variant.label)
            output, seconds = run(self.problem, method, seed)
            times = [seconds]
            found.estimate = self.error(output)
            within = found.estimate <= self.task.tolerance
            while within and len(times) < 3 and sum(times) < TIMED_SECONDS:
                times.append(run(self.problem, method, seed)[1])
            if not within and self.budget < seconds < 4.0 * self.budget:  # by another process?
                times = [min(seconds, run(self.problem, method, seed)[1])]
            found.seconds = statistics.median(times)
        except Exception as error:
            at = "" if own is None else f"rank {own}: "
            found.estimate, found.refused = math.inf, True
            self.failures.setdefault(
                variant.label, f"{at}{type(error).__name__}: {' '.join(str(error).split())}"
            )
        return found

    def passes(self, setting: Setting) -> bool:
        """Say whether a setting may be attempted."""
        return setting.estimate <= self.threshold and not setting.refused

    def walk(self, variant: Variant, ranks: Sequence[int]) -> Iterator[Setting]:
        """Yield settings of a method by rank, while a cheaper one than the best may follow.

        A method is left when its time is over the budget and does not fall, or when its error
        would have to fall faster than ``1 / rank^2`` to be in time.  Error that rises with the
        rank (larger blocks at smaller ranks) is seen, as every power of two is run.
        """
        made: list[tuple[int, Setting]] = []
        for rank in ranks:
            setting = self.look(variant, rank)
            yield setting
            if math.isinf(setting.seconds):  # it failed
                continue
            slow = setting.seconds > self.budget
            if slow and made and setting.seconds > 0.9 * made[-1][1].seconds:
                made.append((rank, setting))
                break
            made.append((rank, setting))
            if setting.seconds > self.budget / 8:
                doublings = 1.0 + max(0.0, math.log2(self.budget / setting.seconds))
                if setting.estimate > self.threshold * 4.0**doublings:
                    break
        for pair in zip(made, made[1:], strict=False):
            (wrong, fails), (right, holds) = sorted(pair, key=lambda x: self.passes(x[1]))
            if self.passes(fails) or not self.passes(holds) or fails.seconds > self.budget:
                continue
            for _ in range(HALVINGS if variant.ranked else 0):
                middle = (wrong + right) // 2
                if middle in (wrong, right) or refusal_of(variant, self.problem, middle):
                    break
                setting = self.look(variant, middle)
                yield setting
                if self.passes(setting):
                    right = middle
                else:
                    wrong = middle

    def cheapest(self) -> Setting | None:
        """Return the cheapest setting in time whose estimate is below the threshold."""
        best: Setting | None = None
        self.budget = self.exact_seconds
        # Quick methods first: what they reach bounds what others may take.
        first = {v.label: self.look(v, ranks[0]).seconds for v, ranks in self.task.variants}
        for variant, ranks in sorted(self.task.variants, key=lambda pair: first[pair[0].label]):
            for setting in self.walk(variant, ranks):
                if self.passes(setting) and setting.seconds < self.budget:
                    best, self.budget = setting, setting.seconds
            self.tell()
        return best

    def confirm(self, setting: Setting) -> None:
        """Time a setting again, in turn with exact attention; refuse one that is not quicker.

        It is the least of many times that were measured, which is too small on average.  In all
        pairs but one it has to be quicker: what is as quick wins one of two.
        """
        own: list[float] = []
        exact: list[float] = []
        while not own or (len(own) < PAIRS and sum(own) + sum(exact) < PAIRED_SECONDS):
            exact.append(run(self.problem, None, self.task.seed)[1])
            own.append(run(self.problem, setting.method, self.task.seed)[1])
        setting.seconds = statistics.median(own)
        self.exact_seconds = statistics.median(exact)
        quicker = sum(one < other for one, other in zip(own, exact, strict=True))
        setting.refused |= quicker < max(1, len(own) - 1)
        setting.confirmed = True

    # --- certificates ---------------------------------------------------------------------------

    def certify(self, setting: Setting) -> ErrorCertificate | None:
        """Return the certificate of a setting, None where none can be below the tolerance."""
        output, _ = run(self.problem, setting.method, self.task.seed)
        return self.certificate(output, setting.estimate)

    def certificate(self, output: Array, estimate: float) -> ErrorCertificate | None:
        """Return the certificate of an output from fresh rows."""
        task = self.task
        array, factor = check_output(self.problem, output)
        known = know(self.problem, array, factor, guess=task.kind == "approximate")
        level = 1.0 - (1.0 - task.confidence) / ATTEMPTS
        rows = self.seen if self.everything else task.rows
        if rows is None and task.kind == "approximate":
            rows = APPROXIMATE_ROWS

        def perfect(count: int) -> float:
            """Return the certificate that this output would have if it were exact."""
            return certify_known(
                known,
                lambda index: factor * array[index].astype(np.float64),
                count,
                level,
                self.stream(1),
                "finite-sample",
            ).high

        if rows is None:
            rows = COMPARED_ROWS
            while rows < self.seen:
                least = perfect(rows)
                both = math.hypot(least, estimate) <= TOGETHER * task.tolerance
                if both and least <= OUTPUT_SHARE * task.tolerance:
                    break
                rows *= 2
        elif rows < self.seen and task.kind == "finite-sample":
            least = perfect(rows)
            if math.hypot(least, estimate) > task.tolerance:
                self.least = least
                return None
        if rows < self.seen:
            self.attempts += 1
        fresh = self.stream(2, self.attempts)
        return certify_known(known, self.exact, rows, level, fresh, task.kind)

    # --- the search -----------------------------------------------------------------------------

    def result(self) -> Found:
        """Search, time again, certify; tighten and search again while attempts are left."""
        tolerance = self.task.tolerance
        while (best := self.cheapest()) is not None:
            if not best.confirmed:
                self.confirm(best)
                continue  # another one may be the cheapest now
            certificate = self.certify(best)
            if certificate is not None and certificate.high <= tolerance:
                return self.found(best, certificate, "")
            best.refused = True
            if certificate is None:
                if self.least >= tolerance:
                    return self.found(None, None, self.too_few())
                self.threshold = min(
                    MARGIN * self.threshold, math.sqrt(tolerance**2 - self.least**2)
                )
            elif certificate.kind != "exact":
                self.threshold = MARGIN * best.estimate
                if self.attempts >= ATTEMPTS:
                    return self.found(None, None, self.unlucky(certificate))
        return self.found(None, None, self.none())

    def found(
        self, best: Setting | None, certificate: ErrorCertificate | None, reason: str
    ) -> Found:
        """Return the result."""
        if best is None and self.everything:
            certificate = self.certificate(run(self.problem, None, self.task.seed)[0], 0.0)
        return Found(
            str(self.problem.name),
            best,
            certificate,
            self.exact_seconds,
            reason,
            list(self.settings.values()),
            self.failures,
            self.attempts,
            min(self.in_time(), key=lambda s: s.estimate, default=None),
        )

    def in_time(self) -> list[Setting]:
        """Return the settings that are quicker than exact attention."""
        found = self.settings.values()
        return [s for s in found if s.seconds < self.exact_seconds and not s.refused]

    def none(self) -> str:
        """Say that nothing within the tolerance is cheaper."""
        count = len(self.task.variants)
        if not count:
            return "no method honours this head"
        if not self.in_time():
            return f"no method of {count} is cheaper at any rank"
        return f"no method of {count} is cheaper within {self.task.tolerance:g}"

    def too_few(self) -> str:
        """Say that not even an exact output could be certified."""
        return (
            f"from {self.task.rows} rows not even an exact output has a certificate below "
            f"{self.least:.2g}; raise rows, or choose kind='approximate'"
        )

    def unlucky(self, last: ErrorCertificate) -> str:
        """Say that the attempts are spent."""
        return (
            f"no certificate in {ATTEMPTS} attempts was below {self.task.tolerance:g}, the last "
            f"one {last.high:.2g} from {last.rows} rows; raise rows or the tolerance"
        )
