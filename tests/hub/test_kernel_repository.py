"""shared-kernels as a kernel repository: exported, pushed, and loaded by the `kernels` client."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi

from tests.hub.server import LoopbackHub
from tests.support.tree import ROOT

get_kernel = pytest.importorskip("kernels").get_kernel

REPOSITORY = "user/shared-kernels"


@pytest.fixture(scope="module", autouse=True)
def _publish(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A version of a kernel repository is a branch."""
    out = tmp_path_factory.mktemp("export")
    command = [sys.executable, str(ROOT / "tools/export_kernels.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    api = HfApi()
    api.create_repo(REPOSITORY, repo_type="kernel")
    api.create_branch(REPOSITORY, repo_type="kernel", branch="v1")
    api.upload_folder(repo_id=REPOSITORY, repo_type="kernel", revision="v1", folder_path=out)


def test_the_client_loads_the_operators_from_the_hub():
    kernels = get_kernel(REPOSITORY, version=1, trust_remote_code=True)
    table = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    out = kernels.csr_gather_sum(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), table)
    assert out.tolist() == [[11.0, 22.0], [10.0, 20.0]]


def test_the_copy_from_the_hub_and_the_installed_package_live_side_by_side():
    import shared_kernels

    kernels = get_kernel(REPOSITORY, version=1, trust_remote_code=True)
    assert kernels.__name__ != shared_kernels.__name__
    assert kernels.API == shared_kernels.API
    assert kernels.__version__ == shared_kernels.__version__


def test_an_unknown_publisher_needs_the_callers_trust(hub: LoopbackHub):
    with pytest.raises(ValueError, match="not from a trusted publisher"):
        get_kernel(REPOSITORY, version=1)
    hub.trusted_publishers.add("user")
    try:
        assert get_kernel(REPOSITORY, version=1).API == 1
    finally:
        hub.trusted_publishers.remove("user")
