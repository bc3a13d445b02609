"""The sparse operators: from `shared_kernels` if it is installed, else the PyTorch copies beside this file."""

from typing import Any

from transformers.utils import logging

from .ops_tfree_csr_gather_sum import csr_gather_sum_eager
from .ops_tfree_decode_scores import decode_scores_eager, decode_topk_eager
from .ops_tfree_fused_linear_bce import fused_linear_bce_eager
from .ops_tfree_hash_embedding_bag import hash_embedding_bag_eager

logger = logging.get_logger(__name__)

KERNELS_API = 1  # the generation of `shared_kernels` signatures that this package calls

_shared: Any
try:
    import shared_kernels as _shared
except ImportError:
    _shared = None

if _shared is not None and getattr(_shared, "API", None) != KERNELS_API:
    logger.warning_once(
        f"shared_kernels has API {getattr(_shared, 'API', None)}, this model calls API {KERNELS_API}: "
        "PyTorch implementations are used. Install shared-kernels>=0.1,<0.2."
    )
    _shared = None

if _shared is not None:
    BACKEND = f"shared_kernels {_shared.__version__}"
    csr_gather_sum = _shared.csr_gather_sum
    decode_scores = _shared.decode_scores
    decode_topk = _shared.decode_topk
    fused_linear_bce = _shared.fused_linear_bce
    hash_embedding_bag = _shared.hash_embedding_bag
else:
    BACKEND = "torch"
    csr_gather_sum = csr_gather_sum_eager
    decode_scores = decode_scores_eager
    decode_topk = decode_topk_eager
    fused_linear_bce = fused_linear_bce_eager
    hash_embedding_bag = hash_embedding_bag_eager
