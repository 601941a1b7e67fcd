"""Runs the notebooks in a kernel of their own and stores what they show: `python notebooks/run.py`."""

import pathlib

import nbclient
import nbformat

for path in sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, record_timing=False, coalesce_streams=True).execute()
    nbformat.write(notebook, path)
    print(path.name)
