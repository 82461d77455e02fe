"""What `import tff_fedavg` offers, to completion, to type checkers and at run time."""

import ast
import importlib
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import tff_fedavg

SOURCE = pathlib.Path(tff_fedavg.__file__)


def names_for_type_checkers():
    """The names, and their modules, that are imported where a type checker reads, in the form that exports them."""
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert all(name == original for name, (_, original) in imports.items())
    return {name: module for name, (module, _) in imports.items()}


def test_completion_and_type_checkers_see_all_public_names():
    assert dir(tff_fedavg) == sorted(tff_fedavg.__all__) == sorted(names_for_type_checkers())
    assert (SOURCE.parent / "py.typed").exists()


@pytest.mark.parametrize(("name", "module"), names_for_type_checkers().items())
def test_a_public_name_is_that_of_its_module_and_documented(name, module):
    assert getattr(tff_fedavg, name) is getattr(importlib.import_module(module), name)
    assert getattr(tff_fedavg, name).__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'build_fed_prox'"):
        tff_fedavg.build_fed_prox  # noqa: B018


def test_completion_does_not_import_tensorflow():
    program = "import sys, tasks, tff_fedavg; dir(tff_fedavg); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_version_is_that_of_the_package_and_read_without_tensorflow():
    assert tff_fedavg.__version__ == importlib.metadata.version("tff_fedavg")
    program = "import sys, tff_fedavg; tff_fedavg.__version__; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_citation_is_of_this_version():
    citation = (SOURCE.parent.parent / "CITATION.cff").read_text()
    assert f"\nversion: {tff_fedavg.__version__}\n" in citation
