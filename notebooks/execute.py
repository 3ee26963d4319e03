"""Execute the notebook from the start in a new kernel, and save it with its outputs.

python -m notebooks.execute
"""

import hashlib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FILE = Path(__file__).with_name("tour.ipynb")


def client(notebook: NotebookNode, folder: Path) -> NotebookClient:
    """A client that executes the cells with this Python, with `folder` as the working directory."""
    return NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )


def code_sha256(notebook: NotebookNode) -> str:
    """The SHA-256 of the code cells. It is saved in the notebook's metadata, so that a test can
    detect cells that were changed and not executed."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()


def main() -> None:
    notebook = nbformat.read(FILE, as_version=4)
    client(notebook, FILE.parent).execute()
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
        "folio": {"code_sha256": code_sha256(notebook)},
    }
    nbformat.write(notebook, FILE)


if __name__ == "__main__":
    main()
