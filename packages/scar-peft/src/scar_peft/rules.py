"""Steering as functions of plain tensors: what a strength does to a concept's latent, and that to the row.

In residual mode the row keeps everything that the coder does not explain: y = x + sum_c coefficient_c D_c. In
reconstruct mode the row is replaced by the decoded, changed latents. At every gate, the two differ by the coder's error
on x, which does not depend on the strength.

    rule         latent                                 coefficient of D_c
    scale        h -> (1 + a) h where h > 0             a max(h, 0) sd
    set          h -> a                                 (a - h) sd
    add                                                 a ||x|| / ||D_c||
    add_gated                                           a g ||x|| / ||D_c|| if a <= 0, a (1 - g) ||x|| / ||D_c|| else
    with h = act(pre) and g = sigmoid(pre) where the gate is open, else 0

Sources: arXiv 2411.07122 (scale, set; reconstruct), arXiv 2506.19382 (add, add_gated; residual).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coder import (
    CoderWeights,
    activate,
    check_weights,
    concept_indices,
    concept_pre_activations,
    decode,
    fold_concepts,
    kept_latents,
    latents_of,
    linear,
    pre_activations,
    standardize,
    working_dtype,
)
from .remote.settings_scar import GATES, RULES


def open_gates(
    pre: Tensor,
    concepts: int | Sequence[int],
    gate: str,
    *,
    threshold: float | None = None,
    k: int | None = None,
    always: int = 0,
) -> Tensor:
    """Tell on which rows the latents of concepts count.

    Args:
        pre: pre-activations, [..., n]; a gate other than "topk" may be given those of the concepts only.
        concepts: the first so many latents, or their indices along the last axis of `pre`.
        gate: "relu": pre > 0; "threshold": pre > threshold; "topk": among the k largest; "open": always. NaN is open.
        threshold: of the gate "threshold", such as the mean k-th largest pre-activation.
        k: of the gate "topk".
        always: of the gate "topk": so many first latents are open on every row.

    Returns:
        Bool [..., C].

    Raises:
        ValueError: the gate is unknown, or what it needs is missing.

    Example:
        >>> open_gates(torch.tensor([0.5, 2.0, 3.0]), 2, "topk", k=2)
        tensor([False,  True])
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {list(GATES)}, got {gate!r}.")
    rows = concept_indices(concepts, pre.shape[-1])
    if gate == "topk":
        if k is None:
            raise ValueError('k must be given for the gate "topk", got None.')
        return kept_latents(pre, k, always=always)[..., rows]
    if gate == "open":
        return torch.ones_like(pre[..., rows], dtype=torch.bool)
    if gate == "threshold" and threshold is None:
        raise ValueError('threshold must be given for the gate "threshold", got None; calibrate the adapter first.')
    floor = 0.0 if gate == "relu" or threshold is None else threshold
    return ~(pre[..., rows] <= floor)


def concept_coefficients(
    pre: Tensor,
    strength: Tensor,
    *,
    rule: str,
    activation: str,
    is_open: Tensor,
    std: Tensor,
    norm: Tensor,
    decoder_norm: Tensor,
) -> Tensor:
    """Compute by how much of each decoder column a row changes in residual mode; the table of rules as code.

    Args:
        pre: pre-activations of the concepts, [..., C].
        strength: a, broadcastable to [..., C].
        rule: "scale", "set", "add" or "add_gated".
        activation: the coder's.
        is_open: bool [..., C], from `open_gates`; "add" does not look at it.
        std: sd of the rows, [..., 1].
        norm: ||x||, [..., 1].
        decoder_norm: ||D_c||, [C]; a column of length 0 has no direction and gets the coefficient 0 of "add" rules.

    Returns:
        [..., C].

    Raises:
        ValueError: the rule or the activation is unknown.

    Example:
        >>> one = torch.ones(1)
        >>> is_open = one.bool()
        >>> concept_coefficients(
        ...     one, -one, rule="scale", activation="topk", is_open=is_open, std=2 * one, norm=one, decoder_norm=one
        ... )
        tensor([-2.])
    """
    _check_rule(rule)
    if rule in {"scale", "set"}:
        latents = torch.where(is_open, activate(pre, activation), 0.0)
        # Multiplication never acts on a latent that is off or, with tanh, negative. clamp keeps NaN.
        return (strength * latents.clamp(min=0) if rule == "scale" else strength - latents) * std
    is_zero = decoder_norm == 0
    relative = strength * norm / torch.where(is_zero, 1.0, decoder_norm) * ~is_zero
    if rule == "add":
        return relative
    share = torch.where(is_open, torch.sigmoid(pre), 0.0)
    return relative * torch.where(strength > 0, 1 - share, share)


def steer_residual(
    x: Tensor,
    weights: CoderWeights,
    strength: float | Sequence[float] | Tensor,
    *,
    concepts: int | Sequence[int] = 1,
    rule: str = "scale",
    activation: str = "topk",
    gate: str = "relu",
    threshold: float | None = None,
    k: int | None = None,
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """Steer rows and keep the rest of them: y = x + sum_c coefficient_c D_c.

    With strength 0 (not with the rule "set") finite rows come back as they were.

    Args:
        x: [..., d], floating point.
        weights: of hidden size d.
        strength: a number, one per concept, or a tensor broadcastable to [..., C]; finite.
        concepts: the number of concepts C, the first latents; or the indices of their latents.
        rule: see the table above.
        activation: "topk", "topk-sigmoid", "topk-tanh" or "relu".
        gate: see `open_gates`. "topk" encodes all n latents, the others the C concepts only.
        threshold: of the gate "threshold".
        k: of the gate "topk".
        always: of the gate "topk".
        eps: see `standardize` in `coder`.
        normalize: see `standardize` in `coder`.

    Returns:
        [..., d], dtype of x.

    Raises:
        ValueError: shapes do not fit, a strength is not finite, or a setting is out of range.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.zeros(2), torch.zeros(2))
        >>> steer_residual(torch.tensor([3.0, 4.0]), weights, 0.4, rule="add")
        tensor([3., 6.])

    Source: arXiv 2506.19382 for the rules "add" and "add_gated".
    """
    check_weights(weights, x)
    dtype = working_dtype(x, *weights)
    row = x.to(dtype)
    if gate == "topk":
        full = pre_activations(row, weights, eps=eps, normalize=normalize)
        pre = full[..., concept_indices(concepts, full.shape[-1])]
        is_open = open_gates(full, concepts, gate, k=k, always=always)
    else:
        pre = concept_pre_activations(row, fold_concepts(weights, concepts), eps=eps, normalize=normalize)
        is_open = open_gates(pre, pre.shape[-1], gate, threshold=threshold)
    change = _change(row, pre, weights, strength, concepts, rule, activation, is_open, normalize)
    return (row + change).to(x.dtype)


def steer_reconstruct(
    x: Tensor,
    weights: CoderWeights,
    strength: float | Sequence[float] | Tensor,
    *,
    concepts: int | Sequence[int] = 1,
    rule: str = "scale",
    activation: str = "topk",
    gate: str = "topk",
    threshold: float | None = None,
    k: int | None = None,
    always: int = 0,
    eps: float = 1e-5,
    normalize: bool = True,
) -> Tensor:
    """Steer rows by replacing them: change the latents of the concepts, decode all n.

    "add" and "add_gated" add their term to the reconstruction. At every gate,
    `steer_reconstruct(s) - steer_residual(s)` is the same for all s.

    Args:
        x: as for `steer_residual`, and so is what is not listed here.
        weights: as for `steer_residual`.
        strength: as for `steer_residual`.
        gate: which concept latents count, as for `steer_residual`. "topk" leaves that to the coder's own selection,
            in which the first `always` latents are open.
        k: how many latents the coder keeps; may be None for the activation "relu" unless the gate is "topk".
        always: so many first latents bypass the coder's selection.

    Returns:
        [..., d], dtype of x.

    Raises:
        ValueError: as `steer_residual`.

    Example:
        >>> weights = CoderWeights(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
        >>> steer_reconstruct(torch.tensor([3.0, 4.0]), weights, -1.0, k=2, normalize=False)
        tensor([0., 4.])

    Source: arXiv 2411.07122; its scaling factor s is 1 + strength.
    """
    check_weights(weights, x)
    row = x.to(working_dtype(x, *weights))
    pre = pre_activations(row, weights, eps=eps, normalize=normalize)
    rows = concept_indices(concepts, pre.shape[-1])
    is_open = open_gates(pre, concepts, gate, threshold=threshold, k=k, always=always)
    latents = latents_of(pre, k=k, activation=activation, always=always).clone()
    latents[..., rows] = torch.where(is_open, activate(pre[..., rows], activation), 0.0)
    _, mean, std = standardize(row, eps=eps, normalize=normalize)
    if rule in {"scale", "set"}:
        latents[..., rows] = _changed(latents[..., rows], _strength(strength, row, len(rows)), rule)
        return decode(latents, weights, mean=mean, std=std).to(x.dtype)
    change = _change(row, pre[..., rows], weights, strength, concepts, rule, activation, is_open, normalize)
    return (decode(latents, weights, mean=mean, std=std) + change).to(x.dtype)


def _change(
    row: Tensor,
    pre: Tensor,
    weights: CoderWeights,
    strength: float | Sequence[float] | Tensor,
    concepts: int | Sequence[int],
    rule: str,
    activation: str,
    is_open: Tensor,
    normalize: bool,
) -> Tensor:
    columns = fold_concepts(weights, concepts).decoder.to(row.dtype)  # [C, d]
    coefficients = concept_coefficients(
        pre,
        _strength(strength, row, len(columns)),
        rule=rule,
        activation=activation,
        is_open=is_open,
        std=standardize(row, normalize=normalize).std,
        norm=torch.linalg.vector_norm(row, dim=-1, keepdim=True),
        decoder_norm=torch.linalg.vector_norm(columns, dim=-1),
    )
    return linear(coefficients, columns.T)


def _changed(latents: Tensor, strength: Tensor, rule: str) -> Tensor:
    if rule == "scale":
        return torch.where(latents > 0, (1 + strength) * latents, latents)
    return strength.expand_as(latents)


def _strength(strength: float | Sequence[float] | Tensor, row: Tensor, C: int) -> Tensor:
    values = torch.as_tensor(strength, dtype=row.dtype, device=row.device)
    shape = (*row.shape[:-1], C)
    try:
        fits = torch.broadcast_shapes(values.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"strength must be a number, have one entry per concept ({C}), or broadcast to {list(shape)}, "
            f"got shape {list(values.shape)}."
        )
    if not torch.compiler.is_compiling() and not values.isfinite().all():
        raise ValueError(f"strength must be finite, got {strength}.")
    return values


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {list(RULES)}, got {rule!r}.")
