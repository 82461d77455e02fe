"""The cell that brings the project to a kernel without it, and the badge, are the same in all notebooks."""

import json
import runpy

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
first_cell = runpy.run_path(str(ROOT / "notebooks" / "first_cell.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_has_the_first_cell_and_the_badge_that_the_script_writes(path):
    notebook = json.loads(path.read_text())
    assert first_cell["with_first_cell"](notebook, path.name) == notebook, "run `python notebooks/first_cell.py`"


def test_badge_is_of_a_repository_on_github_only():
    link = "https://colab.research.google.com/github/owner/name/blob/main/notebooks/a.ipynb"
    assert first_cell["badge"]("a.ipynb", "https://github.com/owner/name").endswith(f"]({link})")
    assert first_cell["badge"]("a.ipynb", "https://github.com/owner/name.git").endswith(f"]({link})")
    assert first_cell["badge"]("a.ipynb", "https://example.org/owner/name") is None
    assert first_cell["badge"]("a.ipynb", "..") is None
