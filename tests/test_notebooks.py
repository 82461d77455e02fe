"""The notebooks' code, run cell after cell as Jupyter does."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

NUMBER = re.compile(r"\d+(?:\.\d+)?")
NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def code_cells(name):
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def numbers(text):
    return [float(number) for number in NUMBER.findall(text)]


def text_outputs(cells):
    """Returns what the cells have printed when the notebook was saved."""
    outputs = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "stream"]
    assert all(output["name"] == "stdout" for output in outputs)
    return "".join("".join(output["text"]) for output in outputs)


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebook_runs_in_any_directory_and_prints_about_what_it_was_saved_with(tmp_path, name):
    cells = code_cells(name)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    environment = {**os.environ, "HOME": str(tmp_path), "MPLBACKEND": "agg", "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    saved = text_outputs(cells)
    assert NUMBER.sub("#", result.stdout) == NUMBER.sub("#", saved)
    # Another processor rounds otherwise, and training amplifies it.
    assert numbers(result.stdout) == pytest.approx(numbers(saved), rel=0.5)
