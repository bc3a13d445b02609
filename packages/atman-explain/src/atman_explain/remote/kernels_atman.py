"""The attention operators: from `shared_kernels` if it is installed, else the PyTorch copies beside this file."""

from typing import Any

from transformers.utils import logging

from .ops_atman_atman_attention import atman_attention_eager, atman_suffix_attention_eager

logger = logging.get_logger(__name__)

KERNELS_API = 1  # the generation of `shared_kernels` signatures that this package calls

_shared: Any
try:
    import shared_kernels as _shared
except ImportError:
    _shared = None

if _shared is not None and not (getattr(_shared, "API", None) == KERNELS_API and hasattr(_shared, "atman_attention")):
    logger.warning_once(
        f"shared_kernels {_shared.__version__} lacks the attention operators of API {KERNELS_API}: PyTorch "
        "implementations are used. Install shared-kernels>=0.1,<0.2."
    )
    _shared = None

if _shared is not None:
    BACKEND = f"shared_kernels {_shared.__version__}"
    atman_attention = _shared.atman_attention
    atman_suffix_attention = _shared.atman_suffix_attention
else:
    BACKEND = "torch"
    atman_attention = atman_attention_eager
    atman_suffix_attention = atman_suffix_attention_eager
