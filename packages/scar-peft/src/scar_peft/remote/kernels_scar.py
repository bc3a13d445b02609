"""The steering operators: from `shared_kernels` if it is installed, else the PyTorch copies beside this file."""

from typing import Any

from transformers.utils import logging

from .ops_scar_scar_steer import scar_scores_eager, scar_steer_eager

logger = logging.get_logger(__name__)

KERNELS_API = 1  # the generation of `shared_kernels` signatures that this package calls

_shared: Any
try:
    import shared_kernels as _shared
except ImportError:
    _shared = None

if _shared is not None and not (getattr(_shared, "API", None) == KERNELS_API and hasattr(_shared, "scar_steer")):
    logger.warning_once(
        f"shared_kernels {_shared.__version__} lacks the steering operators of API {KERNELS_API}: PyTorch "
        "implementations are used. Install shared-kernels>=0.1,<0.2."
    )
    _shared = None

if _shared is not None:
    BACKEND = f"shared_kernels {_shared.__version__}"
    scar_scores = _shared.scar_scores
    scar_steer = _shared.scar_steer
else:
    BACKEND = "torch"
    scar_scores = scar_scores_eager
    scar_steer = scar_steer_eager
