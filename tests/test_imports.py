"""What importing a package costs and brings along."""

import ast
import importlib
import json
from pathlib import Path

import pytest

from tests.support.processes import run_python
from tests.support.tree import DISTRIBUTIONS

HEAVY = {"accelerate", "diffusers", "kernels", "matplotlib", "peft", "torch", "transformers", "triton"}
MEASURE = """
import json, sys, time
start = time.process_time()
module = __import__(sys.argv[1])
seconds = time.process_time() - start
dir(module)
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in sys.modules})]))
"""

by_package = pytest.mark.parametrize("name", [each.import_name for each in DISTRIBUTIONS])


@by_package
def test_importing_a_package_is_cheap(name):
    runs = [json.loads(run_python(MEASURE, name)) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.15
    assert not HEAVY & set(runs[0][1])


@by_package
def test_every_public_name_resolves_and_is_listed_in_order(name):
    package = importlib.import_module(name)
    assert package.__all__ == sorted(set(package.__all__))
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, each) is not None for each in package.__all__)


@by_package
def test_an_unknown_name_is_an_attribute_error(name):
    package = importlib.import_module(name)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'absent'"):
        _ = package.absent


@by_package
def test_type_checkers_see_the_names_that_exist_at_run_time(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text())
    block = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    stated = [alias.asname for node in block for line in node.body for alias in line.names]
    assert sorted(stated) == [each for each in package.__all__ if not each.startswith("__")]
