"""Executes notebooks in the project's environment, and saves them with what their cells put out.

    .venv/bin/python notebooks/execute.py notebooks/NAME.ipynb ...

Pictures are saved with a palette, which takes a third of the bytes: neither IPython nor Matplotlib can do that by a
setting. Jupyter has to be there: `make notebook` brings it.
"""

import base64
import io
import os
import pathlib
import sys
import time

import nbclient
import nbformat
from PIL import Image

_COLORS = 64


def execute(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if png := output.get("data", {}).get("image/png"):
                output.data["image/png"] = in_few_colors(png)
    nbformat.write(notebook, path)


def in_few_colors(png: str) -> str:
    """Returns a picture, as base64, with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    # Others than MAXCOVERAGE change the colours of a few points among much else.
    picture = picture.quantize(_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode() + "\n"


def main() -> None:
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", PYDEVD_DISABLE_FILE_VALIDATION="1")
    for name in sys.argv[1:]:
        start = time.monotonic()
        execute(pathlib.Path(name))
        print(f"{name}: {time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
