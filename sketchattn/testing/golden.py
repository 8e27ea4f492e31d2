"""What another program computed, beside golden vectors: one line a case that is wrong."""

from __future__ import annotations

import hashlib
import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..base.arguments import as_array, closest
from ..base.files import KINDS, encode, parse_safetensors
from .inputs import DTYPES
from .vectors import SCHEMA, GoldenCase, array_digest, pick

Array = NDArray[Any]
Outputs = Mapping[str, ArrayLike] | str | PathLike[str]


@dataclass(frozen=True)
class GoldenRecord:
    """Record one case of golden vectors beside what another program computed.

    Attributes
    ----------
    case : str
    status : {"pass", "fail", "missing", "not judged"}
        "not judged": in this precision a wrong answer would pass as well.
    dtype : str
        Of the output.
    err_max, tol : float
        Largest error, and what is allowed.
    worst_index : tuple of int
        (head, row, column) of the largest error.
    got, want : float
        The two values there.
    message : str
        What was wrong with more than a number.
    """

    case: str
    status: str
    dtype: str = ""
    err_max: float = math.nan
    tol: float = math.nan
    worst_index: tuple[int, ...] = ()
    got: float = math.nan
    want: float = math.nan
    message: str = ""

    @property
    def ratio(self) -> float:
        """The largest error over what is allowed."""
        return self.err_max / self.tol if self.tol else math.nan

    def __str__(self) -> str:
        """Return one line in plain words."""
        words = self.case + (f" ({self.dtype})" if self.dtype else "")
        if self.status in ("missing", "not judged"):
            words += f": {self.status}"
        if math.isfinite(self.err_max):
            words += (
                f": error {self.err_max:.3g}, tolerance {self.tol:.3g}, worst at "
                f"{self.worst_index}: got {self.got:.9g}, want {self.want:.9g}"
            )
        return words + (f": {self.message}" if self.message else "")


@dataclass(frozen=True)
class GoldenReport:
    """Say which golden vectors another program agrees with.

    Attributes
    ----------
    records : tuple of GoldenRecord
    folder : str

    Examples
    --------
    >>> import tempfile, sketchattn as sa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = sa.testing.write_golden(folder, cases="exact-plain")
    ...     cases = sa.testing.read_golden(folder)
    ...     report = sa.testing.check_golden(folder, {n: 1.01 * x.out for n, x in cases.items()})
    >>> report.passed, report.records[0].worst_index
    (False, (0, 11, 0))
    """

    records: tuple[GoldenRecord, ...]
    folder: str

    @property
    def failures(self) -> tuple[GoldenRecord, ...]:
        """The cases that are wrong or missing."""
        return tuple(x for x in self.records if x.status in ("fail", "missing"))

    @property
    def passed(self) -> bool:
        """Whether every case that is judged is right, and one at least is."""
        return not self.failures and any(x.status == "pass" for x in self.records)

    def raise_for_failures(self) -> None:
        """Raise AssertionError with the report, unless it passed."""
        if not self.passed:
            raise AssertionError(str(self))

    def _first_line(self) -> str:
        right = sum(x.status == "pass" for x in self.records)
        return f"{'PASS' if self.passed else 'FAIL'}: {right} of {len(self.records)} cases right"

    def __str__(self) -> str:
        """Return the verdict, a line for each failure, and the case that is nearest to one."""
        lines = [f"{self._first_line()} ({self.folder})"]
        lines += [f"  {x}" for x in sorted(self.failures, key=_badness)]
        lines += [f"  {x}" for x in self.records if x.status == "not judged"]
        judged = [x for x in self.records if x.status == "pass"]
        if judged:
            worst = max(judged, key=lambda x: x.ratio)
            lines.append(f"  largest of those that are right: {worst.ratio:.2f} of what is allowed")
            lines.append(f"    {worst}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the first line."""
        return f"<GoldenReport {self._first_line()}>"

    def _repr_html_(self) -> str:
        """Return the verdict and a table of the cases."""
        rows = "".join(
            f"<tr><td>{html.escape(x.case)}</td><td>{x.status}</td><td>{x.err_max:.3g}</td>"
            f"<td>{x.tol:.3g}</td><td>{html.escape(x.message)}</td></tr>"
            for x in self.records
        )
        head = "<tr><th>case</th><th>status</th><th>error</th><th>tolerance</th><th></th></tr>"
        return f"<pre>{html.escape(str(self))}</pre><table>{head}{rows}</table>"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data; numbers that are not finite are text."""
        records = [
            {key: encode(x) for key, x in asdict(record).items()} | {"ratio": encode(record.ratio)}
            for record in self.records
        ]
        return {
            "schema": SCHEMA, "folder": self.folder, "passed": self.passed, "cases": records,
        }  # fmt: skip

    def to_json(self, indent: int | None = None) -> str:
        """Return everything as JSON, with the version of its schema."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)


def _badness(x: GoldenRecord) -> float:
    return -x.ratio if math.isfinite(x.ratio) else -math.inf


# --- reading --------------------------------------------------------------------------------------


def read_tensors(raw: bytes, source: str) -> tuple[dict[str, Array], dict[str, str], str]:
    """Return the arrays of a .safetensors file, their dtypes, and the text of entry "case"."""
    from safetensors import SafetensorError

    try:
        arrays, kinds, metadata = parse_safetensors(raw)
    except SafetensorError as error:
        raise ValueError(
            f"{source} must be a whole .safetensors file, got bytes that are not "
            f"({(str(error).splitlines() or [''])[0]}); write it again"
        ) from error
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise ValueError(
                f"{source} must hold {', '.join(KINDS)}, got {kind} for {name!r}; convert it"
            )
    # Copies: what a buffer gives is read-only, which compiled code is not made for.
    copies = {name: x.copy() for name, x in arrays.items()}
    dtypes = {n: "bfloat16" if kinds[n] == "BF16" else x.dtype.name for n, x in copies.items()}
    return copies, dtypes, str(metadata.get("case", "{}"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder; refuse what is none, or of another version."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"dir must be a folder of golden vectors, got {str(folder)!r}, which has no "
            f"manifest.json; write it with write_golden, or 'sketchattn golden DIR'"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema, known = manifest["schema"], [x["name"] for x in manifest["cases"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a whole manifest, got text that is none; write the folder again"
        ) from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} must have schema {SCHEMA}, got {schema}; write the folder again with this "
            f"version"
        )
    if len(set(known)) != len(known):
        raise ValueError(f"{path} must name each case once, got one twice; write the folder again")
    return dict(manifest)


def _read_case(folder: Path, entry: Mapping[str, Any]) -> GoldenCase:
    path = folder / str(entry["file"])
    if not path.is_file():
        raise ValueError(
            f"{path} must be there, as manifest.json names it, got no such file; write the folder "
            f"again"
        )
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(
            f"{path} must have the SHA-256 {entry['sha256'][:12]}... of manifest.json, got "
            f"{digest[:12]}...; the file is damaged or of another run: write the folder again"
        )
    arrays, _, text = read_tensors(raw, str(path))
    for name, x in arrays.items():
        if array_digest(x) != entry["arrays"].get(name):
            raise ValueError(
                f"{path} must have the array {name!r} of manifest.json, got another; write the "
                f"folder again"
            )
    words = json.loads(text)
    draws: dict[int, dict[str, Array]] = {}
    for name, x in arrays.items():
        if name.startswith("draw."):
            _, head, label = name.split(".", 2)
            draws.setdefault(int(head), {})[label] = x
    heads = len(arrays["q"])
    by_dtype = {
        name: dict(zip(DTYPES, arrays[name].tolist(), strict=True)) if name in arrays else {}
        for name in ("tolerance", "lse_tolerance")
    }
    left, right = arrays["window"].tolist()
    return GoldenCase(
        name=str(words["name"]),
        method=str(words["method"]),
        parameters=words["parameters"],
        scale=float(arrays["scale"][0]),
        softcap=float(arrays["softcap"][0]),
        causal=bool(arrays["causal"][0]),
        first=int(arrays["first"][0]),
        window=(left, right),
        draws=() if words["method"] == "exact" else tuple(draws.get(h, {}) for h in range(heads)),
        step=float(arrays["step"][0]),
        tolerance=by_dtype["tolerance"],
        lse_tolerance=by_dtype["lse_tolerance"],
        not_judged=words["not_judged"],
        q=arrays["q"],
        k=arrays["k"],
        v=arrays["v"],
        out=arrays["out"],
        key_mask=arrays.get("key_mask"),
        mask=arrays.get("mask"),
        bias=arrays.get("bias"),
        sink=arrays.get("sink"),
        lse=arrays.get("lse"),
        matrix=arrays.get("matrix"),
    )


def read_golden(
    dir: str | PathLike[str],  # noqa: A002  # named like that of write_golden
    *,
    cases: str | None = None,
) -> dict[str, GoldenCase]:
    """Read golden vectors, in the order of the manifest; damaged files are refused.

    Parameters
    ----------
    dir : path
        What ``write_golden`` or ``sketchattn golden`` wrote.
    cases : str, optional
        Patterns of names separated by commas; all by default.

    Returns
    -------
    dict from name to GoldenCase

    Raises
    ------
    ValueError
        For a folder without a manifest, a file that is missing or whose SHA-256 is not that of
        the manifest, and a pattern that matches nothing.

    Examples
    --------
    >>> import tempfile, sketchattn as sa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = sa.testing.write_golden(folder, cases="exact-gqa,uniform-causal")
    ...     cases = sa.testing.read_golden(folder)
    >>> cases["exact-gqa"].q.shape, sorted(cases["uniform-causal"].draws[0])
    ((6, 17, 16), ['columns'])
    """
    folder = Path(os.path.expanduser(dir))
    manifest = read_manifest(folder)
    entries = {entry["name"]: entry for entry in manifest["cases"]}
    return {name: _read_case(folder, entries[name]) for name in pick(list(entries), cases)}


def read_outputs(outputs: Outputs) -> tuple[dict[str, Array], dict[str, str]]:
    """Return arrays by name and their dtypes, of a mapping or of a file."""
    if isinstance(outputs, Mapping):
        arrays = {str(name): as_array(x, f"outputs[{name!r}]") for name, x in outputs.items()}
        return arrays, {name: x.dtype.name for name, x in arrays.items()}
    if not isinstance(outputs, str | PathLike):
        raise TypeError(
            f"outputs must be a mapping from case to array or a path, got "
            f"{type(outputs).__name__}; name a .safetensors or .npz file"
        )
    path = Path(os.path.expanduser(outputs))
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"outputs must end in .npz or .safetensors, got {str(path)!r}; write it in one of "
            f"these formats, an array a case"
        )
    if not path.is_file():
        raise ValueError(f"outputs must be an existing file, got {str(path)!r}; check its name")
    if path.suffix == ".safetensors":
        arrays, kinds, _ = read_tensors(path.read_bytes(), str(path))
        return arrays, kinds
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # the format raises many kinds for damaged files
        raise ValueError(
            f"outputs must be a whole .npz file, got {str(path)!r}, which is not "
            f"({type(error).__name__}); write it again"
        ) from error
    return arrays, {name: x.dtype.name for name, x in arrays.items()}


# --- checking -------------------------------------------------------------------------------------


def check_golden(
    dir: str | PathLike[str],  # noqa: A002  # the promised name
    outputs: Outputs,
    *,
    cases: str | None = None,
    dtype: str | None = None,
) -> GoldenReport:
    """Check what another program computed from golden vectors.

    An output is right if no entry is further from the float64 result than the tolerance of its
    precision: twice the error of programs in this precision on the same inputs, and a floor.

    Parameters
    ----------
    dir : path
        What ``write_golden`` or ``sketchattn golden`` wrote.
    outputs : mapping from name of a case to array, or path
        Arrays (H, n_q, d_v), (1, H, n_q, d_v), or (n_q, d_v) for one head; a ``.safetensors`` or
        ``.npz`` file holds one a case.  ``NAME.lse`` (H, n_q) is checked too where it is given.
    cases : str, optional
        Patterns of names separated by commas; all by default, and a case without an output is a
        failure.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        The precision that the program computes in; that of each array by default.  For outputs
        that were widened.

    Returns
    -------
    GoldenReport

    Raises
    ------
    ValueError, TypeError
        For damaged golden vectors, files that cannot be read, and an output of no case.

    Examples
    --------
    >>> import tempfile, sketchattn as sa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = sa.testing.write_golden(folder, cases="exact-causal")
    ...     case = sa.testing.read_golden(folder)["exact-causal"]
    ...     mine = sa.attention(case.q, case.k, case.v, causal=True)
    ...     sa.testing.check_golden(folder, {"exact-causal": mine}).passed
    True
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{closest(str(dtype), DTYPES)}"
        )
    folder = Path(os.path.expanduser(dir))
    known = [entry["name"] for entry in read_manifest(folder)["cases"]]
    golden = read_golden(folder, cases=cases)
    arrays, kinds = read_outputs(outputs)
    for name in arrays:
        if name.removesuffix(".lse") not in known:
            raise ValueError(
                f"outputs must be named like cases, got {name!r}{closest(name, known)}"
            )
    records = []
    for name, case in golden.items():
        if name not in arrays:
            records.append(GoldenRecord(name, "missing", message="no output with this name"))
            continue
        kind = dtype or kinds[name]
        records.append(_judge(case, arrays[name], kind))
        if f"{name}.lse" in arrays and case.lse is not None:
            records.append(_judge_lse(case, arrays[f"{name}.lse"], kind))
    return GoldenReport(tuple(records), str(folder))


def _judge(case: GoldenCase, got: Array, dtype: str) -> GoldenRecord:
    record = _compare(case.name, got, case.out, case.tolerance, dtype)
    if record.status == "pass" and dtype in case.not_judged:
        return GoldenRecord(case.name, "not judged", dtype, message=case.not_judged[dtype])
    return record


def _judge_lse(case: GoldenCase, got: Array, dtype: str) -> GoldenRecord:
    assert case.lse is not None
    return _compare(f"{case.name}.lse", got, case.lse, case.lse_tolerance, dtype)


def _compare(
    name: str, got: Array, want: Array, tolerance: Mapping[str, float], dtype: str
) -> GoldenRecord:
    """Return the record of an array beside what it should be."""
    if dtype not in tolerance:
        return GoldenRecord(
            name, "fail", dtype, message=f"must be of {', '.join(DTYPES)}; convert it, or say dtype"
        )
    shapes = [want.shape, (1, *want.shape)]
    if len(want) == 1:
        shapes.append(want.shape[1:])
    if got.shape not in shapes:
        return GoldenRecord(
            name, "fail", dtype, message=f"must have shape {want.shape}, got {got.shape}"
        )
    x = got.astype(np.float64).reshape(want.shape)
    with np.errstate(invalid="ignore"):
        # Infinities that agree are right, whatever is not a number is not.
        error = np.where(x == want, 0.0, np.abs(x - want))
    lost = ~np.isfinite(error)
    place = np.argmax(lost) if lost.any() else np.argmax(error)
    index = tuple(int(i) for i in np.unravel_index(place, want.shape))
    allowed = tolerance[dtype]
    worst = float(error[index])
    message = ""
    if lost.any():
        message = f"{lost.sum()} entries are not finite or should not be, the first at {index}: "
        message += f"got {x[index]:.9g}, want {want[index]:.9g}"
    return GoldenRecord(
        name,
        "pass" if not lost.any() and worst <= allowed else "fail",
        dtype,
        worst,
        allowed,
        index,
        float(x[index]),
        float(want[index]),
        message,
    )
