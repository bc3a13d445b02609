"""Sparse, multi-label and attention operators for PyTorch, each with a Triton and a PyTorch implementation.

Importing this package is cheap: torch is imported with the first operator that is used, Triton with its first kernel.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .atman_attention import atman_attention as atman_attention
    from .atman_attention import atman_suffix_attention as atman_suffix_attention
    from .attn_column_mass import attn_column_mass as attn_column_mass
    from .csr_gather_sum import csr_gather_sum as csr_gather_sum
    from .decode_scores import decode_scores as decode_scores
    from .decode_scores import decode_topk as decode_topk
    from .edit_step import edit_magnitude as edit_magnitude
    from .edit_step import edit_step as edit_step
    from .fused_linear_bce import fused_linear_bce as fused_linear_bce
    from .hash_embedding_bag import hash_embedding_bag as hash_embedding_bag
    from .mix32_rows import mix32_rows as mix32_rows
    from .row_quantile import row_quantile as row_quantile
    from .scar_steer import scar_scores as scar_scores
    from .scar_steer import scar_steer as scar_steer
    from .sparse_coder import sae_encode_topk as sae_encode_topk
    from .sparse_coder import topk_select as topk_select
    from .sparse_coder import topk_sparse_decode as topk_sparse_decode

API = 1
"""Generation of the operators' signatures; a caller that was written for another one must not use this package."""

_OPERATORS = {
    "atman_attention": "atman_attention",
    "atman_suffix_attention": "atman_attention",
    "attn_column_mass": "attn_column_mass",
    "csr_gather_sum": "csr_gather_sum",
    "decode_scores": "decode_scores",
    "decode_topk": "decode_scores",
    "edit_magnitude": "edit_step",
    "edit_step": "edit_step",
    "fused_linear_bce": "fused_linear_bce",
    "hash_embedding_bag": "hash_embedding_bag",
    "mix32_rows": "mix32_rows",
    "row_quantile": "row_quantile",
    "scar_scores": "scar_steer",
    "scar_steer": "scar_steer",
    "sae_encode_topk": "sparse_coder",
    "topk_select": "sparse_coder",
    "topk_sparse_decode": "sparse_coder",
}

__all__ = sorted([*_OPERATORS, "__version__"])  # noqa: PLE0605 (computed, so that a name has one home)


class _Package(ModuleType):
    """Keeps `shared_kernels.<op>` the operator: importing the folder of the same name would replace it by a module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _OPERATORS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    """Load what `name` needs, and keep the value for the next access."""
    if name == "layers":  # where `kernels.kernelize` looks for modules
        return importlib.import_module(f"{__name__}.layers")
    if name not in _OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_OPERATORS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package
