import inspect

import pytest
import torch
from torch import nn

from shared_kernels import csr_gather_sum, fused_linear_bce, layers
from shared_kernels.testing import random_csr, random_sets

LAYERS = [layers.CsrGatherSum, layers.FusedLinearBCE, layers.HashEmbeddingBag]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_a_layer_has_no_state_and_no_member_that_kernelize_refuses(layer):
    assert layer.__init__ is nn.Module.__init__
    members, inherited = ({name for name, _ in inspect.getmembers(each)} for each in (layer, nn.Module))
    assert members - inherited == {"can_torch_compile", "has_backward"}


def test_forward_reads_the_attributes_of_the_module_it_serves():
    module = layers.FusedLinearBCE()
    module.weight, module.pos_weight = torch.randn(9, 4), 3.0
    x, positives, row_weight = torch.randn(5, 4), random_sets(5, 9, 3), torch.rand(5)
    expected = fused_linear_bce(x, module.weight, *positives, pos_weight=3.0, row_weight=row_weight, scale=0.5)
    assert torch.equal(module(x, *positives, row_weight, 0.5), expected)


def test_the_gather_layer_sums_rows_of_its_weight():
    module = layers.CsrGatherSum()
    module.weight = nn.Parameter(torch.randn(9, 4))
    csr = random_csr(5, 9, 3)
    assert torch.equal(module(*csr), csr_gather_sum(*csr, module.weight))
