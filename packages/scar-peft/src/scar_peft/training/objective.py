"""What a coder is trained for, on one batch: reconstruct rows, tell concepts, and keep latents alive."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..coder import (
    CoderWeights,
    activate,
    concept_pre_activations,
    decode,
    fold_concepts,
    pre_activations,
    standardize,
)
from ..losses import concept_loss, reconstruction_loss
from ..remote.kernels_coder_scar import sae_encode_topk, topk_sparse_decode


@dataclass(frozen=True, kw_only=True)
class CoderSettings:
    """Shape and loss of a coder."""

    k: int | None
    """Latents kept per row."""
    concepts: int
    """C; concept c is latent c."""
    activation: str = "topk"
    """As in `coder.activate`."""
    always: int = 0
    """So many first latents bypass the selection."""
    eps: float = 1e-5
    """Added to the standard deviation when encoding."""
    normalize: bool = True
    """Whether rows are standardized."""
    concept_weight: float = 1.0
    """Weight of the concept loss."""
    pos_weight: tuple[float, ...] = (1.0,)
    """Of positive labels: one for all concepts, or one for each."""
    unlabelled_as_negative: bool = False
    """Read the label -1 as 0."""
    soft_labels: bool = False
    """Labels may lie between 0 and 1."""
    auxk: int = 0
    """Dead latents that reconstruct the rest of a row."""
    auxk_weight: float = 1 / 32
    """Weight of that loss."""


class CoderLoss(NamedTuple):
    """Scalars, means over the rows, and which latents were in use."""

    loss: Tensor
    """The one to differentiate."""
    reconstruction: Tensor
    """Normalized mean squared error."""
    concept: Tensor
    """Binary cross-entropy, summed over concepts, in nats."""
    l1: Tensor
    """sum |h| / ||x||."""
    l0: Tensor
    """Latents that are not 0."""
    fired: Tensor
    """Bool `[n]`: latents that were not 0 on some row."""


def coder_loss(
    x: Tensor, labels: Tensor, weights: CoderWeights, settings: CoderSettings, is_dead: Tensor | None = None
) -> CoderLoss:
    """Compute the loss of a coder.

    Args:
        x: `[N, d]`, activations.
        labels: `[N, C]`; -1 is unlabelled.
        weights: the coder, float32.
        settings: its shape and what counts.
        is_dead: bool `[n]`, for `settings.auxk`.
    """
    x = x.to(torch.float32)
    coded = _code_all(x, weights, settings) if settings.activation == "relu" else _code_some(x, weights, settings)
    nmse = reconstruction_loss(coded.reconstruction, x).mean()
    concept = concept_loss(
        coded.concept_pre,
        labels,
        pos_weight=torch.tensor(settings.pos_weight, device=x.device).squeeze(),
        unlabelled_as_negative=settings.unlabelled_as_negative,
        soft_labels=settings.soft_labels,
    ).mean()
    loss = nmse + settings.concept_weight * concept
    if settings.auxk and is_dead is not None:
        rest = ((x - coded.reconstruction) / (coded.std + settings.eps)).detach()
        loss = loss + settings.auxk_weight * _dead_latents_loss(x, rest, weights, settings, is_dead)
    with torch.no_grad():
        is_on = coded.latents != 0
        fired = torch.zeros(len(weights.encoder), dtype=torch.int32, device=x.device)
        fired.scatter_add_(0, coded.indices.flatten().long(), is_on.flatten().int())
        norm = torch.linalg.vector_norm(x, dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        l1 = (coded.latents.abs().sum(-1) / norm).mean()
    return CoderLoss(loss, nmse.detach(), concept.detach(), l1, is_on.sum(-1).float().mean(), fired > 0)


class _Coded(NamedTuple):
    """Rows that went through a coder."""

    reconstruction: Tensor
    """`[N, d]`."""
    concept_pre: Tensor
    """Pre-activations of the concepts `[N, C]`."""
    latents: Tensor
    """`[N, K]`."""
    indices: Tensor
    """Which latents these are, `[N, K]`."""
    std: Tensor
    """`[N, 1]`."""


def _code_some(x: Tensor, weights: CoderWeights, settings: CoderSettings) -> _Coded:
    """Code by the kept latents: neither they nor their gradients are ever laid out over all n."""
    assert settings.k is not None
    form = {"eps": settings.eps, "normalize": settings.normalize}
    pre, indices, mean, std = sae_encode_topk(
        x, weights.encoder, weights.latent_bias, weights.pre_bias, settings.k, always=settings.always, **form
    )
    latents = activate(pre, settings.activation)
    reconstruction = topk_sparse_decode(
        indices, latents, weights.decoder.T, scale=std, shift=mean, bias=weights.pre_bias
    )
    C = settings.concepts
    if settings.always >= C:
        concept_pre = pre[:, :C]
    else:
        z = standardize(x, eps=settings.eps, normalize=settings.normalize).values
        concept_pre = F.linear(z - weights.pre_bias, weights.encoder[:C], weights.latent_bias[:C])
    return _Coded(reconstruction, concept_pre, latents, indices, std[:, None])


def _code_all(x: Tensor, weights: CoderWeights, settings: CoderSettings) -> _Coded:
    """Code without a selection."""
    pre = pre_activations(x, weights, eps=settings.eps, normalize=settings.normalize)
    latents = activate(pre, settings.activation)
    _, mean, std = standardize(x, eps=settings.eps, normalize=settings.normalize)
    indices = torch.arange(latents.shape[1], device=x.device).expand_as(latents)
    return _Coded(decode(latents, weights, mean=mean, std=std), pre[:, : settings.concepts], latents, indices, std)


def _dead_latents_loss(
    x: Tensor, rest: Tensor, weights: CoderWeights, settings: CoderSettings, is_dead: Tensor
) -> Tensor:
    """AuxK of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".

    The error of coding what is left of the rows by the dead latents alone, relative to its size.
    """
    rows = is_dead.nonzero().squeeze(1)
    z = standardize(x, eps=settings.eps, normalize=settings.normalize).values
    pre = F.linear(z - weights.pre_bias, weights.encoder[rows], weights.latent_bias[rows])
    if not len(rows):
        return pre.sum()  # 0, with a gradient
    best = pre.topk(min(settings.auxk, len(rows)), dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, best.indices, activate(best.values, settings.activation))
    error = F.linear(latents, weights.decoder[:, rows]) - rest
    return error.square().mean() / rest.square().mean().clamp_min(torch.finfo(rest.dtype).tiny)


class SparseCoder(nn.Module):
    """The four tensors of one layer's coder, shared with the adapter, and its loss as a forward pass."""

    def __init__(self, weights: CoderWeights, settings: CoderSettings) -> None:
        """Take the adapter's parameters as they are: training changes the adapter."""
        super().__init__()
        self.encoder: nn.Parameter
        self.decoder: nn.Parameter
        self.pre_bias: nn.Parameter
        self.latent_bias: nn.Parameter
        self.rows_since_fired: Tensor
        for name, tensor in weights._asdict().items():
            if not isinstance(tensor, nn.Parameter) or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name} of the adapter must be a float32 parameter to be trained, got {tensor.dtype}; "
                    "create the adapter with autocast_adapter_dtype=True."
                )
            self.register_parameter(name, tensor)
        self.settings = settings
        self.register_buffer(
            "rows_since_fired", torch.zeros(len(weights.encoder), dtype=torch.int64, device=tensor.device)
        )

    @property
    def weights(self) -> CoderWeights:
        """The coder's tensors."""
        return CoderWeights(self.encoder, self.decoder, self.pre_bias, self.latent_bias)

    def forward(self, x: Tensor, labels: Tensor, is_dead: Tensor | None = None) -> CoderLoss:
        """See `coder_loss`."""
        device = self.encoder.device
        return coder_loss(x.to(device), labels.to(device), self.weights, self.settings, is_dead)

    @torch.no_grad()
    def concept_scores(self, x: Tensor) -> Tensor:
        """Pre-activations of the concepts `[N, C]`."""
        folded = fold_concepts(self.weights, self.settings.concepts)
        x = x.to(self.encoder.device)
        return concept_pre_activations(x, folded, eps=self.settings.eps, normalize=self.settings.normalize)

    def count_fired(self, fired: Tensor, rows: int) -> None:
        """Note which latents were in use on the last `rows` rows."""
        self.rows_since_fired += rows
        self.rows_since_fired.masked_fill_(fired, 0)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale the decoder's columns to norm 1; columns of zeros stay."""
        norm = torch.linalg.vector_norm(self.decoder, dim=0, keepdim=True)
        self.decoder.div_(torch.where(norm == 0, 1.0, norm))
