import base64
import hashlib
import json

import pytest
import torch
from torch import nn

import shared_kernels
from shared_kernels.testing import random_csr
from tools import export_kernels

kernels = pytest.importorskip("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    export_kernels.export(out)
    return out


@pytest.fixture(scope="module")
def loaded(repository):
    return kernels.get_local_kernel(repository, backend="cpu")


def test_a_local_copy_loads_beside_the_installed_package_and_computes_the_same(loaded):
    indptr, indices = random_csr(5, 9, 4)
    table = torch.randn(9, 12)
    assert loaded.__name__.startswith("_shared_kernels_cpu_")
    assert loaded.API == shared_kernels.API
    assert loaded.csr_gather_sum is not shared_kernels.csr_gather_sum
    assert torch.equal(
        loaded.csr_gather_sum(indptr, indices, table), shared_kernels.csr_gather_sum(indptr, indices, table)
    )


def test_both_copies_of_every_operator_are_registered_apart(loaded):
    for name in loaded.__all__:
        if not name.startswith("__"):
            assert getattr(loaded, name).__module__ != getattr(shared_kernels, name).__module__
    namespaces = [getattr(torch.ops, each) for each in (loaded.__name__, "shared_kernels")]
    assert all(hasattr(each, "csr_gather_sum") for each in namespaces)


def test_each_variant_states_its_backend_and_the_digest_of_every_file(repository):
    ids = set()
    for backend in ("cpu", "cuda", "rocm", "xpu"):
        folder = repository / f"build/torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"]["type"] == backend
        assert metadata["version"] == shared_kernels.API
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
        assert written == set(metadata["digest"]["files"])
        for name, digest in metadata["digest"]["files"].items():
            assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest()
        assert f'"{metadata["id"]}"' in (folder / "_ns.py").read_text()
        ids.add(metadata["id"])
    assert len(ids) == 4


def test_two_exports_of_the_same_sources_are_equal(repository, tmp_path):
    export_kernels.export(tmp_path)
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (repository / path.relative_to(tmp_path)).read_bytes()


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="OUT must be an empty or a new folder"):
        export_kernels.export(tmp_path)


@kernels.use_kernel_forward_from_hub("HashEmbeddingBag")
class _WordEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 6))

    def forward(self, word_ptr, word_units, unit_rows):
        raise NotImplementedError("the layer of the kernel repository takes over")


def test_kernelize_replaces_the_forward_of_a_module_by_a_layer_of_ours(repository):
    layer = kernels.LocalLayerRepository(repo_path=repository, layer_name="HashEmbeddingBag")
    word_ptr, word_units = random_csr(4, 7, 3)
    unit_rows = torch.randint(0, 20, (7, 2))
    with kernels.use_kernel_mapping({"HashEmbeddingBag": {"cpu": layer}}):
        module = kernels.kernelize(_WordEmbedding(), mode=kernels.Mode.TRAINING, device="cpu")
    out = module(word_ptr, word_units, unit_rows)
    expected = shared_kernels.hash_embedding_bag(word_ptr, word_units, unit_rows, module.weight)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert module.weight.grad is not None
