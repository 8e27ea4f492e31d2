"""Run the notebooks of examples again and store what they print, without what is of one machine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KEPT = ("kernelspec", "language_info")


def run() -> None:
    """Run every notebook from nothing, and write it with its outputs; nothing without nbclient."""
    if find_spec("nbclient") is None:
        print("left as they are: nbclient is not installed here; pip install '.[notebooks]'")
        return
    import nbformat
    from nbclient import NotebookClient

    for path in sorted(EXAMPLES.glob("*.ipynb")):
        made = nbformat.read(path, as_version=4)
        NotebookClient(made, timeout=600, kernel_name="python3").execute(cwd=str(EXAMPLES))
        made.metadata = nbformat.from_dict({name: made.metadata[name] for name in KEPT})
        for cell in made.cells:
            cell.metadata = nbformat.from_dict({})
        nbformat.write(made, path)
