"""What every method is: hyper-parameters, a draw, and the approximation that they make."""

from __future__ import annotations

import ast
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator
from sklearn.base import BaseEstimator

from ..base.arguments import (
    as_array,
    check_count,
    check_finite,
    check_rank,
    closest,
    float_dtype,
    prepare,
    stacked,
)
from ..base.content import qualified_name
from ..base.draws import (
    Draw,
    Origin,
    Rng,
    as_generator,
    check_origin,
    entropy_of,
    head_generator,
    of_head,
    seed_of,
)
from ..base.quiet import quiet
from ..kernels._threads import blas_single_thread
from ..operators.base import AttentionOperator
from ..operators.pullback import Gradient
from ..operators.steep import check_overflow
from ..operators.wrapped import as_operator
from ..problem import AttentionProblem

if TYPE_CHECKING:
    from .decoding import DecodingState

Array = NDArray[Any]
M = TypeVar("M", bound="type[Method]")

# Positions that a decoder is expected to reach, at least, where nothing is said.
EXPECTED = 4096

_REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Traits:
    """State what a method can do and what its approximation is promised to be.

    Attributes
    ----------
    causal, key_mask, rectangular : bool
        Causal problems, masked keys and ``n_q != n_k`` are honoured; otherwise refused.
    randomized : bool
        The draw depends on ``rng``.
    row_stochastic, nonnegative : bool
        Rows of ``Ahat`` that see a key sum to one; entries are not negative.  Where columns are
        drawn for all rows and nothing stands for the others, rows that see none of them are zero.
    target : str
        The matrix that is approximated: "softmax" or the name of another kernel.
    claims : tuple of str
        Ids of the claims that are about this method.
    uses_rank : bool
        The result depends on ``rank``.
    oracle : bool
        Looks at the exact matrix: a floor for others, not a method of its own.  An oracle that
        is not causal still accepts causal problems, since its matrix is compared, never used.
    exact_at_full_rank : bool
        ``Ahat = A`` when ``rank = n_k``.
    autoregressive : bool
        On causal problems no row depends on later keys, the draw included.  Otherwise ``Ahat`` has
        no entry above the diagonal, but which rows or columns are exact was chosen by looking at
        later ones: good for comparing matrices, not for a decoder.
    matrix : bool
        The output is ``Ahat V`` with a matrix that does not depend on V; otherwise `approximate`
        refuses, `Method.attend` gives the output, and errors of the matrix are unknown.
    differentiable : bool
        At a fixed draw the output has a derivative with respect to Q, K and V, which `Method.vjp`
        applies.
    causal_form : bool
        It makes another method causal, and is that method where there is no causal mask.
    logsumexp : bool
        The normaliser of every row is known on the scale of the exact logits, which
        `Method.attend_with_lse` gives: outputs over disjoint sets of keys can be merged by it.
    quadratic : bool
        Every pair of a query and a key is looked at, in blocks: not cheaper than exact attention
        where heads are long.
    decoding : bool
        `Method.state` holds keys to which a decoder appends.
    """

    causal: bool = False
    key_mask: bool = False
    rectangular: bool = True
    randomized: bool = True
    row_stochastic: bool = False
    nonnegative: bool = False
    target: str = "softmax"
    claims: tuple[str, ...] = ()
    uses_rank: bool = True
    oracle: bool = False
    exact_at_full_rank: bool = False
    autoregressive: bool = True
    matrix: bool = True
    differentiable: bool = False
    logsumexp: bool = False
    causal_form: bool = False
    quadratic: bool = False
    decoding: bool = False


def register(name: str) -> Callable[[M], M]:
    """Register a method class under its lower-case name; every contract test then runs on it.

    A class that is defined again, as in a notebook, takes the place of its earlier self.
    """

    def add(cls: M) -> M:
        known = _REGISTRY.get(name)
        if known is not None and qualified_name(known) != qualified_name(cls):
            raise ValueError(f"method name {name!r} must be unique; it is taken")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Method]]:
    """Return all methods as a dictionary from names to classes, in alphabetical order.

    Examples
    --------
    >>> import sketchattn as sa
    >>> "exact" in sa.methods()
    True
    """
    return dict(sorted(_REGISTRY.items()))


def make_method(method: str | type[Method] | Method, parameters: Mapping[str, Any]) -> Method:
    """Return the method object that a name or class with parameters, or an object, stands for."""
    if isinstance(method, Method):
        if parameters:
            raise ValueError(
                f"parameters must be given to the method object itself, got "
                f"{sorted(parameters)} beside {method!r}; use set_params"
            )
        return cast(Method, method)
    if isinstance(method, str):
        return _construct(method_class(method), parameters)
    if isinstance(method, type) and issubclass(method, Method):
        return _construct(method, parameters)
    given = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
    raise TypeError(
        f"method must be a name or a method object, got {given}; see sketchattn.methods()"
    )


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the parameters of ``name`` or ``name(parameter=value, ...)``.

    Values are Python literals; other words are strings.

    Examples
    --------
    >>> parse_method("skeinformer(causal_form=corrected, mix=0.5)")
    ('skeinformer', {'causal_form': 'corrected', 'mix': 0.5})
    """
    name, opened, rest = text.strip().partition("(")
    if not opened:
        return name, {}
    inside = rest.rstrip()
    parameters: dict[str, Any] = {}
    if not inside.endswith(")"):
        raise ValueError(f"method must end with its closing bracket, got {text!r}; add it")
    for part in split_outside(inside[:-1]):
        label, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not label.isidentifier() or label in parameters:
            raise ValueError(
                f"method must be written as name(parameter=value, ...), each parameter once, got "
                f"{part!r} in {text!r}; for instance skeinformer(law=uniform)"
            )
        try:
            parameters[label] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[label] = value
    return name.strip(), parameters


def split_outside(text: str) -> list[str]:
    """Return what stands between the commas that are outside of brackets, without empty words.

    Examples
    --------
    >>> split_outside("a, b(c=(1, 2)), d")
    ['a', 'b(c=(1, 2))', 'd']
    """
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def method_class(name: str) -> type[Method]:
    """Return the class of a registered name, or of the name of a class."""
    if name in _REGISTRY:
        return _REGISTRY[name]
    for cls in _REGISTRY.values():
        if cls.__name__ == name:
            return cls
    raise ValueError(f"method must be registered, got {name!r}{closest(name, _REGISTRY)}")


def _construct(cls: type[Method], parameters: Mapping[str, Any]) -> Method:
    known, method = _parameters(cls), getattr(cls, "name", cls.__name__)
    for name in parameters:
        if name not in known:
            hint = closest(name, known) if known else "; it takes no parameters"
            raise TypeError(f"{name} must be a parameter of method {method!r}, got {name!r}{hint}")
    if _needs_rank(cls) and "rank" not in parameters:
        raise TypeError(f"rank must be given for method {method!r}, got none; pass rank=")
    return cls(**parameters)


@functools.cache
def _parameters(cls: type[Method]) -> Mapping[str, inspect.Parameter]:
    """Return what a method is made with, by name: kept, for reading a signature takes long."""
    names = set(cls._get_param_names())
    return {name: x for name, x in inspect.signature(cls).parameters.items() if name in names}


def _needs_rank(cls: type[Method]) -> bool:
    """Return whether a method has a rank without a default."""
    rank = _parameters(cls).get("rank")
    return rank is not None and rank.default is rank.empty


def inner_method(inner: object, rank: int) -> Method:
    """Return the method inside another one, a name or an object, at ``rank`` where it has one."""
    from sklearn.base import clone

    if not isinstance(inner, str | Method):
        raise TypeError(
            f"inner must be a name or a method object, got {type(inner).__name__}; "
            f"see sketchattn.methods()"
        )
    if isinstance(inner, str):
        cls = _REGISTRY.get(inner)
        ranked = cls is not None and "rank" in cls._get_param_names()
        return make_method(inner, {"rank": rank} if ranked else {})
    if not inner.traits.uses_rank or getattr(inner, "rank", rank) == rank:
        return inner
    chosen: Method = clone(inner)
    if "rank" in chosen.get_params(deep=False):
        chosen.set_params(rank=rank)
    return chosen


def check_problem(problem: object) -> None:
    """Refuse what is no problem."""
    if not isinstance(problem, AttentionProblem):
        raise TypeError(
            f"problem must be an AttentionProblem, got {type(problem).__name__}; "
            f"make one with sketchattn.AttentionProblem(q, k, v)"
        )


class Method(BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is not typed
    """Hold the hyper-parameters of one way to approximate ``A``; no data.

    A subclass names its parameters in ``__init__`` (scikit-learn's convention) and states its
    ``traits``.  What it defines sees checked arguments only:

    - ``_draw(problem, rng)`` returns all that is random, a mapping from ``draw_names`` to arrays;
      without it nothing is;
    - ``_approximate(problem, draw)`` returns ``Ahat`` (n_q, n_k), an operator or an array;
    - ``_attend(problem, draw)`` returns ``Ohat`` (n_q, d_v): a shorter way to the output, or the
      only one, where ``traits.matrix`` is False and there is no ``_approximate``.

    ``sketchattn.register("name")`` over the class makes it a method by name.  BLAS has one thread
    in all of these, for the same bits on any machine.

    Examples
    --------
    >>> import numpy as np, sketchattn as sa
    >>> class Few(sa.Method):
    ...     traits = sa.Traits(key_mask=True, row_stochastic=True, nonnegative=True)
    ...     draw_names = ("keys",)
    ...     def __init__(self, rank):
    ...         self.rank = rank
    ...     def _draw(self, problem, rng):
    ...         return {"keys": rng.choice(problem.kept_keys, self.rank, replace=False)}
    ...     def _approximate(self, problem, draw):
    ...         ahat = np.zeros((problem.n_q, problem.n_k))
    ...         ahat[:, draw["keys"]] = problem.exact.columns(draw["keys"])
    ...         return ahat / ahat.sum(axis=1, keepdims=True)
    >>> heads = sa.make_heads("gaussian", n=32, d=8, rng=0)
    >>> sa.study(heads, [Few, "uniform"], ranks=[4, 8], seeds=2).frame.method.unique().tolist()
    ['few', 'uniform']
    """

    name: str
    draw_names: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__.lower()
        quiet(cls)

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """What the method can do and what its approximation is promised to be."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name, as scikit-learn does."""
        for name in self._get_param_names():
            if not hasattr(self, name):
                raise AttributeError(
                    f"parameters must be kept under their names, got no attribute {name!r} of "
                    f"{type(self).__name__}; write self.{name} = {name} in __init__"
                )
        found: dict[str, Any] = super().get_params(deep=deep)
        return found

    def check(self, problem: AttentionProblem) -> None:
        """Refuse a problem that this method cannot honour, or hyper-parameters out of range."""
        check_problem(problem)
        self._check_for(problem, problem.n_k)

    def _check_for(self, problem: AttentionProblem, keys: int) -> None:
        """Refuse the same, with a rank for so many keys."""
        traits = self.traits
        if problem.causal and not traits.causal and not traits.oracle:
            raise ValueError(
                f"causal must be False for method {self.name!r}, which sees all keys, got "
                f"{problem.causal!r}; use a method whose traits.causal is True"
            )
        if problem.key_mask is not None and not traits.key_mask:
            raise ValueError(
                f"key_mask must be None for method {self.name!r}, got a mask; "
                f"delete the masked keys first"
            )
        if problem.n_q != problem.n_k and not traits.rectangular:
            raise ValueError(
                f"n_q and n_k must be equal for method {self.name!r}, got {problem.n_q} and "
                f"{problem.n_k}; use a method whose traits.rectangular is True"
            )
        if hasattr(self, "rank") and (self.rank is not None or _needs_rank(type(self))):
            check_rank(self.rank, keys)
        self._check_parameters()
        check_overflow(problem)

    def _check_parameters(self) -> None:
        """Refuse hyper-parameters out of range; the base class knows only ``rank``."""

    @blas_single_thread()
    def draw(self, problem: AttentionProblem, rng: Rng = None) -> Draw:
        """Return everything random that the method uses on a problem.

        Parameters
        ----------
        problem : AttentionProblem
        rng : None, int or numpy.random.Generator
            The same integer gives the same draw.

        Returns
        -------
        Draw
            Named arrays; empty for deterministic methods.
        """
        made = self._checked(problem, rng, None)
        made.origin = Origin(self._described(), seed_of(rng), problem)
        return made

    def draw_heads(self, problems: Sequence[AttentionProblem], rng: Rng = None) -> list[Draw]:
        """Return the draw of each of many heads, as `sketchattn.attention` makes them of (h, n, d).

        Parameters
        ----------
        problems : sequence of AttentionProblem
        rng : None, int or numpy.random.Generator
            Each head has a stream of its own, which does not depend on how many there are.

        Returns
        -------
        list of Draw
            ``draw.origin`` has the seed, and ``(0, i)`` as the head.

        Examples
        --------
        >>> import sketchattn as sa
        >>> heads = sa.make_heads("gaussian", n=16, d=4, heads=3, rng=0)
        >>> draws = sa.UniformColumns(rank=4).draw_heads(heads, rng=0)
        >>> out = sa.attention(heads.q, heads.k, heads.v, "uniform", rank=4, draw=draws)
        >>> bool((out == sa.attention(heads.q, heads.k, heads.v, "uniform", rank=4, rng=0)).all())
        True
        """
        entropy = entropy_of(rng)
        draws = []
        for i, problem in enumerate(problems):
            drawn = self.draw(problem, head_generator(entropy, 0, i))
            draws.append(of_head(drawn, rng, 0, i))
        return draws

    def _described(self) -> str:
        """Return the method with the parameters that are not defaults; arrays by their shapes."""
        known = _parameters(type(self)).items()
        pairs = [(name, getattr(self, name), p.default) for name, p in known]
        texts = (f"{name}={_short(x)}" for name, x, default in pairs if _short(x) != repr(default))
        return f"{self.name}({', '.join(texts)})"

    @blas_single_thread()
    def approximate(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> AttentionOperator:
        """Return ``Ahat`` for a problem.

        Parameters
        ----------
        problem : AttentionProblem
        rng : None, int or numpy.random.Generator
            Makes the draw; not together with ``draw``.
        draw : mapping from names to arrays, optional
            A draw to use: bit-identical to passing the ``rng`` that made it.

        Returns
        -------
        AttentionOperator
            Of shape (n_q, n_k).

        Raises
        ------
        TypeError, ValueError
            If the method cannot honour the problem, for hyper-parameters out of range, or for a
            draw that does not fit.
        """
        return self._operator(problem, self._checked(problem, rng, draw))

    def _operator(self, problem: AttentionProblem, draw: Draw) -> AttentionOperator:
        """Return `_approximate` as an operator."""
        made = self._approximate(problem, draw)
        return made if isinstance(made, AttentionOperator) else as_operator(made, problem)

    @blas_single_thread()
    def attend(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> Array:
        """Return ``Ohat = Ahat V``, also where ``traits.matrix`` is False and there is no ``Ahat``.

        Parameters
        ----------
        problem : AttentionProblem
            With values.
        rng, draw
            As for `approximate`.

        Returns
        -------
        ndarray (n_q, d_v)

        Raises
        ------
        TypeError, ValueError
            As `approximate`, and for a problem without values.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> sa.UniformColumns(rank=4).attend(problem, rng=0).shape
        (16, 4)
        """
        return self._output(problem, self._run(problem, rng, draw))

    def _run(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Array:
        """Return `attend`; overridden by methods that draw and attend in one pass."""
        return self._attend(problem, self._checked(problem, rng, draw))

    def _attend(self, problem: AttentionProblem, draw: Draw) -> Array:
        """Return ``Ohat`` (n_q, d_v); arguments are checked.

        Defined by methods that have a shorter way, and by those without a matrix, whose
        ``traits.matrix`` is False.
        """
        if self.traits.logsumexp:
            return self._attend_with_lse(problem, draw)[0]
        values = problem.arrays.v  # writeable, unlike problem.values: kernels need no copy
        ahat = self._operator(problem, draw)
        return np.asarray(ahat @ (problem.values if values is None else values))

    def _output(self, problem: AttentionProblem, found: object) -> Array:
        """Return what a hook gave as an output of the problem, in its precision."""
        out = found if isinstance(found, np.ndarray) else as_array(found, "output")
        wanted = (problem.n_q, problem.values.shape[1])
        if out.shape != wanted:
            raise ValueError(
                f"output of {type(self).__name__} must have shape (n_q, d_v) = {wanted}, got "
                f"{out.shape}; correct its _attend"
            )
        return np.asarray(out, problem.dtype)

    @blas_single_thread()
    def attend_with_lse(
        self,
        problem: AttentionProblem,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> tuple[Array, Array]:
        """Return ``Ohat`` and the log of the normaliser that each of its rows was divided by.

        ``lse_i`` stands for ``ln sum_j e^{L_ij}`` with the exact logits ``L = scale Q K^T``, so
        that outputs over disjoint sets of keys merge like exact ones: with
        ``l = logaddexp(l1, l2)``, ``o = e^{l1 - l} o1 + e^{l2 - l} o2``.

        Parameters
        ----------
        problem : AttentionProblem
            With values.
        rng, draw
            As for `approximate`.

        Returns
        -------
        output : ndarray (n_q, d_v)
            What `attend` returns.
        lse : ndarray (n_q,)
            -inf for a row without a normaliser, whose output is zero.

        Raises
        ------
        TypeError, ValueError
            As `attend`, and for a method whose ``traits.logsumexp`` is False.

        Examples
        --------
        >>> import numpy as np, sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0]
        >>> output, lse = sa.Exact().attend_with_lse(problem)
        >>> bool(np.allclose(lse, problem.logsumexp))
        True
        """
        check_problem(problem)
        if not self.traits.logsumexp:
            raise ValueError(
                f"method must know the normaliser of its rows, got {self!r}; use a method whose "
                f"traits.logsumexp is True"
            )
        return self._attend_with_lse(problem, self._checked(problem, rng, draw))

    def _attend_with_lse(self, problem: AttentionProblem, draw: Draw) -> tuple[Array, Array]:
        """Return `attend_with_lse`; the draw is checked, for instance by `_checked`."""
        raise TypeError(f"{type(self).__name__} must define _attend_with_lse: its traits say so")

    @blas_single_thread()
    def state(self, problem: AttentionProblem, length: int | None = None) -> DecodingState:
        """Return what this method holds of a decoder's keys, with those of a prompt.

        New keys are appended one by one, and the rows of the newest positions are those of the
        causal `attend` on all keys up to there.

        Parameters
        ----------
        problem : AttentionProblem
            The prompt: causal, with values, perhaps with masked keys, perhaps without any key.  Its
            queries are not used; their outputs are those of `attend`.
        length : int, optional
            Positions that are expected in all, prompt counted, at least 1: what a method chooses
            by the number of keys is chosen for so many, and stays.  More may come.  None: those of
            the prompt, 4096 at least.

        Returns
        -------
        DecodingState
            With `DecodingState.append` and `DecodingState.attend`.

        Raises
        ------
        TypeError, ValueError
            As `attend`; for a problem that is not causal; and for a method whose
            ``traits.decoding`` is False.

        Examples
        --------
        >>> import numpy as np, sketchattn as sa
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 80, 4))
        >>> prompt = sa.AttentionProblem(q[:70], k[:70], v[:70], causal=True)
        >>> method = sa.NearFar(block=16, clusters=4)
        >>> state = method.state(prompt)
        >>> state.append(k[70:], v[70:])
        >>> whole = method.attend(sa.AttentionProblem(q, k, v, causal=True))
        >>> bool(np.allclose(state.attend(q[70:]), whole[70:]))
        True
        """
        check_problem(problem)
        if not self.traits.decoding:
            raise ValueError(
                f"method must hold keys of a decoder, got {self!r}; use a method whose "
                f"traits.decoding is True"
            )
        if not problem.causal:
            raise ValueError(
                "causal must be True for the prompt of a decoder, got False; make the problem "
                "with causal=True"
            )
        _ = problem.values
        if length is not None:
            check_count(length, "length", "it is the number of positions that are expected")
        expected = max(problem.n_k, EXPECTED if length is None else int(length))
        self._check_for(problem, expected)
        return self._state(problem, expected)

    def _state(self, problem: AttentionProblem, length: int) -> DecodingState:
        """Return `state`; arguments are checked."""
        raise TypeError(f"{type(self).__name__} must define _state, since its traits promise it")

    @blas_single_thread()
    def attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        *,
        draw: Mapping[str, Any] | list[Any] | tuple[Any, ...] | None = None,
    ) -> Array:
        """Return ``Ohat`` of many heads: what `attend` returns for each, to the bit.

        Passes of some methods take many heads, so that small heads share the threads.

        Parameters
        ----------
        problems : sequence of AttentionProblem
            H problems with values that differ in their arrays and masks only, H at least 1.
        rngs : sequence of None, int or numpy.random.Generator
            One for each head.
        draw : mapping from names to arrays, or a sequence of them, optional
            One draw that all heads use, whichever it was made for, or one for each head; ``rngs``
            are None then.

        Returns
        -------
        ndarray (H, n_q, d_v)

        Raises
        ------
        TypeError, ValueError
            As `attend`.

        Examples
        --------
        >>> import sketchattn as sa
        >>> problems = [sa.make_heads("gaussian", n=16, d=4, rng=s)[0] for s in range(3)]
        >>> sa.Skeinformer(rank=4).attend_heads(problems, [0, 1, 2]).shape
        (3, 16, 4)
        """
        if isinstance(draw, list | tuple):
            triples = zip(problems, rngs, draw, strict=True)
            return stacked([self.attend(problem, rng, draw=x) for problem, rng, x in triples])
        shared = draw.detach() if isinstance(draw, Draw) and len(problems) > 1 else draw
        return self._attend_heads(problems, rngs, shared)

    def _attend_heads(
        self,
        problems: Sequence[AttentionProblem],
        rngs: Sequence[Rng],
        draw: Mapping[str, Any] | None,
    ) -> Array:
        """Return `attend_heads`; overridden by methods whose passes take many heads."""
        pairs = zip(problems, rngs, strict=True)
        return stacked([self.attend(problem, rng, draw=draw) for problem, rng in pairs])

    @blas_single_thread()
    def vjp(
        self,
        problem: AttentionProblem,
        cotangent: ArrayLike,
        rng: Rng = None,
        *,
        draw: Mapping[str, Any] | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return the vector-Jacobian product of `attend` at a fixed draw.

        For ``f(Q, K, V) = sum_ic G_ic Ohat_ic(Q, K, V)`` with the cotangent G these are
        ``df/dQ``, ``df/dK`` and ``df/dV``: gradients of the program that is run with this draw.

        Parameters
        ----------
        problem : AttentionProblem
            With values.
        cotangent : array (n_q, d_v)
            G, finite; floating point of any precision.
        rng, draw
            As for `approximate`.

        Returns
        -------
        dq, dk, dv : ndarray (n_q, d), (n_k, d), (n_k, d_v)
            In the precision of the problem; zero for masked keys.

        Raises
        ------
        TypeError, ValueError
            As `attend`; for a method whose ``traits.differentiable`` is False; and for a cotangent
            of another shape or dtype, or that is not finite.

        Notes
        -----
        All that a draw holds is constant, also where it was computed from Q, K and V: columns and
        their weights or probabilities, pilot rows, random features, projections, labels, landmarks
        that were drawn.  What the method computes from Q, K and V beside it is differentiated:
        normalisers, fills, means of segments or clusters, small inverses.  Choices that change by
        jumps, such as the place of a maximum or which entries are largest, stay as they are, which
        is the derivative wherever there is one; they are made in float64, so that of two that
        float32 cannot tell apart `attend` may have taken the other one.

        Computed in float64 and rounded once.  No array of n_q x n_k is held, and the cost is a
        small multiple of that of `attend`.

        Examples
        --------
        >>> import numpy as np, sketchattn as sa
        >>> problem = sa.make_heads("gaussian", n=16, d=4, rng=0)[0].astype(np.float64)
        >>> method = sa.UniformColumns(rank=4)
        >>> draw = method.draw(problem, rng=0)
        >>> dq, dk, dv = method.vjp(problem, np.ones((16, 4)), draw=draw)
        >>> moved = sa.AttentionProblem(problem.q, problem.k, problem.v + 0.5)
        >>> change = method.attend(moved, draw=draw) - method.attend(problem, draw=draw)
        >>> bool(np.isclose(change.sum(), 0.5 * dv.sum()))
        True
        """
        check_problem(problem)
        if not self.traits.differentiable:
            raise ValueError(
                f"method must be differentiable at a fixed draw for its vjp, got {self!r}; use a "
                f"method whose traits.differentiable is True"
            )
        made = self._checked(problem, rng, draw)
        g = as_array(cotangent, "cotangent")
        float_dtype(g, "cotangent")
        wanted = (problem.n_q, problem.values.shape[1])
        if g.shape != wanted:
            raise ValueError(
                f"cotangent must have shape (n_q, d_v) = {wanted}, got {g.shape}; give one weight "
                f"for each entry of the output"
            )
        check_finite(g, "cotangent")
        wide = problem.astype(np.float64)
        found = self._vjp(wide, made, prepare(g, np.dtype(np.float64)))
        dq, dk, dv = (prepare(x, problem.dtype) for x in found)
        return dq, dk, dv

    def _vjp(self, problem: AttentionProblem, draw: Draw, cotangent: Array) -> Gradient:
        """Return `vjp`; all is checked and in float64, and none of it may be written into."""
        raise TypeError(f"{type(self).__name__} must define _vjp, since its traits promise it")

    def _checked(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any] | None) -> Draw:
        """Return the draw that ``rng`` makes, or the one given, checked as the problem is."""
        self.check(problem)
        if draw is not None:
            return self._handed_in(problem, rng, draw)
        made = self._draw(problem, as_generator(rng))
        if type(self).__module__.startswith(__package__):
            return cast(Draw, made)
        if set(made) != set(self.draw_names):
            raise TypeError(
                f"draw_names of {type(self).__name__} must name what its _draw returns, "
                f"{tuple(made)}, got {self.draw_names}; correct one of them"
            )
        return Draw({name: as_array(made[name], f"draw[{name!r}]") for name in made})

    def _handed_in(self, problem: AttentionProblem, rng: Rng, draw: Mapping[str, Any]) -> Draw:
        """Return the draw that was handed in, checked; refuse an rng beside it."""
        if rng is not None:
            raise ValueError("rng must be None when draw is given, got both; pass one of them")
        check_origin(draw, problem)
        return self._check_draw(problem, draw)

    def _check_draw(self, problem: AttentionProblem, draw: Mapping[str, Any]) -> Draw:
        from ..base.draws import check_draw

        return check_draw(draw, self.draw_names)

    def _draw(self, problem: AttentionProblem, rng: np.random.Generator) -> Mapping[str, Array]:
        """Return all that is random, by name; arguments are checked.  By default nothing is."""
        return Draw()

    def _approximate(
        self, problem: AttentionProblem, draw: Draw
    ) -> AttentionOperator | LinearOperator | Array:
        """Return ``Ahat`` (n_q, n_k), an operator or an array; arguments are checked."""
        cls = type(self).__name__
        if not self.traits.matrix:
            raise ValueError(
                f"method must have a matrix to approximate with, got {self!r}, which gives "
                f"outputs only; use attend"
            )
        raise TypeError(
            f"{cls} must define _approximate, or _attend and traits with matrix=False, got neither"
        )


@dataclass(frozen=True)
class InFloat64:
    """Make the same approximation in float64 when it is called.

    It is pickled with the operator that keeps it; a function inside a method could not be.

    Attributes
    ----------
    build : callable
        A bound method, of a problem and ``rest``.
    problem : AttentionProblem
    rest : tuple
    """

    build: Callable[..., Any]
    problem: AttentionProblem
    rest: tuple[Any, ...] = ()

    @blas_single_thread()
    def __call__(self) -> Any:
        """Return the approximation in float64."""
        return self.build(self.problem.astype(np.float64), *self.rest)


quiet(Method)


def _short(value: object) -> str:
    """Return a parameter as text, an array by its shape."""
    shape = getattr(value, "shape", None)
    if shape:
        return f"array{tuple(shape)}"
    return value._described() if isinstance(value, Method) else repr(value)


C = TypeVar("C", bound="NamedTuple")


def in_force(method: Method, default: C, presets: Mapping[str, Mapping[str, Any]]) -> C:
    """Return the choices of a method: its arguments named like the fields, then its preset's."""
    preset = presets.get(str(method.preset), {})
    return type(default)(*(preset.get(x, getattr(method, x)) for x in default._fields))


def check_preset(
    method: Method,
    default: NamedTuple,
    presets: Mapping[str, Mapping[str, Any]],
    *,
    whole: bool = False,
    show: Callable[[object], str] = repr,
) -> None:
    """Refuse an unknown preset, and arguments that say something else than the preset.

    ``whole``: a preset settles all fields of ``default``; otherwise those that it changes.
    ``show`` writes an argument in the message.
    """
    name = method.preset
    if name is None:
        return
    if name not in presets:
        raise ValueError(f"preset must be a known name, got {name!r}{closest(str(name), presets)}")
    for label in default._fields if whole else presets[name]:
        given, standard = getattr(method, label), getattr(default, label)
        wanted = presets[name].get(label, standard)
        if not any(type(given) is type(x) and given == x for x in (standard, wanted)):
            raise ValueError(
                f"{label} must be left at {standard!r} with preset {name!r}, which sets it to "
                f"{wanted!r}, got {show(given)}; drop one of them"
            )
