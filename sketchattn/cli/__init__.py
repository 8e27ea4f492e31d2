"""The command line: ``sketchattn VERB``, a file a verb.

Only Typer is loaded here; each verb imports what it needs, so that ``--help`` is quick.  Errors are
one line on stderr and exit code 2; 1 is left to verbs whose answer is no.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from ..base.machine import typed_as
from .application import FAILED, INTERRUPTED, app, one_line, printable
from .inputs import parse_heads as parse_heads
from .inputs import read_output as read_output

# In the order in which ``--help`` lists them.
VERBS = (
    "study",
    "recommend",
    "validate",
    "claims",
    "certify",
    "golden",
    "capture",
    "bench",
    "conformance",
    "methods",
    "warmup",
)
for _verb in VERBS:
    import_module(f"{__name__}.{_verb}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        0; 1 where the answer of a verb is no: ``validate`` finds another verdict than the recorded
        one, ``certify`` an error that may be above ``--max-error``; 2 after an error, which is one
        line on stderr; 130 after Ctrl-C.  With the environment variable
        ``SKETCHATTN_TRACEBACK`` set, errors are raised instead.

    Examples
    --------
    >>> main(["--version"]) == 0
    sketchattn ...
    True
    """
    with printable():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with typed_as(words):
            code = app(args=words, prog_name="sketchattn", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("SKETCHATTN_TRACEBACK"):
            raise
        print(f"sketchattn: {one_line(error)}", file=sys.stderr)
        return FAILED
    if code == INTERRUPTED:
        rest = "; the same command continues" if "study" in words[:1] else ""
        print(f"sketchattn: interrupted{rest}", file=sys.stderr)
    return code if isinstance(code, int) else 0
