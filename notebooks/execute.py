"""Execute the notebook from its start, in a fresh kernel, and write it back with what came out.

python -m notebooks.execute
"""

import hashlib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FILE = Path(__file__).with_name("tour.ipynb")


def client(notebook: NotebookNode, folder: Path) -> NotebookClient:
    """Runs the cells with this Python, as in a notebook that lies in the folder."""
    return NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )


def code_sum(notebook: NotebookNode) -> str:
    """sha256 of the code cells. The notebook keeps it, so that a test sees a cell that was changed
    and not executed."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def main() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    client(notebook, FILE.parent).execute()
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
        "folio": {"code_sha256": code_sum(notebook)},
    }
    nbformat.write(notebook, FILE)


if __name__ == "__main__":
    main()
