"""The one place that touches Numba decorators.

Kernels are compiled lazily, cached on disk where a location is writable, and use a fast-math
set without ``nnan`` and ``ninf``: NaN and infinities keep their meaning, sums may be reordered.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba
from numba.core import types
from numba.extending import intrinsic, overload

# Without types.
_caching: Any = importlib.import_module("numba.core.caching")
cgutils: Any = importlib.import_module("numba.core.cgutils")
ir: Any = importlib.import_module("llvmlite.ir")
_runtime: Any = importlib.import_module("numba.core.runtime").rtsys
_intrinsic = cast(Callable[[Any], Callable[..., Any]], intrinsic)

FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

F = TypeVar("F", bound=Callable[..., Any])


# What went wrong when a compiled kernel was to be kept, if something did; said once a process.
failure: str | None = None


def _can_cache() -> bool:
    """Say whether the folder that ``NUMBA_CACHE_DIR`` names is of use, if it names one.

    Numba takes it on trust.  A folder that can only be read may hold kernels that were compiled
    before.
    """
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if not folder:
        return True
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.R_OK | os.X_OK)


CACHE = _can_cache()


def _source_of_kernels() -> str:
    """Return a digest of all files of this folder that decide what a kernel computes.

    Kernels call functions of each other's files, and Numba looks at the file of the caller alone.
    """
    digest = hashlib.sha256()
    folder = os.path.dirname(__file__)
    try:
        for name in sorted(os.listdir(folder)):
            if name.endswith(".py") and name != "_threads.py":
                with open(os.path.join(folder, name), "rb") as file:
                    digest.update(file.read())
    except OSError:  # inside an archive, which is stamped as a whole
        pass
    return digest.hexdigest()


SOURCE = _source_of_kernels()

# Numba loads all that it can compile before it reads compiled code, which takes as long as to load
# Numba itself.  The code calls functions of the runtime, of C and of BLAS only, and the first
# are the only ones that are not known from the start.  Of other releases that is not known:
# an address that is missing ends the process.
_LOADS_ALONE = numba.__version__.startswith("0.68.")


class _CheckedFile(_caching.IndexDataCacheFile):  # type: ignore[misc]  # no types
    """Files of one kernel; compiled code is read only if it is, byte for byte, what was written."""

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as file:
            file.write(hashlib.sha256(content).digest() + content)

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            digest, content = file.read(32), file.read()
        if hashlib.sha256(content).digest() != digest:
            raise OSError(f"{self._data_path(name)} is damaged")  # taken as a file that is missing
        return pickle.loads(content)


class KernelCache(_caching.FunctionCache):  # type: ignore[misc]  # no types
    """A cache that is never the reason why a kernel does not run.

    What cannot be read is compiled and written again; what cannot be written is said once.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp(), SOURCE
        self._cache_file = _CheckedFile(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the compiled code of ``signature``; None where it is not there, or damaged."""
        try:
            if not _LOADS_ALONE:
                return super().load_overload(signature, target)
            _runtime.initialize(target)
            with self._guard_against_spurious_io_errors():
                return self._load_overload(signature, target)
        except Exception:  # whatever a damaged index, or one of another release, may raise
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep compiled code, beside a new index where the old one cannot be read."""
        try:
            try:
                super().save_overload(signature, compiled)
            except Exception:
                self.flush()
                super().save_overload(signature, compiled)
        except OSError as error:
            _say(f"{self._cache_path}: {error.strerror or error}")


def _say(problem: str) -> None:
    """Remember why kernels are not kept, and warn of it once a process."""
    global failure
    if failure is None:
        failure = problem
        warnings.warn(
            f"Compiled kernels cannot be kept in {problem}; they will be compiled in every process "
            "unless NUMBA_CACHE_DIR names a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )


def kernel(*, dealt: bool = False) -> Callable[[F], F]:
    """Decorate a kernel: nopython, no exceptions for division by zero, GIL released.

    ``dealt``: the kernel is one that Python calls, by ``_threads.deal``.  Its first argument
    ``turn`` deals its items, ``take(turn)`` by ``take(turn)``, to all threads that run it at the
    same time; an item is done by one of them, in an order of its own.

    Any other kernel is inlined wherever another one calls it.  Every object file would otherwise
    hold a weak copy of it under one name, optimised beside other code and so with other
    rounding, and the copy that a process loads first would serve all its callers: results would
    depend on which kernels were called before, and on which came from the cache.

    Caching needs a writable folder (beside the source, or ``NUMBA_CACHE_DIR``, or the user's
    cache folder); where there is none Numba raises at decoration, and the kernel is compiled
    once a process instead.
    """

    def wrap(function: F) -> F:
        make = partial(
            numba.njit,
            forceinline=not dealt,
            fastmath=set(FASTMATH),
            error_model="numpy",
            nogil=True,
        )
        try:
            dispatcher: Any = make(cache=CACHE)(function)
            if isinstance(getattr(dispatcher, "_cache", None), _caching.FunctionCache):
                dispatcher._cache = KernelCache(function)
        except RuntimeError:
            dispatcher = make(cache=False)(function)
        return cast(F, dispatcher)

    return wrap


def by_precision(generic: F, *, float32: Callable[..., Any], float64: Callable[..., Any]) -> F:
    """Give ``generic`` one compiled body a precision, chosen by its argument ``x``.

    ``generic`` itself is what runs when compilation is disabled, so it has to be the readable
    formula.  ``x`` is a scalar or an array of float32 or float64.
    """

    def choose(x: Any) -> Callable[..., Any] | None:
        dtype = x.dtype if isinstance(x, types.Array) else x
        if dtype == types.float32:
            return float32
        if dtype == types.float64:
            return float64
        return None

    overload(
        generic,
        jit_options={"fastmath": set(FASTMATH), "error_model": "numpy", "forceinline": True},
    )(choose)
    return generic


# --- items of work --------------------------------------------------------------------------------


@_intrinsic
def _fetch_and_add(context: Any, turn: Any) -> Any:
    """Add one to ``turn[0]`` in a single step of the processor and return what it was."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = target.make_array(signature.args[0])(target, builder, arguments[0])
        one = target.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", array.data, one, "monotonic")

    return types.int64(turn), generate


def take(turn: Any) -> Any:
    """Return the number of the next item of work, which no other thread gets.

    ``turn`` int64 (2,): the next item, and whether a single thread takes them.  Items that are
    taken when they are due, and not dealt beforehand, wait for no thread that is held up.
    """
    item = turn[0]
    turn[0] += 1
    return item


@overload(take, jit_options={"forceinline": True})
def _compiled_take(turn: Any) -> Callable[[Any], Any]:
    def implementation(turn: Any) -> Any:
        if turn[1] != 0:
            item = turn[0]
            turn[0] = item + 1
            return item
        return _fetch_and_add(turn)

    return implementation


# --- products in BLAS -----------------------------------------------------------------------------


@_intrinsic
def _gemm_added(context: Any, a: Any, b: Any, out: Any) -> Any:
    """``out += a b`` by the function of Numba that its own products call."""
    kinds = (a, b, out)
    if any(not isinstance(x, types.Array) or (x.ndim, x.dtype) != (2, a.dtype) for x in kinds):
        raise TypeError(f"matrices of one precision are wanted, got {a}, {b} and {out}")
    if out.layout != "C" or {a.layout, b.layout} - {"C", "F"}:
        raise TypeError(f"matrices without gaps are wanted, got {a}, {b} and {out}")

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, letter = cgutils.voidptr_t, target.get_value_type(types.int8)
        size = target.get_value_type(types.intp)

        def character(x: str) -> Any:
            return target.get_constant(types.int8, ord(x))

        def matrix(kind: Any, x: Any) -> tuple[Any, Any, Any]:
            array = target.make_array(kind)(target, builder, x)
            shape = cgutils.unpack_tuple(builder, array.shape)
            return builder.bitcast(array.data, address), *shape

        (x, m, k), (y, _, n), (z, _, _) = map(matrix, signature.args, arguments)
        one = cgutils.alloca_once_value(builder, target.get_constant(out.dtype, 1.0))
        one = builder.bitcast(one, address)
        # BLAS counts by columns: it is given the transposes, and the factors change sides.
        flags = [character("n" if kind.layout == "C" else "t") for kind in (b, a)]
        steps = n if b.layout == "C" else k, k if a.layout == "C" else m
        kind = character("s" if out.dtype == types.float32 else "d")
        form = [letter] * 3 + [size] * 3 + [address, address, size, address, size]
        gemm = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(target.get_value_type(types.int32), [*form, address, address, size]),
            "numba_xxgemm",
        )
        builder.call(gemm, [kind, *flags, n, m, k, one, y, steps[0], x, steps[1], one, z, n])
        return target.get_dummy_value()

    return types.void(a, b, out), generate


def add_product(a: Any, b: Any, out: Any) -> None:
    """``out += a b`` in one pass of BLAS over ``out``, for matrices of one precision.

    ``a (m, k)`` and ``b (k, n)`` are contiguous or transposes of what is; ``out (m, n)`` is.
    """
    out += a @ b


@overload(add_product, jit_options={"forceinline": True})
def _compiled_add_product(a: Any, b: Any, out: Any) -> Callable[[Any, Any, Any], None]:
    def implementation(a: Any, b: Any, out: Any) -> None:
        _gemm_added(a, b, out)

    return implementation


# --- products of chosen rows ----------------------------------------------------------------------


def _lanes() -> int:
    """Return how many float32 numbers a register of this machine holds."""
    features = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx") else 4


LANES = _lanes()
# Rows that share what is loaded of the second factor: their sums fill the registers.
TOGETHER = 6


def _tile_function(module: Any, name: str, number: Any, lanes: int, rows: int, vectors: int) -> Any:
    """Return the function of a module that `_make_tile` calls; written there if it is not yet.

    It belongs to the module alone, and is called, not inlined: kernels have many products.
    """
    if name in module.globals:
        return module.globals[name]
    size, index = ir.IntType(64), ir.IntType(32)
    vector, matrix, list_ = ir.VectorType(number, lanes), number.as_pointer(), size.as_pointer()
    form = [matrix, size, list_, size, matrix, size, size, matrix, size, list_, size, size]
    function = ir.Function(module, ir.FunctionType(size, [*form, ir.IntType(1)]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    x, x_width, ix, count, y, y_width, depth, z, z_width, iz, column, first, fresh = function.args
    contract = ("contract",)  # one rounding where the processor has that instruction
    aligned = 4 if isinstance(number, ir.FloatType) else 8
    zero, nothing = ir.Constant(size, 0), ir.Constant(vector, [ir.Constant(number, 0.0)] * lanes)
    same = ir.Constant(ir.VectorType(index, lanes), [0] * lanes)
    entry, head, body, loop, done, leave = (
        function.append_basic_block(label)
        for label in ("entry", "head", "body", "loop", "done", "leave")
    )
    ir.IRBuilder(entry).branch(head)
    builder = ir.IRBuilder(head)
    p = builder.phi(size)
    p.add_incoming(first, entry)
    after_p = builder.add(p, ir.Constant(size, rows))
    builder.cbranch(builder.icmp_signed("<=", after_p, count), body, leave)
    ir.IRBuilder(leave).ret(p)

    builder = ir.IRBuilder(body)
    places = [builder.add(p, ir.Constant(size, r)) for r in range(rows)]

    def at(data: Any, list_: Any, place: Any, width: Any) -> Any:
        row = builder.load(builder.gep(list_, [place]))
        return builder.gep(data, [builder.mul(row, width)])

    sources = [at(x, ix, place, x_width) for place in places]
    targets = [builder.gep(at(z, iz, place, z_width), [column]) for place in places]
    builder.cbranch(builder.icmp_signed(">", depth, zero), loop, done)

    builder = ir.IRBuilder(loop)
    step = builder.phi(size)
    sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    line = builder.gep(y, [builder.add(builder.mul(step, y_width), column)])

    def vector_at(data: Any, v: int) -> Any:
        place = builder.gep(data, [ir.Constant(size, v * lanes)])
        return builder.bitcast(place, vector.as_pointer())

    loaded = [builder.load(vector_at(line, v), align=aligned) for v in range(vectors)]
    grown = []
    for r in range(rows):
        value = builder.load(builder.gep(sources[r], [step]))
        wide = builder.insert_element(nothing, value, ir.Constant(index, 0))
        wide = builder.shuffle_vector(wide, wide, same)
        terms = [builder.fmul(wide, part, flags=contract) for part in loaded]
        pairs = zip(sums[r], terms, strict=True)
        grown.append([builder.fadd(part, term, flags=contract) for part, term in pairs])
    after = builder.add(step, ir.Constant(size, 1))
    step.add_incoming(zero, body)
    step.add_incoming(after, loop)
    builder.cbranch(builder.icmp_signed("<", after, depth), loop, done)

    builder = ir.IRBuilder(done)
    finals = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    for r in range(rows):
        for v in range(vectors):
            for phi in (sums[r][v], finals[r][v]):
                phi.add_incoming(nothing, body)
                phi.add_incoming(grown[r][v], loop)
    for r in range(rows):
        for v in range(vectors):
            place = vector_at(targets[r], v)
            old = builder.select(fresh, nothing, builder.load(place, align=aligned))
            builder.store(builder.fadd(old, finals[r][v]), place, align=aligned)
    p.add_incoming(after_p, done)
    builder.branch(head)
    return function


def _make_tile(rows: int, vectors: int) -> Any:
    """Return ``tile(a, ia, p, b, k, out, io, j, fresh)`` of so many rows and vectors of columns.

    ``out[io[p], j : j + w] (+)= a[ia[p], :k] b[:k, j : j + w]`` for the rows from p on, as far as
    they come together, and returns the first row that is left; the sum replaces what is there if
    ``fresh``.  Sums stay in registers, and their order does not depend on which rows are done
    together.
    """

    def tile(
        context: Any, a: Any, ia: Any, p: Any, b: Any, k: Any, out: Any, io: Any, j: Any, fresh: Any
    ) -> Any:
        kinds = (a, b, out)
        if any(not isinstance(x, types.Array) or (x.ndim, x.layout) != (2, "C") for x in kinds):
            raise TypeError(f"matrices without gaps are wanted, got {a}, {b} and {out}")
        if len({x.dtype for x in kinds}) > 1 or a.dtype not in (types.float32, types.float64):
            raise TypeError(f"matrices of one precision are wanted, got {a}, {b} and {out}")
        lanes = LANES if a.dtype == types.float32 else LANES // 2

        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = target.get_value_type(a.dtype)
            name = f"sketchattn_tile_{rows}_{vectors}_{a.dtype}"
            function = _tile_function(builder.module, name, number, lanes, rows, vectors)

            def array(place: int) -> tuple[Any, Any]:
                kind = signature.args[place]
                made = target.make_array(kind)(target, builder, arguments[place])
                return made.data, cgutils.unpack_tuple(builder, made.shape)[-1]

            (x, x_width), (ix, count) = array(0), array(1)
            (y, y_width), (z, z_width), (iz, _) = array(3), array(5), array(6)
            p, depth, column, fresh = (arguments[i] for i in (2, 4, 7, 8))
            whole = [x, x_width, ix, count, y, y_width, depth, z, z_width, iz, column, p, fresh]
            return builder.call(function, whole)

        whole = types.intp
        form = whole(a, ia, whole, b, whole, out, io, whole, types.boolean)
        return form, generate

    return _intrinsic(tile)


_tile_62, _tile_61 = _make_tile(TOGETHER, 2), _make_tile(TOGETHER, 1)
_tile_22, _tile_21 = _make_tile(2, 2), _make_tile(2, 1)
_tile_12, _tile_11 = _make_tile(1, 2), _make_tile(1, 1)


def row_products(
    a: Any, ia: Any, b: Any, k: int, n: int, out: Any, io: Any, fresh: bool
) -> None:  # fmt: skip
    """``out[io, :n] += a[ia, :k] b[:k, :n]``, or ``=`` if ``fresh``, without copies of rows.

    ``a``, ``b`` and ``out`` of one precision, without gaps; ``ia`` and ``io`` int64 of one length,
    the latter distinct.  For some ten to hundred rows, of which BLAS copies all.  A row has the
    same bits with whichever others it is computed.
    """
    for i, o in zip(ia, io, strict=True):
        found = a[i, :k] @ b[:k, :n]
        if fresh:
            out[o, :n] = found
        else:
            out[o, :n] += found


@overload(row_products, jit_options={"fastmath": set(FASTMATH), "forceinline": True})
def _compiled_row_products(
    a: Any, ia: Any, b: Any, k: int, n: int, out: Any, io: Any, fresh: bool
) -> Callable[..., None]:
    lanes = LANES if a.dtype == types.float32 else LANES // 2
    both = 2 * lanes

    def implementation(
        a: Any, ia: Any, b: Any, k: int, n: int, out: Any, io: Any, fresh: bool
    ) -> None:
        count = ia.size
        for j in range(0, n - both + 1, both):
            p = _tile_62(a, ia, 0, b, k, out, io, j, fresh)
            p = _tile_22(a, ia, p, b, k, out, io, j, fresh)
            _tile_12(a, ia, p, b, k, out, io, j, fresh)
        j = n - n % both
        if j + lanes <= n:
            p = _tile_61(a, ia, 0, b, k, out, io, j, fresh)
            p = _tile_21(a, ia, p, b, k, out, io, j, fresh)
            _tile_11(a, ia, p, b, k, out, io, j, fresh)
            j += lanes
        if j < n:
            for p in range(count):
                i, o = ia[p], io[p]
                for c in range(j, n):
                    total = a.dtype.type(0.0)
                    for t in range(k):
                        total += a[i, t] * b[t, c]
                    out[o, c] = total if fresh else out[o, c] + total

    return implementation
