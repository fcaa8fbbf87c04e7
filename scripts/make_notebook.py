#!/usr/bin/env python3
"""Make notebooks/main.ipynb from docs/tour.md, executed from a clean kernel."""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.md"
NOTEBOOK = ROOT / "notebooks" / "main.ipynb"


def made(text: str) -> nbformat.NotebookNode:
    """Return the tour's text as a notebook, not executed."""
    cells = []
    for i, part in enumerate(re.split(r"```python\n(.*?)```\n", text, flags=re.S)):
        if part.strip():
            cell = new_code_cell(part.rstrip()) if i % 2 else new_markdown_cell(part.strip())
            cell["id"] = f"cell-{i}"
            cells.append(cell)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return new_notebook(cells=cells, metadata=kernel)


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return it executed; raises where a cell fails."""
    NotebookClient(notebook, timeout=240, kernel_name="python3", record_timing=False).execute()
    return notebook


def main() -> int:
    """Write the executed notebook."""
    NOTEBOOK.parent.mkdir(exist_ok=True)
    nbformat.write(executed(made(TOUR.read_text(encoding="utf-8"))), NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
