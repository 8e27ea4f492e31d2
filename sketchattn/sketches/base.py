"""What every sketch is: a shape, a scale, the arrays of its draw, and two products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator

from ..base.arguments import as_array, check_integer, closest, numpy_name
from ..base.draws import Rng, as_generator, entropy_of
from ..base.floating import without_floating_errors
from ..base.quiet import quiet

Array = NDArray[Any]

if TYPE_CHECKING:
    Operator = LinearOperator[Any]
else:
    Operator = LinearOperator  # SciPy's class can be subscripted from 1.17 on only
S = TypeVar("S", bound="Sketch")
C = TypeVar("C", bound="type[Sketch]")

# Entries of a piece of a sparse matrix that is made dense at a time.
SPARSE_ENTRIES = 1 << 22

_REGISTRY: dict[str, type[Sketch]] = {}


def register(kind: str) -> Callable[[C], C]:
    """Register a family of sketches under its lower-case name; every contract test runs on it."""

    def add(cls: C) -> C:
        if kind in _REGISTRY:
            raise ValueError(f"kind {kind!r} must be unique; it is taken")
        cls.kind = kind
        _REGISTRY[kind] = cls
        return cls

    return add


def sketches() -> dict[str, type[Sketch]]:
    """Return all families of sketches, from names to classes, in alphabetical order.

    Examples
    --------
    >>> from sketchattn.sketches import sketches
    >>> sorted(sketches())[:3]
    ['countsketch', 'dct', 'gaussian']
    """
    return dict(sorted(_REGISTRY.items()))


@without_floating_errors
def make_sketch(
    kind: str, r: int, n: int, rng: Rng = None, *, dtype: DTypeLike = np.float64, **parameters: Any
) -> Sketch:
    """Draw a sketch ``S`` of shape (r, n) with ``E[S^T S] = I_n``.

    Parameters
    ----------
    kind : str
        "gaussian", "rademacher", "uniform", "sparse", "countsketch", "sjlt", "osnap",
        "less_uniform", "srht", "dct" or "haar".
    r : int
        Rows: the number of measurements, at least 1.
    n : int
        Columns: the length of the vectors that are sketched, at least 1.
    rng : None, int or numpy.random.Generator
        The same integer gives the same bits, whatever the dtype (rounded last) and the number of
        threads.
    dtype : float32 or float64, default float64
        Precision of the products.
    **parameters
        Of the family: ``s`` of "sparse", "sjlt" and "osnap", ``t`` of "less_uniform",
        ``replace`` of "srht" and "dct".

    Returns
    -------
    Sketch
        Immutable; ``S @ X`` and ``S.T @ Y`` work.

    Raises
    ------
    TypeError
        For arguments of the wrong type, or a parameter that the family does not have.
    ValueError
        For an unknown kind, and sizes or parameters out of range.

    Notes
    -----
    With a larger ``r`` and the same ``rng``, the draws of "gaussian", "rademacher", "uniform",
    "sparse", "less_uniform", "srht" and "dct" extend the smaller one; "haar" does up to rounding.

    Examples
    --------
    >>> import numpy as np
    >>> from sketchattn.sketches import make_sketch
    >>> sketch = make_sketch("srht", 4, 8, rng=0)
    >>> (sketch @ np.ones((8, 3))).shape
    (4, 3)
    >>> bool(np.allclose(sketch @ sketch.to_dense().T, 2 * np.eye(4)))
    True
    """
    if not isinstance(kind, str):
        raise TypeError(
            f"kind must be a name, got {type(kind).__name__}; see sketchattn.sketches.sketches()"
        )
    if kind not in _REGISTRY:
        raise ValueError(f"kind must be a known sketch, got {kind!r}{closest(kind, _REGISTRY)}")
    return _REGISTRY[kind].draw(r, n, rng, dtype=dtype, **parameters)


def float_type(dtype: DTypeLike) -> np.dtype[Any]:
    """Return float32 or float64 as a dtype, and refuse others."""
    given = numpy_name(dtype)
    with suppress(TypeError):  # which the message says better
        wanted: np.dtype[Any] = np.dtype(given)
        if wanted in (np.dtype(np.float32), np.dtype(np.float64)):
            return wanted
        given = wanted
    raise TypeError(f"dtype must be float32 or float64, got {given}; use one of these")


def streams(rng: Rng, count: int) -> list[np.random.Generator]:
    """Return independent generators grown from ``rng``, which moves on by one draw.

    An array that has a stream of its own starts with the same numbers whatever its length, and
    whatever the lengths of the arrays beside it.
    """
    entropy = entropy_of(as_generator(rng))
    return [
        np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(i,))) for i in range(count)
    ]


def random_signs(rng: np.random.Generator, shape: int | tuple[int, ...]) -> Array:
    """Return independent +1 and -1 with probability 1/2 each, int8."""
    out = rng.integers(0, 2, size=shape, dtype=np.int8)
    out *= 2
    out -= 1
    return out


def check_shape(x: Array, name: str, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse an array of a draw that does not have the shape that it needs."""
    if x.shape != shape:
        raise ValueError(
            f"{name} must have shape {meaning} = {shape}, got {x.shape}; "
            f"give the array of a draw for these r and n"
        )


def check_signs(x: Array, name: str, shape: tuple[int, ...], meaning: str) -> Array:
    """Return signs as int8 of a shape, all +1 or -1."""
    check_shape(x, name, shape, meaning)
    foreign = x[(x != 1) & (x != -1)]
    if foreign.size:
        raise ValueError(
            f"{name} must be +1 or -1, got {foreign.flat[0]}; the scale is not a part of the draw"
        )
    return x.astype(np.int8)


def check_indices(
    x: Array, name: str, shape: tuple[int, ...], meaning: str, below: int, dtype: DTypeLike
) -> Array:
    """Return indices of a shape as ``dtype``, all in ``0..below - 1``."""
    check_shape(x, name, shape, meaning)
    if not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {x.dtype}; give indices")
    if x.size and (int(x.min()) < 0 or int(x.max()) >= below):
        worst = int(x.min()) if int(x.min()) < 0 else int(x.max())
        raise ValueError(
            f"{name} must be in 0..{below - 1}, got {worst}; give indices of rows or columns"
        )
    return x.astype(dtype)


class Spec(NamedTuple):
    """Hold what a sketch of a family is but for its draw: sizes, precision, parameters."""

    r: int
    n: int
    dtype: np.dtype[Any]
    parameters: Mapping[str, Any]


class Sketch(Operator):
    """Hold one drawn matrix ``S`` of shape (r, n), scaled so that ``E[S^T S] = I_n``; immutable.

    Made by ``make_sketch``, by ``draw`` of a family, or by ``from_arrays`` of one.  It is a SciPy
    linear operator: ``S @ X``, ``S.T @ Y``, ``S.matvec(x)``; products are computed in its dtype.

    Attributes
    ----------
    kind : str
        Name of the family.
    parameters : dict
        Parameters of the family, defaults resolved.
    isometry_scale : float
        Factor that turns the unscaled matrix of the family's definition into S; already applied.
    arrays : dict
        The draw: named arrays, read-only, without the scale.
    shape, dtype, nbytes
        (r, n), float32 or float64, and the bytes of the arrays.
    """

    kind: ClassVar[str] = ""
    array_names: ClassVar[tuple[str, ...]] = ()
    parameter_defaults: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        quiet(cls)

    isometry_scale: float
    _arrays: dict[str, Array]
    _parameters: dict[str, Any]
    _derived: dict[str, Any]

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        parameters: Mapping[str, Any],
        arrays: Mapping[str, Array],
    ) -> None:
        super().__init__(dtype, shape)  # type: ignore[call-arg]  # stubs know __new__ only
        self._parameters = dict(parameters)
        self._arrays = dict(arrays)
        self._derived = {}
        self.isometry_scale = self._scale(Spec(*shape, dtype, self._parameters))

    # --- made from a law or from arrays -----------------------------------------------------

    @classmethod
    def draw(
        cls: type[S],
        r: int,
        n: int,
        rng: Rng = None,
        *,
        dtype: DTypeLike = np.float64,
        **parameters: Any,
    ) -> S:
        """Draw a sketch of this family; arguments are those of ``make_sketch`` without kind."""
        form = cls._check(r, n, dtype, parameters)
        return cls((form.r, form.n), form.dtype, form.parameters, cls._draw(form, rng))

    @classmethod
    def from_arrays(
        cls: type[S],
        arrays: Mapping[str, Any],
        shape: tuple[int, int],
        *,
        dtype: DTypeLike = np.float64,
        **parameters: Any,
    ) -> S:
        """Return the sketch that the arrays of a draw stand for, for instance of a saved draw.

        Parameters
        ----------
        arrays : mapping from names to arrays
            As in ``arrays`` of a sketch; they are validated and copied.
        shape : (int, int)
            (r, n).
        dtype : float32 or float64, default float64
            Precision of the products.
        **parameters
            Of the family, as for ``make_sketch``.

        Returns
        -------
        Sketch

        Raises
        ------
        TypeError, ValueError
            For arrays that no draw of this family with these sizes could be.
        """
        precision = float_type(dtype)
        if not isinstance(shape, tuple | list) or len(shape) != 2:
            raise TypeError(f"shape must be the pair (r, n), got {shape!r}; give two integers")
        form = cls._check(shape[0], shape[1], precision, parameters)
        if not isinstance(arrays, Mapping):
            raise TypeError(
                f"arrays must be a mapping from names to arrays, got {type(arrays).__name__}; "
                f"kind {cls.kind!r} has {sorted(cls.array_names)}"
            )
        if set(arrays) != set(cls.array_names):
            raise ValueError(
                f"arrays must be {sorted(cls.array_names)} for kind {cls.kind!r}, got "
                f"{sorted(map(str, arrays))}; pass the arrays of one draw"
            )
        given = {name: as_array(arrays[name], name) for name in cls.array_names}
        checked = cls._check_arrays(given, form)
        owned = {name: np.array(x, order="C", copy=True) for name, x in checked.items()}
        return cls((form.r, form.n), precision, form.parameters, owned)

    @classmethod
    def _check(cls, r: int, n: int, dtype: DTypeLike, parameters: Mapping[str, Any]) -> Spec:
        """Return sizes, precision and parameters, checked and with defaults resolved."""
        precision = float_type(dtype)
        rows = check_integer(r, "r", 1, "ask for one row or more")
        columns = check_integer(n, "n", 1, "sketch vectors of one entry or more")
        for name in parameters:
            if name not in cls.parameter_defaults:
                hint = (
                    closest(name, cls.parameter_defaults)
                    if cls.parameter_defaults
                    else "; it takes no parameters"
                )
                raise TypeError(f"{name} must be a parameter of kind {cls.kind!r}{hint}")
        resolved = cls._resolve(rows, columns, {**cls.parameter_defaults, **parameters})
        return Spec(rows, columns, precision, resolved)

    @classmethod
    def _resolve(cls, r: int, n: int, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters checked against r and n; the base class has none."""
        return parameters

    @classmethod
    @abstractmethod
    def _scale(cls, form: Spec) -> float:
        """Return the isometry scale."""

    @classmethod
    @abstractmethod
    def _draw(cls, form: Spec, rng: Rng) -> dict[str, Array]:
        """Return the arrays of a draw; arguments are checked."""

    @classmethod
    @abstractmethod
    def _check_arrays(cls, arrays: dict[str, Array], form: Spec) -> dict[str, Array]:
        """Return given arrays with the dtypes of a draw, or refuse them."""

    # --- what it is -------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> None:
        # The scale is the last thing that __init__ sets.
        if "isometry_scale" in self.__dict__:
            raise AttributeError(f"{name} of a sketch cannot be changed; draw another sketch")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of a sketch cannot be deleted")

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._parameters.items())
        r, n = self.shape
        return f"<sketch {self.kind!r}, r={r}, n={n}, dtype={self.dtype}{options}>"

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the family, defaults resolved."""
        return dict(self._parameters)

    @property
    def arrays(self) -> dict[str, Array]:
        """The draw: named arrays, read-only, without the isometry scale."""
        views = {name: x.view() for name, x in self._arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of the draw."""
        return sum(x.nbytes for x in self._arrays.values())

    # --- products ---------------------------------------------------------------------------

    def apply(self, x: object) -> Array:
        """Return ``S X``.

        Parameters
        ----------
        x : array of shape (n,) or (n, m), or SciPy sparse matrix or array (n, m)
            Real numbers; they are converted to the dtype of the sketch.

        Returns
        -------
        ndarray of shape (r,) or (r, m)
            In the dtype of the sketch; dense for sparse x too.

        Raises
        ------
        TypeError
            If x does not hold real numbers.
        ValueError
            If x does not have n rows.
        """
        return self._product(x, "x", 1, self._apply)

    def apply_transpose(self, y: object) -> Array:
        """Return ``S^T Y``.

        Parameters
        ----------
        y : array of shape (r,) or (r, m), or SciPy sparse matrix or array (r, m)
            Real numbers; they are converted to the dtype of the sketch.

        Returns
        -------
        ndarray of shape (n,) or (n, m)
            In the dtype of the sketch; dense for sparse y too.

        Raises
        ------
        TypeError
            If y does not hold real numbers.
        ValueError
            If y does not have r rows.
        """
        return self._product(y, "y", 0, self._apply_transpose)

    def _of_sparse(self, x: Any, name: str, axis: int, multiply: Callable[[Array], Array]) -> Array:
        """Return the product with a SciPy matrix, a few of its columns in memory at a time."""
        if x.ndim == 1 or x.dtype.kind not in "fiub" or x.shape[0] != self.shape[axis]:
            return self._product(x.toarray(), name, axis, multiply)  # refused there
        columns = x.tocsc()
        out = np.empty((self.shape[1 - axis], x.shape[1]), self.dtype)
        step = max(1, SPARSE_ENTRIES // x.shape[0])
        for start in range(0, x.shape[1], step):
            piece = columns[:, start : start + step].toarray()
            out[:, start : start + step] = multiply(self._cast(piece))
        return out

    def _product(
        self, x: object, name: str, axis: int, multiply: Callable[[Array], Array]
    ) -> Array:
        if issparse(x):
            return self._of_sparse(x, name, axis, multiply)
        array = as_array(x, name)
        length = self.shape[axis]
        if array.dtype.kind not in "fiub":
            raise TypeError(
                f"{name} must hold real numbers, got {array.dtype}; convert it to {self.dtype}"
            )
        if array.ndim not in (1, 2) or array.shape[0] != length:
            side = "rn"[axis]
            raise ValueError(
                f"{name} must have shape ({side},) or ({side}, m) with {side} = {length}, got "
                f"{array.shape}; sketches act on the first axis"
            )
        columns = self._cast(array.reshape(length, -1) if array.ndim == 1 else array)
        if columns.shape[1] == 0:
            return np.empty((self.shape[1 - axis], 0), self.dtype)
        out = multiply(columns)
        return out[:, 0] if array.ndim == 1 else out

    def _cast(self, x: Array) -> Array:
        return np.require(x, dtype=self.dtype, requirements=["C", "W", "A"])

    @abstractmethod
    def _apply(self, x: Array) -> Array:
        """Return ``S X`` for a prepared array (n, m), m >= 1."""

    @abstractmethod
    def _apply_transpose(self, y: Array) -> Array:
        """Return ``S^T Y`` for a prepared array (r, m), m >= 1."""

    def _matmat(self, x: Array) -> Array:
        return self.apply(x)

    def _rmatmat(self, y: Array) -> Array:
        return self.apply_transpose(y)

    def _matvec(self, x: Array) -> Array:
        return self.apply(np.reshape(x, -1))

    def _rmatvec(self, y: Array) -> Array:
        return self.apply_transpose(np.reshape(y, -1))

    @abstractmethod
    def to_dense(self) -> Array:
        """Return S as a dense array (r, n), built from the definition of the family."""

    # --- fewer rows -------------------------------------------------------------------------

    def nested(self: S, r1: int) -> S:
        """Return the sketch of ``r1 <= r`` rows that shares this one's random numbers.

        Its unscaled rows are the first ``r1`` of this sketch, so that error curves over r use
        common random numbers; "countsketch" maps bucket h to ``h mod r1`` instead.

        Parameters
        ----------
        r1 : int
            Between 1 and r; for "countsketch" a divisor of r.

        Returns
        -------
        Sketch
            Of shape (r1, n), with ``E[S^T S] = I_n`` again.

        Raises
        ------
        ValueError
            If r1 is out of range, or the family has no nested draws ("sjlt", "osnap").
        """
        r, n = self.shape
        rows = check_integer(r1, "r1", 1, "draw a sketch with more rows", high=r, limit="r")
        if rows == r:
            return self
        return type(self)((rows, n), self.dtype, self._parameters, self._nested(rows))

    @abstractmethod
    def _nested(self, r1: int) -> dict[str, Array]:
        """Return the arrays of the first ``r1 < r`` rows, or refuse with the reason."""


quiet(Sketch)
