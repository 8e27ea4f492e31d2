"""The command line: ``sketchattn VERB``.

Only Typer is loaded here; each verb imports what it needs, so that ``--help`` is quick.  Errors are
one line on stderr and exit code 2; 1 is left to verbs whose answer is no.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .heads.container import Heads

HEADS_HELP = (
    "A .safetensors or .npz file, the name of a bundled set (minilm), or made heads such as "
    "clustered:n=512,d=64,heads=2,rng=0."
)
CASES_HELP = "Names of cases, patterns such as 'exact-*' among them; all by default."
JSON_HELP = "Print JSON instead of a table; numbers that are not finite become strings."

# Exit codes: 0 done, 1 done but not as recorded, 2 refused or failed, 130 interrupted (128 + 2).
DIFFERS = 1
FAILED = 2
INTERRUPTED = 130

app = typer.Typer(
    name="sketchattn",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0; 1 where ``validate`` finds another verdict than the recorded one; 2 after an error,
        which is one line on stderr; 130 after Ctrl-C.  With the environment variable
        ``SKETCHATTN_TRACEBACK`` set, errors are raised instead.

    Examples
    --------
    >>> main(["--version"]) == 0
    sketchattn ...
    True
    """
    with _printable():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        given = None if arguments is None else list(arguments)
        code = app(args=given, prog_name="sketchattn", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("SKETCHATTN_TRACEBACK"):
            raise
        print(f"sketchattn: {_one_line(error)}", file=sys.stderr)
        return FAILED
    if code == INTERRUPTED:
        words = sys.argv[1:] if arguments is None else arguments
        rest = "; the same command continues" if "study" in words[:1] else ""
        print(f"sketchattn: interrupted{rest}", file=sys.stderr)
    return code if isinstance(code, int) else 0


@contextmanager
def _printable() -> Iterator[None]:
    """Make whatever is printed cost nothing but the printing.

    Characters that the console does not know are written as escapes, a closed stream takes what is
    written, and warnings are one line each.
    """
    before: list[tuple[Any, str]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            before.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"sketchattn: warning: {' '.join(str(message).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            # Whoever wants errors in place of warnings does not want to lose results.
            warnings.filterwarnings("always", message="pictures are missing")
            yield
    finally:
        for stream, errors in before:
            with suppress(ValueError):  # closed meanwhile
                stream.reconfigure(errors=errors)


def _one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    if hasattr(error, "format_message"):  # a usage error of Typer, whichever parser it uses
        text = f"{error.format_message().rstrip('.')}; see sketchattn --help"
    elif isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error}; SKETCHATTN_TRACEBACK=1 shows where"
    return " ".join(text.split())


def _print_json(value: object) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    from .base.files import encode

    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if hasattr(value, "item"):  # a NumPy number
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return encode(value)
    return str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Return aligned columns: the first ``left`` and a last one without numbers to the left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    last = len(header) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# --- what arguments stand for -------------------------------------------------------------------


def parse_heads(text: str) -> Heads:
    """Return the heads that an argument names: a file, a bundled set, or a family to make.

    Parameters
    ----------
    text : str
        ``FILE``, ``NAME``, or ``FAMILY:n=N[,d=D][,heads=H][,rng=SEED][,PARAMETER=X]``; the seed is
        0 unless given, so that the same words are the same heads.

    Raises
    ------
    TypeError, ValueError
        For anything else, with the closest name.

    Examples
    --------
    >>> parse_heads("peaked:n=32,d=8,heads=2").names
    ('peaked/head0', 'peaked/head1')
    """
    from .base.arguments import closest
    from .heads.families import FAMILIES, make_heads
    from .heads.files import BUNDLED, load_heads, read_heads

    path = Path(os.path.expanduser(text))
    if path.suffix in (".safetensors", ".npz") or path.is_file():
        return read_heads(path)
    family, colon, rest = text.partition(":")
    if not colon:
        if text in BUNDLED:
            return load_heads(text)
        if text in FAMILIES:
            raise ValueError(
                f"heads must say how many tokens to make, got {text!r}; write '{text}:n=512'"
            )
        raise ValueError(
            f"heads must be a file, a bundled set or a family, got {text!r}"
            f"{closest(text, [*BUNDLED, *FAMILIES])}"
        )
    parameters: dict[str, Any] = {}
    for part in rest.split(","):
        name, equals, value = (x.strip() for x in part.partition("="))
        if not equals or not name or name in parameters:
            raise ValueError(
                f"heads must be written as family:name=number,..., each name once, got {part!r} "
                f"in {text!r}; for instance '{family}:n=512,d=64'"
            )
        parameters[name] = value if name == "dtype" else _number(name, value)
    if "n" not in parameters:
        raise ValueError(f"heads must say how many tokens to make, got {text!r}; add n=512")
    return make_heads(family, **({"rng": 0} | parameters))


def _number(name: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}; correct it") from None


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _integers(text: str | None, name: str) -> list[int] | None:
    words = _words(text)
    if words is None:
        return None
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(
            f"{name} must be integers separated by commas, got {text!r}; for instance 8,16,32"
        ) from None


def read_output(path: Path) -> NDArray[Any]:
    """Return the array of an output file: ``.npy``, or ``output`` or the only one of the others.

    Raises
    ------
    ValueError
        For another ending, no such file, a damaged file, or several arrays without ``output``.
    """
    import io

    import numpy as np

    path = Path(os.path.expanduser(path))
    if path.suffix not in (".npy", ".npz", ".safetensors"):
        raise ValueError(
            f"output must end in .npy, .npz or .safetensors, got {str(path)!r}; "
            f"write it in one of these formats"
        )
    if not path.is_file():
        raise ValueError(f"output must be an existing file, got {str(path)!r}; check its name")
    raw = path.read_bytes()
    from .heads.files import from_safetensors, refuse_nameless

    if path.suffix == ".safetensors":
        arrays: dict[str, NDArray[Any]] = from_safetensors(raw)[0]
    else:
        try:
            loaded = np.load(io.BytesIO(raw), allow_pickle=False)
            whole = isinstance(loaded, np.ndarray)
            arrays = {"output": loaded} if whole else {name: loaded[name] for name in loaded.files}
        except Exception as error:  # the formats raise many kinds for damaged files
            raise ValueError(
                f"output must be a whole {path.suffix} file, got {str(path)!r}, which is not "
                f"({_one_line(error) if str(error) else type(error).__name__}); write it again"
            ) from error
    for name, x in arrays.items():
        refuse_nameless(x, name)
    if "output" in arrays:
        return arrays["output"]
    if len(arrays) != 1:
        raise ValueError(
            f"output must be an array named 'output' or the only one in its file, got "
            f"{', '.join(sorted(arrays)) or 'none'}; rename it"
        )
    return next(iter(arrays.values()))


def _pick(heads: Heads, head: str | None) -> list[int]:
    """Return the positions of the heads that ``--head`` names, all without it."""
    from .base.arguments import closest

    if head is None:
        return list(range(len(heads)))
    if head in heads.names:
        return [heads.names.index(head)]
    if head.isdecimal():
        if int(head) < len(heads):
            return [int(head)]
        raise ValueError(
            f"head must be a name or a number in 0..{len(heads) - 1}, got {head}; "
            f"numbers start at 0"
        )
    raise ValueError(
        f"head must be a name or a number in 0..{len(heads) - 1}, got {head!r}"
        f"{closest(head, heads.names)}"
    )


# --- verbs --------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"sketchattn {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Softmax attention as matrix approximation: study, certify, and compare with exact attention.

    The main job is "sketchattn study": error against rank on real attention heads.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("study")
def _study(
    heads: Annotated[str, typer.Option(help=HEADS_HELP, metavar="HEADS")] = "minilm",
    methods: Annotated[
        str | None,
        typer.Option(help="Names separated by commas; all that apply by default.", metavar="A,B"),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ranks separated by commas; powers of two from 8 to n/2 by default.",
            metavar="R,R",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds for random methods.")] = 4,
    jobs: Annotated[
        int | None,
        typer.Option(help="Heads computed at the same time; all CPUs by default."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for tables, pictures and finished cells.")
    ] = Path("sketchattn-study"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute again what the folder holds already.")
    ] = False,
    bounds: Annotated[
        str | None,
        typer.Option(
            help="Ids of claims, separated by commas, whose bounds are drawn over the curves.",
            metavar="CLAIM,CLAIM",
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Draw the pictures.")
    ] = True,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Show a progress bar; by default on terminals.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure error against rank on many heads, with pictures.

    One picture for each error measure.  Every method runs on every head, at every rank, for every
    seed, beside the floors that nobody can beat and the predictors that everybody must beat.
    Killed and started again with the same folder, it continues.
    """
    from .kernels._threads import cpu_count
    from .studies.run import study

    result = study(
        parse_heads(heads),
        methods=_words(methods),
        ranks=_integers(ranks, "ranks"),
        seeds=seeds,
        jobs=cpu_count() if jobs is None else jobs,
        out=out,
        resume=not fresh,
        pictures=pictures,
        progress=progress,
        bounds=_words(bounds),
    )
    folder = result.out or out
    if as_json:
        summary = result.summary()
        _print_json(
            {
                "out": folder,
                "results": folder / "results.csv",
                "references": folder / "references.csv",
                "bounds": folder / "bounds.csv" if len(result.bounds) else None,
                "pictures": result.pictures,
                "left_out": result.left_out,
                "computed": result.computed,
                "reused": result.reused,
                "summary": [
                    {key: None if key == "rank" and x != x else x for key, x in record.items()}
                    for record in summary.astype({"rank": object}).to_dict("records")
                ],
            }
        )
        return
    typer.echo(result.render())
    files = ["results.csv", "references.csv", *(["bounds.csv"] if len(result.bounds) else [])]
    typer.echo(f"\nrows: {', '.join(str(folder / name) for name in files)}")
    if result.pictures:
        typer.echo("pictures:")
    for path in result.pictures:
        typer.echo(f"  {path}")


@app.command("validate")
def _validate(
    claims: Annotated[
        str | None,
        typer.Option(
            help="Ids, topics (what stands before the point) or patterns such as "
            "'sketching.amm_*', separated by commas; all by default.",
            metavar="A,B",
        ),
    ] = None,
    heads: Annotated[str, typer.Option(help=HEADS_HELP, metavar="HEADS")] = "minilm",
    trials: Annotated[int, typer.Option(help="Independent draws for each check.")] = 200,
    confidence: Annotated[
        float, typer.Option(help="Of the limits of rates of failure, each one-sided.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(help="Problems checked at the same time; all CPUs by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for verdicts.json and a picture a claim.", show_default=False),
    ] = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Show a progress bar; by default on terminals.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check published and derived claims, constants and all.

    Each claim is checked on its built-in instances, counterexamples among them, and on HEADS.  The
    exit code is 1 where a verdict is not the recorded one, which for heads without a record is
    anything but violated.
    """
    from .base.files import as_folder, make_folder, write_text
    from .kernels._threads import cpu_count
    from .theory.engine.validation import validate

    folder = as_folder(out)
    workers = cpu_count() if jobs is None else jobs
    result = validate(
        _words(claims), parse_heads(heads), trials, confidence, seed, workers, progress=progress
    )
    pictures: list[Path] = []
    if folder is not None:
        verdicts = json.dumps(result.as_dict(), indent=2) + "\n"
        write_text(make_folder(folder) / "verdicts.json", verdicts)
        pictures = result.plot(folder, workers, progress=progress)
    if as_json:
        _print_json(result.as_dict() | {"out": folder, "pictures": pictures})
    else:
        typer.echo(result.render())
        if folder is not None:
            typer.echo(f"\nverdicts: {folder / 'verdicts.json'}\npictures:")
        for path in pictures:
            typer.echo(f"  {path}")
    if result.unexpected:
        raise typer.Exit(DIFFERS)


@app.command("certify")
def _certify(
    heads: Annotated[str, typer.Argument(help=HEADS_HELP, metavar="HEADS")],
    output: Annotated[
        Path,
        typer.Argument(
            help="Output of any implementation: .npy, .npz or .safetensors, shape (n_q, d_v) for "
            "one head or (heads, n_q, d_v); the array named output, or the only one.",
            metavar="OUTPUT",
        ),
    ],
    head: Annotated[
        str | None, typer.Option(help="Name or number (from 0) of one head.", metavar="NAME|INDEX")
    ] = None,
    rows: Annotated[int, typer.Option(help="Exact rows to compute.")] = 256,
    confidence: Annotated[
        float, typer.Option(help="Probability that the interval holds the error.")
    ] = 0.95,
    kind: Annotated[
        str, typer.Option(help="finite-sample (always valid) or approximate (tight).")
    ] = "finite-sample",
    seed: Annotated[int, typer.Option(help="Seed of the sample of rows.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Bound the error of any output array from exact rows.

    The rows are a random sample; the error is |Ohat - O|_F / |O|_F of each head, with the exact
    output O of HEADS.  The width of an interval is high / low: 1 where all rows were computed.
    """
    from .errors.certificates import certify

    given = parse_heads(heads)
    chosen = _pick(given, head)
    outputs = _per_head(read_output(output), given, chosen, head)
    records = []
    for i, array in zip(chosen, outputs, strict=True):
        certificate = certify(given[i], array, rows, confidence, seed, kind=kind)
        names = ("estimate", "low", "high", "width", "rows", "confidence", "kind")
        records.append(
            {"head": given.names[i]} | {name: getattr(certificate, name) for name in names}
        )
    if as_json:
        _print_json(records)
        return
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in r.values()] for r in records]
    typer.echo(_table(list(records[0]), cells, left=1))


def _per_head(
    array: NDArray[np.generic], heads: Heads, chosen: list[int], head: str | None
) -> list[NDArray[np.generic]]:
    """Return the output of each chosen head."""
    one = (heads.n_q, heads.d_v)
    if array.shape == (len(heads), *one):
        return [array[i] for i in chosen]
    if array.shape == one:
        if len(chosen) == 1:
            return [array]
        raise ValueError(
            f"head must be given for an output of one head, got {len(heads)} heads; "
            f"add --head NAME or --head NUMBER"
        )
    raise ValueError(
        f"output must have the shape {one} of one head or {(len(heads), *one)} of all, got "
        f"{array.shape}; check that it belongs to these heads"
    )


@app.command("golden")
def _golden(
    folder: Annotated[
        Path, typer.Argument(help="Folder to write, made if need be.", metavar="DIR")
    ],
    cases: Annotated[str | None, typer.Option(help=CASES_HELP, metavar="A,B")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write golden vectors: cases for other programs.

    Inputs, draws, float64 results and tolerances of exact attention with all its options and of
    every method; the same bytes on every x86 machine.
    """
    from .testing.golden import read_manifest
    from .testing.settling import write_golden

    path = write_golden(_home(folder), cases=cases)
    manifest = read_manifest(path.parent)
    if as_json:
        _print_json(manifest)
        return
    typer.echo(f"{len(manifest['cases'])} cases in {path.parent}, listed in {path.name}")
    for name, reason in manifest["left_out"].items():
        typer.echo(f"  left out: {name}: {reason}")


@app.command("check")
def _check(
    folder: Annotated[
        Path, typer.Argument(help="Golden vectors, of 'sketchattn golden'.", metavar="DIR")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="What another program computed: .safetensors or .npz, an array a case.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    cases: Annotated[str | None, typer.Option(help=CASES_HELP, metavar="A,B")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision that it computed in; that of each array by default.",
            metavar="DTYPE",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check what another program computed from golden vectors.

    The exit code is 1 where a case is wrong or missing.
    """
    from .testing.golden import check_golden

    report = check_golden(_home(folder), output, cases=cases, dtype=dtype)
    if as_json:
        _print_json(report.as_dict())
    else:
        typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(DIFFERS)


def _home(path: Path) -> Path:
    """Return a path in which ``~`` is the home folder."""
    return Path(os.path.expanduser(path))


@app.command("capture")
def _capture(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder of a model and its tokenizer, as save_pretrained of transformers writes "
            "them; nothing is fetched.",
            metavar="MODEL_DIR",
        ),
    ],
    text: Annotated[Path, typer.Option(help="Text to run the model on, UTF-8.", metavar="FILE")],
    layers: Annotated[
        str | None,
        typer.Option(help="Numbers separated by commas, from 0; all by default.", metavar="L,L"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Query heads of each layer, as the layers.", metavar="H,H"),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of the text to keep.")] = 512,
    leave_out: Annotated[
        str | None,
        typer.Option(
            help="Of softcap, sink, bias: what the model adds and heads do not hold.",
            metavar="A,B",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File to write, .safetensors or .npz.", metavar="FILE")
    ] = Path("heads.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Record the heads of a model while it reads a text.

    They are written for study and certify.  Queries, keys and values are those that attention is
    asked with, after rotary embedding.
    """
    from .heads.files import check_target, write_heads
    from .integrations.transformers import capture_text

    target = check_target(out)  # before the model runs
    source = Path(os.path.expanduser(text))
    if not source.is_file():
        raise ValueError(f"text must be an existing file, got {str(source)!r}; check its name")
    made = capture_text(
        model,
        source.read_text(encoding="utf-8"),
        _integers(layers, "layers"),
        _integers(heads, "heads"),
        max_length=max_length,
        leave_out=_words(leave_out) or (),
    )
    write_heads(target, made)
    record = {"out": target, "heads": len(made), "n": made.n_k, "d": made.d, "d_v": made.d_v}
    record |= {"dtype": str(made.dtype), "scale": made.scale, "causal": made.causal}
    if as_json:
        _print_json(record | {"names": list(made.names), "metadata": dict(made.metadata)})
        return
    cells = [f"{x:.6g}" if isinstance(x, float) else str(x) for x in record.values()]
    typer.echo(_table(list(record), [cells], left=1))


@app.command("bench")
def _bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks; all by default.", metavar="[NAME]...")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: shows that it runs, measures nothing.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="Interleaved repetitions; 7 by default, 3 if quick.")
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Name the benchmarks and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Time this library beside what it competes with.

    Each line is measured on all threads and on one.

    What other programs use meanwhile is measured: rounds that they disturb are done again, and
    marked where that does not help.
    """
    from .base.machine import machine
    from .bench import runner

    if only_list:
        listed = [(name, item.description) for name, item in runner.BENCHMARKS.items()]
        if as_json:
            _print_json([{"name": name, "description": text} for name, text in listed])
        else:
            typer.echo(_table(("name", "description"), listed, left=1))
        return
    before = runner.measure_load()
    rows = runner.run(names or None, quick=quick, rounds=rounds)
    around = {"before": before, "after": runner.measure_load()}
    if as_json:
        _print_json({"rows": rows, "load": around, "machine": machine()})
    else:
        typer.echo(runner.render(rows, around))


@app.command("conformance")
def _conformance(
    suite: Annotated[str, typer.Argument(help="The suite; onnx is the only one.", metavar="onnx")],
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Run another project's conformance cases for attention.

    "onnx": the cases of the operator Attention in the installed onnx package, in reference grade
    and by the fast path.  The exit code is 1 if a case in scope fails.
    """
    if suite != "onnx":
        raise ValueError(f"suite must be 'onnx', got {suite!r}; there is no other")
    from .integrations.onnx import conformance

    report = conformance()
    if as_json:
        _print_json(report.as_dict())
    else:
        typer.echo(report.render())
    if report.failed:
        raise typer.Exit(DIFFERS)


_TRAITS = {
    "causal": "causal",
    "key_mask": "mask",
    "rectangular": "rect",
    "randomized": "random",
    "row_stochastic": "rowsum",
    "nonnegative": "nonneg",
    "oracle": "oracle",
    "exact_at_full_rank": "exact",
    "differentiable": "grad",
}


@app.command("methods")
def _methods(as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    """List the methods, their traits and parameters."""
    import dataclasses
    import inspect

    from .zoo.base import make_method, methods

    records: list[dict[str, Any]] = []
    for name, cls in methods().items():
        known = inspect.signature(cls).parameters
        defaults = {
            p: None if value.default is inspect.Parameter.empty else value.default
            for p, value in known.items()
        }
        method = make_method(name, {"rank": 1} if "rank" in known else {})
        records.append(
            {
                "name": name,
                "class": cls.__name__,
                "traits": dataclasses.asdict(method.traits),
                "parameters": defaults,
            }
        )
    if as_json:
        _print_json(records)
        return
    rows = [
        [
            r["name"],
            r["class"],
            *("yes" if r["traits"][trait] else "-" for trait in _TRAITS),
            ", ".join(p if x is None else f"{p}={x}" for p, x in r["parameters"].items()) or "-",
        ]
        for r in records
    ]
    typer.echo(_table(["name", "class", *_TRAITS.values(), "parameters"], rows, left=2))
    typer.echo(
        "\n"
        "causal, mask, rect: honours causal problems, masked keys, n_q != n_k; random: seeded;\n"
        "rowsum: rows sum to one; nonneg: no negative entry; oracle: looks at the exact matrix;\n"
        "exact: equals the exact matrix at rank = n_k; grad: has a gradient at a fixed draw.\n"
        "Traits are those of the defaults."
    )


@app.command("warmup")
def _warmup(as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False) -> None:
    """Compile all kernels once, so that later calls are quick."""
    from .bench import startup

    seconds = startup.warmup()
    folder = _cache_folder()
    if as_json:
        _print_json({"seconds": seconds, "cache": folder})
        return
    where = f"cached in {folder}" if folder else "not cached: no folder can be written"
    typer.echo(f"kernels ready in {seconds:.2f} s, {where}")


def _cache_folder() -> str | None:
    """Return where compiled kernels are kept, None where they are not."""
    from .kernels import _jit, softmax

    if _jit.failure:
        return None
    for kernel in vars(softmax).values():
        path = getattr(getattr(kernel, "stats", None), "cache_path", None)
        if path:
            return str(path)
    return None
