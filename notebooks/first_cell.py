"""Writes the first cell of code, and the badge "Open in Colab", into all notebooks: they are the same in each.

    python notebooks/first_cell.py

The cell brings the project to kernels that lack it, such as Colab's: see py311.py. In the project's own environment it
does nothing. The badge is left out as long as PROJECT is no repository on GitHub, from where alone Colab opens
notebooks.
"""

import json
import pathlib
import re
from typing import Any

# Where notebooks that do not lie in the project find it: the address of its repository, or a directory. It has no
# address yet, so that Colab cannot get it.
PROJECT = ".."

_NOTEBOOKS = pathlib.Path(__file__).parent
_CELL = """\
import importlib.util
import os
import subprocess
import sys

PROJECT = "{project}"  # Where the project is, unless this notebook lies in it: a directory, or a repository's address.

# A kernel without the project has the cells that follow run in the project's environment, with Python 3.11.
if not all(map(importlib.util.find_spec, ["tensorflow_federated", "tff_fedavg"])):
    directory = ".." if os.path.exists("../notebooks/py311.py") else PROJECT
    if "://" in directory:
        directory = "tff_fedavg_project"
        if not os.path.exists(directory):
            subprocess.run(["git", "clone", "--quiet", "--depth=1", PROJECT, directory], check=True)
    if not os.path.exists(f"{{directory}}/notebooks/py311.py"):
        raise FileNotFoundError(f"{{directory}} is not the project: PROJECT, above, has to say where it is")
    sys.path.append(os.path.abspath(f"{{directory}}/notebooks"))
    get_ipython().run_line_magic("load_ext", "py311")"""
_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"


def badge(name: str, project: str) -> str | None:
    """The Markdown of a notebook's badge; None if the project is not on GitHub."""
    if not (match := re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?", project)):
        return None
    return _BADGE.format(address=f"https://colab.research.google.com/github/{match[1]}/blob/main/notebooks/{name}")


def with_first_cell(notebook: dict[str, Any], name: str, project: str = PROJECT) -> dict[str, Any]:
    """The notebook with the badge at the top, and the first cell before all other code."""
    cells = [cell for cell in notebook["cells"] if cell.get("id") not in ("badge", "first-cell")]
    first = {"cell_type": "code", "execution_count": None, "id": "first-cell", "metadata": {}, "outputs": []}
    first["source"] = _CELL.format(project=project).splitlines(keepends=True)
    code = [index for index, cell in enumerate(cells) if cell["cell_type"] == "code"]
    cells.insert(code[0] if code else len(cells), first)
    if markdown := badge(name, project):
        cells.insert(0, {"cell_type": "markdown", "id": "badge", "metadata": {}, "source": [markdown]})
    return {**notebook, "cells": cells}


def main() -> None:
    for path in _NOTEBOOKS.glob("*.ipynb"):
        notebook = with_first_cell(json.loads(path.read_text()), path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
