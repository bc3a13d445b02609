"""The operators of whole coders: from `shared_kernels` if it is installed, else the PyTorch copies beside this file."""

from typing import Any

from .ops_scar_sparse_coder import sae_encode_topk_eager, topk_select_eager, topk_sparse_decode_eager

KERNELS_API = 1  # the generation of `shared_kernels` signatures that this package calls

_shared: Any
try:
    import shared_kernels as _shared
except ImportError:
    _shared = None

if getattr(_shared, "API", None) == KERNELS_API and hasattr(_shared, "sae_encode_topk"):
    sae_encode_topk = _shared.sae_encode_topk
    topk_select = _shared.topk_select
    topk_sparse_decode = _shared.topk_sparse_decode
else:
    sae_encode_topk = sae_encode_topk_eager
    topk_select = topk_select_eager
    topk_sparse_decode = topk_sparse_decode_eager
