import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shared_kernels
from shared_kernels.testing import nan_filled_empty, tolerances

FOLDER = Path(shared_kernels.__file__).parent
OPERATORS = sorted(path.parent.name for path in FOLDER.glob("*/op.py"))


def test_importing_the_package_imports_neither_torch_nor_triton():
    code = "import sys, shared_kernels; print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_importing_every_operator_does_not_import_triton():
    code = (
        "import sys, shared_kernels as s; [getattr(s, n) for n in s.__all__]; s.layers; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("name", "folder"), sorted(shared_kernels._OPERATORS.items()))
def test_an_operator_stays_a_function_when_its_folder_is_imported(name, folder):
    folder = importlib.import_module(f"shared_kernels.{folder}")
    assert getattr(shared_kernels, name) is getattr(folder, name)
    assert callable(getattr(shared_kernels, name))


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_the_same_files(name):
    files = {path.name for path in (FOLDER / name).glob("*.py")}
    assert files == {"__init__.py", "reference.py", "eager.py", "kernel.py", "op.py"}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_pytorch_path_can_travel_alone(name):
    tree = ast.parse((FOLDER / name / "eager.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert all(getattr(node, "level", 0) == 0 for node in imports)
    assert {module.partition(".")[0] for module in modules} <= {"collections", "math", "torch", "typing", "warnings"}


def test_the_version_and_the_api_are_there():
    assert shared_kernels.API == 1
    assert shared_kernels.__version__.count(".") == 2


def test_poisoned_memory_shows_where_nothing_was_written():
    with nan_filled_empty():
        tensors = torch.empty(2), torch.empty_like(torch.zeros(2)), torch.zeros(2).new_empty(2)
        numbers = torch.empty(2, dtype=torch.int32)
    assert all(tensor.isnan().all() for tensor in tensors)
    assert numbers.eq(2**31 - 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tolerances_let_an_honest_sum_pass_and_a_missing_term_fail(dtype):
    terms = torch.rand(400, dtype=torch.float64).add(0.5).to(dtype)
    exact, summed = terms.double().sum(), terms.to(torch.promote_types(dtype, torch.float32)).sum().to(dtype)
    torch.testing.assert_close(summed.double(), exact, **tolerances(dtype, 400))
    if torch.finfo(dtype).eps < 1e-4:  # half precision cannot tell 400 from 399
        with pytest.raises(AssertionError):
            torch.testing.assert_close((summed - terms[0]).double(), exact, **tolerances(dtype, 400))
