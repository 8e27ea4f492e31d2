"""Skeinformer: column sampling by pilot rows, adaptive row normalisation, pilot reuse.

With the sampled columns J (r of them) and ``S = L[:, J]`` a row of ``Ahat`` is ``exp(S_it) / D_i``
on J and ``g_i / D_i`` on the m - r other keys, ``D_i = sum_t exp(S_it) + (m - r) g_i``, and the
rows that were computed exactly to choose J, the pilots, are kept.  All of it is done with
logarithms relative to a row's largest logit: no exponential can overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...base.arguments import check_choice, check_flag, check_rank
from ...base.draws import Draw, Rng, as_generator, check_draw
from ...operators.base import AttentionOperator
from ...operators.factored import zero_attention
from ...operators.pullback import Gradient
from ...operators.sampled import SampledAttention
from ...operators.steep import check_overflow, softmax_tiles, steep_rows
from ...problem import AttentionProblem
from ...sampling.draws import gumbel_top, sample_with_replacement
from ...sampling.laws import (
    check_law,
    check_mix,
    check_pilots,
)
from ...sketches.base import streams
from ..base import Method, Traits, check_preset, in_force, register
from ..column_sampling import PRODUCT_CLAIMS, check_drawn, check_drawn_numbers, check_weights
from .components import (
    CAUSAL_FORMS,
    CLAIMS,
    FILLS,
    LAW_NAMES,
    NORMALIZER_CLAIMS,
    NORMALIZERS,
    PRESETS,
    SYNONYMS,
    VALUE_LAWS,
    WEIGHTS,
    Components,
    has_law,
    uses_pilots,
)
from .laws import Pilots, log_laws, seeing_rows, shared_stream, solve_pilots
from .products import merged, restricted, sampled_products, stored_product
from .records import ErrorTerms, SkeinformerDetails

Array = NDArray[Any]


@register("skeinformer")
class Skeinformer(Method):
    """Sample columns of A by a few exact rows, fill the rest of each row, keep the exact rows.

    ``Ahat_ij = exp(L_ij) / D_i`` for j in J, ``g_i / D_i`` for the other keys,
    ``D_i = sum_{j in J} exp(L_ij) + (m - r) g_i`` with m keys that are not masked, and
    ``Ahat_i = A_i`` for the pilot rows i in I.

    Parameters
    ----------
    rank : int
        Number of sampled columns r, in 1..n_k.
    law : {"pilot", "optimal", "value_norm", "uniform"} or array (n_k,)
        What columns are drawn by.  "pilot": ``(sum_{i in I} A_ij^2)^(1/2) |V_j|`` over I, s rows
        drawn uniformly with replacement; "optimal": the same over all rows (looks at all of A);
        ``|V_j|``; 1; or probabilities that sum to one.  Where a law is zero throughout it is
        uniform.  "exact" and "value" are other names of "optimal" and "value_norm".
    replace : bool, default False
        Whether a column can be drawn again.
    weights : {"none", "importance"}
        Factor of a drawn column: 1, or ``1/(r p_j)`` (``m/r`` for the uniform law without
        replacement; other laws without replacement have no such weight and are refused).
    normalizer : {"adaptive", "sampled", "exact"}
        Rows are divided by D above; by the sum over drawn columns; or by the exact sum over all
        keys, which looks at all of A.  "exact" without weights is biased low: rows of ``Ahat``
        sum to less than one.
    fill : {"geometric", "arithmetic", "oracle"}
        For "adaptive": g is the geometric or the arithmetic mean of the row's drawn entries, or
        the true mean of the others, which looks at all of A.
    pilot_reuse : bool, default True
        Whether the pilot rows, which are exact, replace those of the estimate; with every law.
    mix : float, default 0
        Share of the uniform law, in [0, 1].
    center_values : bool, default False
        Put ``|V_j - vbar|`` for ``|V_j|`` in the law, vbar the mean of the values; with importance
        weights and exact normalisers also estimate ``A (V - 1 vbar^T)`` and add vbar back.
    pilots : int or int array (s,), optional
        How many pilot rows to draw, or which rows; None is ``rank``.
    shared_pilots : bool, default False
        Whether all heads of a batch entry take the same pilot rows, as in the released code.
        ``attention`` gives each head a stream grown from one seed, and the rows then come from that
        seed.
    causal_form : {None, "corrected"}
        None refuses causal problems: neither paper nor code treats them.  "corrected" counts and
        averages, for each row, the keys that it sees (prefix sums).
    preset : str, optional
        A key of ``PRESETS``: a published ablation or a flag of the released code.  The
        components that it sets are left at their defaults.

    Raises
    ------
    ValueError, TypeError
        For combinations that are wrong: "adaptive" with importance weights (the fill stands for
        the other keys already), "adaptive" with replacement (a repeated column would be taken from
        the others twice), options that would be ignored.

    Notes
    -----
    Chen, Zeng, Hakkani-Tur, Jin, Ji and Yang (2022), arXiv 2112.05359, Algorithm 1, equations (5)
    and (6), for n_q != n_k, any number of pilots, and any key mask.  No published bound covers
    the adaptive normaliser; their Proposition 1 is about ``weights="importance"``,
    ``replace=True``, ``normalizer="exact"``, the method "column_sampling".

    Without replacement J is the r largest of ``ln p_j + Gumbel_j``, the law of drawing one after
    another; keys of probability zero are drawn only when ``rank`` asks for all keys and the law
    has a name; ``effective_rank`` says how many were.
    With ``pilots`` fixed a larger rank extends the draw of a smaller one; with
    ``pilots=None`` the law itself changes with the rank.

    A draw holds ``columns``, int64 (r,), the keys J; ``pilot_rows``, int64 (s,), the queries I in
    the order of drawing, a query as often as it was drawn, where law or pilot reuse has pilots; and
    ``weights`` and ``probabilities``, float64 (r,), with importance weights.

    The published ablations other than ``without_pilot_reuse`` were run without pilot reuse too
    (presets ``skein_*``), so that they measure two changes; ``uniform_law``, ``exact_normalizer``
    and ``sampled_normalizer`` change one.

    `attend` takes ``O(s n_k (d + d_v) + n_q r (d + d_v))`` in one pass, and holds neither weights
    nor pilot rows; with ``normalizer="exact"`` it is the product with the matrix.

    Causal problems: the corrected form approximates the causal matrix, row by row, but J is
    chosen from pilot rows that may lie later and see more: a decoder must not use it unless the
    law is uniform or given (``traits.autoregressive``).  Late keys are seen by few pilots: use
    ``mix`` > 0.

    Examples
    --------
    >>> import sketchattn as sa
    >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
    >>> method = Skeinformer(rank=4)
    >>> sorted(method.draw(problem, rng=0))
    ['columns', 'pilot_rows']
    >>> ahat = method.approximate(problem, rng=0)
    >>> ahat.effective_rank, bool(abs(ahat.row_sums() - 1).max() < 1e-6)
    (4, True)
    >>> bool(abs(method.attend(problem, rng=0) - ahat @ problem.v).max() < 1e-5)
    True
    """

    def __init__(
        self,
        rank: int,
        law: str | ArrayLike = "pilot",
        replace: bool = False,
        weights: str = "none",
        normalizer: str = "adaptive",
        fill: str = "geometric",
        pilot_reuse: bool = True,
        mix: float = 0.0,
        center_values: bool = False,
        pilots: int | ArrayLike | None = None,
        shared_pilots: bool = False,
        causal_form: str | None = None,
        preset: str | None = None,
    ) -> None:
        self.rank = rank
        self.law = law
        self.replace = replace
        self.weights = weights
        self.normalizer = normalizer
        self.fill = fill
        self.pilot_reuse = pilot_reuse
        self.mix = mix
        self.center_values = center_values
        self.pilots = pilots
        self.shared_pilots = shared_pilots
        self.causal_form = causal_form
        self.preset = preset

    @property
    def components(self) -> Components:
        """The choices in force: the arguments, and what the preset changes."""
        chosen = in_force(self, Components(), PRESETS)
        if isinstance(chosen.law, str):
            return chosen._replace(law=SYNONYMS.get(chosen.law, chosen.law))
        return chosen

    @property
    def traits(self) -> Traits:
        """Masks and shapes are honoured, causal problems by the corrected form."""
        c = self.components
        named = isinstance(c.law, str)
        centred = bool(self.center_values) and c.weights == "importance"
        return Traits(
            causal=self.causal_form is not None,
            key_mask=True,
            autoregressive=not named or c.law == "uniform",
            row_stochastic=c.normalizer != "exact" or (centred and c.normalizer == "exact"),
            nonnegative=not (centred and c.normalizer == "exact"),
            exact_at_full_rank=named and not c.replace,
            differentiable=True,
            claims=self._claims(c, centred),
        )

    def _claims(self, c: Components, centred: bool) -> tuple[str, ...]:
        """Return the ids of what is claimed of these components."""
        if c.weights == "none":
            return CLAIMS + NORMALIZER_CLAIMS.get(c.normalizer, ())
        # Proposition 1 is about draws with replacement and exact normalisers.
        covered = c.replace and c.normalizer == "exact" and not centred
        return PRODUCT_CLAIMS if covered else ()

    @property
    def draw_names(self) -> tuple[str, ...]:  # type: ignore[override]  # they depend on parameters
        """Names of the arrays of a draw."""
        c = self.components
        names = ("pilot_rows",) if uses_pilots(c) else ()
        more = ("weights", "probabilities") if c.weights == "importance" else ()
        return (*names, "columns", *more)

    # --- arguments ------------------------------------------------------------------------

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        if not (isinstance(problem, AttentionProblem) and problem.causal):
            super().check(problem)
            return
        if self.causal_form is None:
            raise ValueError(
                f"causal must be False for method 'skeinformer', which is published without a "
                f"causal form, got {problem.causal!r}; use causal_form='corrected'"
            )
        check_rank(self.rank, problem.n_k)
        self._check_parameters()
        check_overflow(problem)

    def _check_parameters(self) -> None:
        check_preset(self, Components(), PRESETS)
        for label in ("replace", "pilot_reuse", "center_values", "shared_pilots"):
            check_flag(getattr(self, label), label)
        for label, known in (
            ("weights", WEIGHTS),
            ("normalizer", NORMALIZERS),
            ("fill", FILLS),
            ("causal_form", CAUSAL_FORMS),
        ):
            value = getattr(self, label)
            if not (label == "causal_form" and value is None):
                check_choice(value, label, known)
        c = self.components
        if isinstance(c.law, str):
            check_choice(c.law, "law", LAW_NAMES, ", or an array")
        else:
            check_law(c.law)
        check_mix(self.mix)
        if self.pilots is not None:
            check_pilots(self.pilots)
        self._check_combination(c)

    def _check_combination(self, c: Components) -> None:
        if c.normalizer == "adaptive" and c.weights == "importance":
            raise ValueError(
                "weights must be 'none' with normalizer='adaptive', whose fill stands for the keys "
                "that are not drawn, got 'importance'; use normalizer='sampled' or 'exact'"
            )
        if c.normalizer == "adaptive" and c.replace:
            raise ValueError(
                "replace must be False with normalizer='adaptive', which takes each drawn column "
                "from the others once, got True; use normalizer='sampled' or 'exact'"
            )
        if c.weights == "importance" and not c.replace and not has_law(c, "uniform"):
            raise ValueError(
                "replace must be True with weights='importance' unless law='uniform': inclusion "
                "probabilities of a draw without replacement are not r p_j, got False; use "
                "law='uniform' or replace=True"
            )
        if c.normalizer != "adaptive" and c.fill != "geometric":
            raise ValueError(
                f"fill must be left at 'geometric' unless normalizer='adaptive', which alone has "
                f"a fill, got {c.fill!r} with {c.normalizer!r}; drop it"
            )
        if c.normalizer != "adaptive" and self.causal_form is not None:
            raise ValueError(
                f"causal_form must be None unless normalizer='adaptive', got "
                f"{self.causal_form!r} with {c.normalizer!r}; a row may see no drawn column"
            )
        centres = c.weights == "importance" and c.normalizer == "exact"
        if self.center_values and not centres and (
            not isinstance(c.law, str) or c.law not in VALUE_LAWS
        ):  # fmt: skip
            raise ValueError(
                f"center_values must be False where no values are looked at, got True with law "
                f"{c.law!r}; use one of the laws {', '.join(VALUE_LAWS)}"
            )
        if not uses_pilots(c) and (self.pilots is not None or self.shared_pilots):
            label = "pilots" if self.pilots is not None else "shared_pilots"
            raise ValueError(
                f"{label} must be left at its default without law='pilot' and pilot_reuse, got "
                f"{getattr(self, label)!r}; no pilot row is drawn"
            )

    # --- draw -----------------------------------------------------------------------------

    def _count(self, problem: AttentionProblem) -> int:
        """Return the number of pilot rows that a draw for this problem has."""
        if len(seeing_rows(problem)) == 0:
            return 0
        pilots = int(self.rank) if self.pilots is None else check_pilots(self.pilots)
        return pilots if isinstance(pilots, int) else len(pilots)

    def _draw_pilots(self, problem: AttentionProblem, rng: np.random.Generator) -> Array:
        given = None if self.pilots is None else check_pilots(self.pilots)
        if isinstance(given, np.ndarray):
            if not 0 <= given.min() <= given.max() < problem.n_q:
                raise ValueError(
                    f"pilots must be row indices in 0..{problem.n_q - 1}, got {int(given.min())}.."
                    f"{int(given.max())}; give indices of queries"
                )
            return given
        seeing = seeing_rows(problem)
        count = self._count(problem)
        return seeing[rng.integers(0, max(len(seeing), 1), size=count)] if count else seeing[:0]

    def _log_laws(self, problems: Sequence[AttentionProblem], pilots: Pilots | None) -> Array:
        mix, center = check_mix(self.mix), bool(self.center_values)
        return log_laws(problems, self.components.law, pilots, mix, center)

    def _sample(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[np.random.Generator],
        with_values: bool,
    ) -> tuple[list[Draw], Pilots | None]:
        """Return the draws of heads that are alike, and their pilots, with ``A_I V`` if asked."""
        c, r = self.components, int(self.rank)
        draws, pilots = [Draw() for _ in problems], None
        column_rngs = []
        for out, problem, rng in zip(draws, problems, rngs, strict=True):
            shared = shared_stream(rng) if self.shared_pilots else None
            pilot_rng, column_rng = streams(rng, 2)
            column_rngs.append(column_rng)
            if uses_pilots(c):
                drawn = self._draw_pilots(problem, pilot_rng if shared is None else shared)
                out["pilot_rows"] = drawn
        if uses_pilots(c) and (has_law(c, "pilot") or with_values):
            pilots = solve_pilots(problems, [x["pilot_rows"] for x in draws], with_values)
        laws = self._log_laws(problems, pilots)
        for out, problem, log_p, rng in zip(draws, problems, laws, column_rngs, strict=True):
            if c.replace:
                sampled = sample_with_replacement(np.exp(log_p), r, rng)
                out["columns"] = sampled.columns.copy()
            else:
                columns = gumbel_top(log_p, r, rng)[0]
                if isinstance(c.law, str) and r >= len(problem.kept_keys):
                    # All keys are asked for: those without a chance come last.
                    rest = np.setdiff1d(problem.kept_keys, columns)
                    columns = np.concatenate([columns, rest])
                out["columns"] = columns
            if c.weights == "importance":
                count, kept = len(out["columns"]), max(len(problem.kept_keys), 1)
                p = np.exp(log_p[out["columns"]]) if c.replace else np.full(count, count / kept)
                out["weights"] = 1.0 / (r * p) if c.replace else 1.0 / p
                out["probabilities"] = p
        return draws, pilots

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Draw:
        return self._sample([problem], [rng], False)[0][0]

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        c, rank = self.components, int(self.rank)
        checked = check_draw(draw, self.draw_names)
        out = Draw()
        if uses_pilots(c):
            out["pilot_rows"] = self._check_pilot_rows(problem, checked["pilot_rows"])
        replace = bool(c.replace)
        columns = check_drawn(checked["columns"], problem.kept_keys, rank, replace)
        out["columns"] = columns
        if c.weights == "importance":
            weights, p = (
                check_drawn_numbers(checked[label], label, len(columns))
                for label in ("weights", "probabilities")
            )
            check_weights(weights, p, rank, replace)
            out["weights"], out["probabilities"] = weights, p
        return out

    def _check_pilot_rows(self, problem: AttentionProblem, rows: Array) -> Array:
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(
                f"pilot_rows must be a one-dimensional integer array, got {rows.dtype} of shape "
                f"{rows.shape}; give indices of queries"
            )
        if len(rows) != self._count(problem):
            raise ValueError(
                f"pilot_rows must hold {self._count(problem)} queries, got {len(rows)}; change "
                f"pilots or the draw"
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < problem.n_q:
            raise ValueError(
                f"pilot_rows must be indices in 0..n_q - 1 = {problem.n_q - 1}, got "
                f"{int(rows.min())}..{int(rows.max())}; give indices of queries"
            )
        return rows.astype(np.int64)

    # --- what it makes --------------------------------------------------------------------

    def _approximate(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        if len(problem.kept_keys) == 0:
            return zero_attention(problem)
        c = self.components
        options: dict[str, Any] = {}
        if c.pilot_reuse:
            rows = np.unique(draw["pilot_rows"])
            options |= {"rows": rows, "row_weights": problem.exact.rows(rows)}
        if c.normalizer == "exact":
            columns, factors = merged(draw)
            entries = problem.exact.columns(columns)
            if factors is not None:
                entries *= factors.astype(problem.dtype)
            if self.center_values and c.weights == "importance":
                # A S^T S (V - 1 vbar^T) + 1 vbar^T spreads what rows lack over all keys.
                missing = (1 - entries.sum(axis=1)) / len(problem.kept_keys)
                entries += missing[:, None]
                options |= {"fill": missing, "keys": problem.key_mask}
        else:
            made = stored_product(self.components, problem, draw)
            columns, entries = made.columns, made.weights
            if c.normalizer == "adaptive":
                offset = problem.offset if problem.causal else None
                options |= {"fill": made.fill, "keys": problem.key_mask, "offset": offset}
        return SampledAttention(columns, entries, problem.n_k, len(columns), **options)

    def _run(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Array:
        """Return ``Ohat`` in one pass that holds neither weights nor pilot rows."""
        self.check(problem)
        _ = problem.values  # refuses a problem without them
        if self.components.normalizer == "exact" or len(problem.kept_keys) == 0:
            return super()._run(problem, rng, draw)
        return np.asarray(self._attend_alike([problem], [rng], draw)[0])

    def _attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return ``Ohat`` (H, n_q, d_v); each pass takes all heads at once."""
        for problem in problems:
            self.check(problem)
            _ = problem.values  # refuses a problem without them
        counts = {self._count(problem) for problem in problems}
        blind = any(len(problem.kept_keys) == 0 for problem in problems)
        if self.components.normalizer == "exact" or blind or len(counts) > 1:
            return super()._attend_heads(problems, rngs, draw)
        return self._attend_alike(problems, rngs, draw)

    def _attend_alike(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return ``Ohat`` of heads that are alike, see a key, and have equally many pilots."""
        c, pilots = self.components, None
        if draw is None:
            generators = [as_generator(rng) for rng in rngs]
            draws, pilots = self._sample(problems, generators, bool(c.pilot_reuse))
        else:
            pairs = zip(problems, rngs, strict=True)
            draws = [self._handed_in(problem, rng, draw) for problem, rng in pairs]
            if c.pilot_reuse:
                pilots = solve_pilots(problems, [x["pilot_rows"] for x in draws], True)
        chosen = [merged(x) for x in draws]
        sizes = np.array([len(columns) for columns, _ in chosen])
        first = problems[0]
        out = np.empty((len(problems), first.n_q, first.values.shape[1]), first.dtype)
        for size in np.unique(sizes):
            group = np.flatnonzero(sizes == size).tolist()
            columns, factors = zip(*(chosen[h] for h in group), strict=True)
            made, _ = sampled_products(c, [problems[h] for h in group], columns, factors, True)
            out[group] = made.out
        if c.pilot_reuse and pilots is not None:
            out[np.arange(len(out))[:, None], pilots.rows] = pilots.output
        return out

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        from .gradient import gradient

        return gradient(self.components, problem, draw, cotangent, bool(self.center_values))

    # --- what it did ----------------------------------------------------------------------

    def details(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> SkeinformerDetails:
        """Return what was drawn, from which law, and what rows were divided by.

        Parameters
        ----------
        problem : AttentionProblem
        rng, draw
            As for `approximate`.

        Returns
        -------
        SkeinformerDetails

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> details = Skeinformer(rank=4, fill="arithmetic").details(problem, rng=0)
        >>> bool(abs(details.mass_outside - (16 - 4) / 16).max() < 1e-6)
        True
        """
        checked = self._checked(problem, rng, draw)
        rows = checked.get("pilot_rows", np.zeros(0, np.int64))
        pilots = None
        if has_law(self.components, "pilot"):
            pilots = solve_pilots([problem], [rows], False)
        p = np.exp(self._log_laws([problem], pilots)[0])
        columns, _ = merged(checked)
        if len(problem.kept_keys) == 0 or self.components.normalizer == "exact":
            log_total = problem.logsumexp
            log_fill, outside = np.full_like(log_total, -np.inf), np.zeros_like(log_total)
        else:
            made = stored_product(self.components, problem, checked)
            log_total, log_fill = made.log_total, made.log_fill
            outside = made.mass_outside
        sums = self._approximate(problem, checked).row_sums()
        return SkeinformerDetails(
            pilot_rows=rows,
            columns=checked["columns"],
            probabilities=p,
            log_fill=log_fill,
            log_total=log_total,
            mass_outside=outside,
            effective_rank=len(columns),
            row_sums=(float(sums.min(initial=np.inf)), float(sums.max(initial=-np.inf))),
        )

    def error_terms(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> ErrorTerms:
        """Split the error of every row, as it is without pilot reuse, into its two causes.

        With tau and tauhat the mass of ``A_i`` and ``Ahat_i`` outside J, h and t the means of V
        over J and outside J weighted by A, and vbar the plain mean outside J,
        ``A_i V - Ohat_i = (tau - tauhat)(vbar - h) + tau (t - vbar)``; the normaliser "sampled"
        is the case tauhat = 0.  Looks at all of A.

        Parameters
        ----------
        problem : AttentionProblem
            With values.
        rng, draw
            As for `approximate`.

        Returns
        -------
        ErrorTerms

        Raises
        ------
        ValueError
            For exact normalisers and importance weights, which the identity does not cover.

        Examples
        --------
        >>> import numpy as np, sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0].astype(np.float64)
        >>> method = sa.Skeinformer(rank=4, pilot_reuse=False)
        >>> terms = method.error_terms(problem, rng=0)
        >>> error = problem.output - method.attend(problem, rng=0)
        >>> bool(np.allclose(terms.normalizer + terms.shape, error))
        True
        """
        from ...operators.visible_mean import VisibleMean

        c = self.components
        if c.normalizer == "exact" or c.weights == "importance" or c.replace:
            raise ValueError(
                f"normalizer must be 'adaptive' or 'sampled', without weights and replacement, for "
                f"these terms, got {c.normalizer!r}, {c.weights!r} and replace={c.replace!r}; "
                f"use sketchattn.error_report"
            )
        checked = self._checked(problem, rng, draw)
        values = problem.values
        made = stored_product(self.components, problem, checked)
        chosen = np.zeros(problem.n_k, bool)
        chosen[made.columns] = True
        others = ~chosen if problem.key_mask is None else problem.key_mask & ~chosen
        inside, outside = (restricted(problem, x, with_values=True) for x in (chosen, others))
        # Both logsumexps are -inf for a row that sees no key: its terms are zero.
        log_mass = np.logaddexp(inside.logsumexp, outside.logsumexp)
        seeing = np.isfinite(log_mass)
        tau = np.zeros(problem.n_q, problem.dtype)
        tau[seeing] = np.exp(outside.logsumexp[seeing] - log_mass[seeing])
        steep = steep_rows(problem)
        for positions, weights, _ in softmax_tiles(problem, steep):
            tau[steep[positions]] = weights[:, others].sum(axis=1)
        tau_hat = made.mass_outside if c.normalizer == "adaptive" else np.zeros_like(tau)
        mean = np.asarray(VisibleMean(outside) @ values)
        return ErrorTerms(
            normalizer=(tau - tau_hat)[:, None] * (mean - inside.output),
            shape=tau[:, None] * (outside.output - mean),
            mass=tau,
            mass_hat=tau_hat,
        )
