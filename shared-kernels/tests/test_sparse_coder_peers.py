"""The sparse coder beside what other libraries compute."""

import pytest
import torch
import torch.nn.functional as F

from shared_kernels import sae_encode_topk, topk_sparse_decode

N, n, k, d = 7, 60, 5, 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def latents():
    torch.manual_seed(0)
    values, indices = torch.randn(N, n).topk(k)
    return values, indices, torch.randn(n, d)


def test_decoding_equals_embedding_bag(latents):
    values, indices, rows = latents
    want = F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
    torch.testing.assert_close(topk_sparse_decode(indices, values, rows), want, **CLOSE)


def test_decoding_equals_that_of_sparsify(latents):
    utils = pytest.importorskip("sparsify.utils", reason="needs eai-sparsify")
    values, indices, rows = latents
    want = utils.eager_decode(indices, values, rows.T)
    torch.testing.assert_close(topk_sparse_decode(indices, values, rows), want, **CLOSE)


def test_a_coder_without_normalization_equals_that_of_sae_lens():
    sae_lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    x, encoder, rows = torch.randn(N, d), torch.randn(n, d), torch.randn(n, d)
    latent_bias, pre_bias = torch.randn(n), torch.randn(d)
    settings = {"dtype": "float32", "device": "cpu", "normalize_activations": "none", "apply_b_dec_to_input": True}
    theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=d, d_sae=n, k=k, **settings))
    with torch.no_grad():
        theirs.W_enc.copy_(encoder.T)
        theirs.W_dec.copy_(rows)
        theirs.b_enc.copy_(latent_bias)
        theirs.b_dec.copy_(pre_bias)
    values, indices, mean, std = sae_encode_topk(x, encoder, latent_bias, pre_bias, k, normalize=False)
    ours = topk_sparse_decode(indices, values.relu(), rows, scale=std, shift=mean, bias=pre_bias)
    torch.testing.assert_close(ours, theirs(x).detach(), **CLOSE)
    latents = torch.zeros(N, n).scatter(1, indices.long(), values.relu())
    torch.testing.assert_close(latents, theirs.encode(x).detach(), **CLOSE)
