"""Notebooks of a few lines that follow the conventions, to test what runs and reports notebooks."""

from __future__ import annotations

from pathlib import Path

import nbformat

PARAMETERS = "profile = None\nseed = 0\ndevice = 'auto'\ndata_root = None\nresults_dir = None\nlevel = 1"
SAVE = """
import os
from studies import results
run = results.Run({name!r}, profile, seed, results_dir=results_dir, level=level)
run.keep(level=level, store=os.environ['SELIB_CHECKPOINTS'])
print('level', level)
run.save([f'level is {{level}}'])
"""


def write(folder: Path, name: str, *code: str, question: str = "What is the level?") -> Path:
    """A notebook of that name: the first cell, the parameters, then the code cells."""
    v4 = nbformat.v4
    first = f"# The {name}\n\n{question}\n\n**Run time**: smoke 2 s, standard 1.5 min, full 2 h (two cores)"
    cells = [v4.new_markdown_cell(first), v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [v4.new_code_cell(text) for text in code]
    notebook = v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def good(folder: Path, name: str) -> Path:
    """A notebook that saves its `level`."""
    return write(folder, name, SAVE.format(name=name))
