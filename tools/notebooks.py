"""Execute docs/notebooks/*.ipynb and store what they print and draw, as GitHub shows it: `make notebooks`."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
MAX_BYTES = 300_000
"""Of a notebook, as every change of its pictures stays in the repository for good."""


def execute(path: Path) -> None:
    """Replace the outputs of a notebook by those of a run.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
        SystemExit: the notebook is larger than it may be.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, path)
    if (size := path.stat().st_size) > MAX_BYTES:
        sys.exit(f"{path} has {size:,} bytes, more than {MAX_BYTES:,}: draw smaller pictures")


def main() -> None:
    """Execute all notebooks."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        started_s = time.monotonic()
        execute(path)
        print(f"{path.name}: {time.monotonic() - started_s:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
