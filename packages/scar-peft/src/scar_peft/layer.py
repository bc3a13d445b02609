"""`ScarLayer`: the coders of one module's output, one per adapter, and the hook that uses them."""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .coder import CoderWeights, fold_concepts
from .coding import code, encode_kept
from .config import ScarConfig
from .remote.hook_scar import SteeringHook
from .remote.rows_scar import FoldedConcepts
from .remote.settings_scar import ConceptSettings, Gate
from .remote.steering_scar import start_steering
from .remote.strengths_scar import Plan, Wishes

CHILD = "scar"
"""Name of the layer below its target. peft tells adapter weights by the prefix "scar_", which must come only once."""


class ScarLayer(SteeringHook, nn.Module, BaseTunerLayer):
    """Sits below the module whose output it reads and steers, and replaces nothing.

    Weights lie in four flat dictionaries keyed by adapter: peft, and transformers on loading, take the adapter's name
    off the last part of a parameter's path only.
    """

    adapter_layer_names = ("scar_encoder", "scar_decoder", "scar_pre_bias", "scar_latent_bias")
    other_param_names = ("configs", "folded")

    def __init__(self, target: nn.Module, owner: nn.Module, layer_index: int, site: str) -> None:
        """Hook `target`.

        Args:
            target: the module whose output [B, L, d], or first output, is steered.
            owner: the module whose forward pass is given masks and positions.
            layer_index: index of the block.
            site: what `target` is in it.
        """
        super().__init__()
        self.layer_index = layer_index
        self.site = site
        self.scar_encoder = nn.ParameterDict()  # [n, d]
        self.scar_decoder = nn.ParameterDict()  # [d, n]
        self.scar_pre_bias = nn.ParameterDict()  # [d]
        self.scar_latent_bias = nn.ParameterDict()  # [n]
        self.configs: dict[str, ScarConfig] = {}
        self.folded: dict[str, tuple[Any, FoldedConcepts]] = {}
        self._disable_adapters = False  # peft's class attribute; torch.compile looks where an attribute lies
        self.attach(target, owner)

    def add_adapter(self, name: str, config: ScarConfig, inference_mode: bool) -> None:
        """Create the coder of one adapter: a uniform encoder, its transpose as the decoder, no biases (section b.3)."""
        assert config.hidden_size is not None and config.n_latents is not None
        d, n = config.hidden_size, len(config.concepts) if config.compact else config.n_latents
        self.configs[name] = config
        self.folded.pop(name, None)
        # peft may have patched these assignments to create parameters on "meta". The decoder's columns lie one after
        # the other in memory, because decoding a token reads whole columns.
        empty = (torch.empty(n, d), torch.empty(n, d).T, torch.empty(d), torch.empty(n))
        for values, tensor in zip(self._dictionaries(), empty, strict=True):
            values[name] = nn.Parameter(tensor)
        init_coder_(self.weights(name))
        self._move_adapter_to_device_of_base_layer(name)  # type: ignore[operator]
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)  # type: ignore[operator]
        self.forget(name)
        start_steering(self, name, config.default_steering or {})

    def weights(self, adapter: str = "default") -> CoderWeights:
        """The adapter's four parameters themselves, not copies."""
        return CoderWeights(*(values[adapter] for values in self._dictionaries()))

    def set_weights(self, adapter: str, weights: CoderWeights) -> None:
        """Replace the parameters of an adapter; sizes may change."""
        for values, new in zip(self._dictionaries(), weights, strict=True):
            old = values[adapter]
            values[adapter] = nn.Parameter(new.detach().to(old).clone(), requires_grad=old.requires_grad)
        self.folded.pop(adapter, None)

    def config(self, adapter: str = "default") -> ScarConfig:
        """The adapter's configuration."""
        return self.configs[adapter]

    def concept_rows(self, adapter: str) -> FoldedConcepts:
        """The concepts' weights, folded once for each change of the weights."""
        weights = self.weights(adapter)
        if torch.compiler.is_compiling():
            return self._fold(adapter)
        if torch.is_grad_enabled() and any(each.requires_grad for each in weights):
            self.folded.pop(adapter, None)  # what trains may be written to in ways that leave no trace
            return self._fold(adapter)
        # Values written in place raise `_version`; loading and moving put other tensors in place.
        key = tuple((id(each), None if each.is_inference() else each._version, each.data_ptr()) for each in weights)
        found = self.folded.get(adapter)
        if found is None or found[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                found = self.folded[adapter] = (key, self._fold(adapter))
        return found[1]

    def plan_for(self, adapter: str, wishes: Wishes) -> Plan:
        """How this layer fulfils wishes.

        Raises:
            ValueError: they need latents that a compact adapter does not hold.
        """
        plan = super().plan_for(adapter, wishes)
        if plan.mode == "reconstruct" and self.config(adapter).compact:
            raise ValueError(COMPACT_ERROR)
        return plan

    def concept_settings(self, adapter: str) -> ConceptSettings:
        """How the adapter reads and steers here."""
        return self.configs[adapter].concept_settings(self.layer_index)

    def adapters_here(self) -> list[str]:
        """Adapters that hold weights here."""
        return list(self.configs)

    def adapters_in_use(self) -> list[str]:
        """The active ones of them; none while adapters are disabled."""
        active: list[str] = self.active_adapters  # type: ignore[assignment]
        return [] if self.disable_adapters else [name for name in active if name in self.configs]

    def own_gate(self, adapter: str) -> Gate:
        """What decides in the coder itself whether a concept is on."""
        return self.config(adapter).own_gate

    def kept(self, adapter: str, hidden: Tensor) -> Tensor:
        """Which concepts are among the latents that the coder keeps [..., C]."""
        config, rows = self.config(adapter), hidden.reshape(-1, hidden.shape[-1])
        C = len(config.concepts)
        _, indices, _, _ = encode_kept(rows, self._wide_weights(adapter, rows), config)
        concepts = torch.arange(C, device=indices.device, dtype=indices.dtype)
        return (indices[:, None, :] == concepts[:, None]).any(-1).view(*hidden.shape[:-1], C)

    def reconstruction(self, adapter: str, hidden: Tensor) -> Tensor:
        """What the coder makes of `hidden` [..., d], unchanged concepts and all."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        self._lay_out_decoder(adapter)
        coded = code(rows, self._wide_weights(adapter, rows), self.config(adapter))
        return coded.reconstruction.view(hidden.shape)

    def place(self, adapter: str) -> tuple[torch.device, torch.dtype]:
        """Device and dtype to compute in: that of the weights, or, until they are loaded, of the target."""
        weight = self.scar_encoder[adapter]
        device, dtype = weight.device, weight.dtype
        if weight.is_meta:
            found = self._get_base_layer_device_and_dtype(self.get_base_layer())
            device, dtype = found[0] or torch.device("cpu"), found[1] or torch.float32
        return device, torch.promote_types(dtype, torch.float32)

    def get_base_layer(self) -> nn.Module:
        """The target: the module that this one is below of."""
        return self._target[0]

    @property
    def weight(self) -> Tensor:
        """A parameter of the target, for callers that look for its device."""
        return next(self.get_base_layer().parameters())

    @property
    def bias(self) -> None:
        """None: biases of the target are not the adapter's business."""
        return

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see `MERGE_ERROR`."""
        raise ValueError(MERGE_ERROR)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; with the last one, the layer leaves its target."""
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)
        if not self.configs:
            self.remove()

    def remove(self) -> None:
        """Take hooks and layer off the target."""
        self.detach()
        target = self.get_base_layer()
        # A new dictionary: peft deletes adapters while it iterates over the old one.
        target._modules = {name: module for name, module in target._modules.items() if module is not self}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.replan()  # strengths follow the weights to their device
        return self

    def _dictionaries(self) -> tuple[nn.ParameterDict, ...]:
        return (self.scar_encoder, self.scar_decoder, self.scar_pre_bias, self.scar_latent_bias)

    def _fold(self, adapter: str) -> FoldedConcepts:
        return fold_concepts(self.weights(adapter), len(self.configs[adapter].concepts))

    def _wide_weights(self, adapter: str, hidden: Tensor) -> CoderWeights:
        if self.config(adapter).compact:
            raise ValueError(COMPACT_ERROR)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return CoderWeights(*(each.to(dtype) for each in self.weights(adapter)))

    def _lay_out_decoder(self, adapter: str) -> None:
        """Put each of the decoder's columns in one piece; weights loaded otherwise are laid out anew, once."""
        decoder = self.scar_decoder[adapter]
        if not decoder.T.is_contiguous() and not decoder.requires_grad:
            decoder.data = decoder.T.contiguous().T

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # Packed integer weights of a quantized base say nothing about the dtype of activations.
        own = {id(parameter) for parameter in self.parameters()}
        for parameter in base_layer.parameters():
            if parameter.is_floating_point() and not parameter.is_meta and id(parameter) not in own:
                return parameter.device, parameter.dtype
        return None, None


MERGE_ERROR = "SCAR adapters depend on the activation and cannot be merged; use unload()."
COMPACT_ERROR = (
    'mode="reconstruct" and gate="topk" need all latents, and a compact adapter holds its concepts only. '
    'Load the full adapter, or steer with mode="residual".'
)


@torch.no_grad()
def init_coder_(weights: CoderWeights) -> None:
    """Start values of the original: E uniform in +-1/sqrt(d) (torch's default for linear layers), D = E^T, biases 0."""
    bound = weights.encoder.shape[1] ** -0.5
    weights.encoder.uniform_(-bound, bound)
    weights.decoder.copy_(weights.encoder.T)
    weights.pre_bias.zero_()
    weights.latent_bias.zero_()


def scar_layers(model: nn.Module, adapter: str | None = None) -> list[ScarLayer]:
    """The SCAR layers of any module tree in the order of its modules; those that hold `adapter`, if it is given.

    Raises:
        ValueError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, ScarLayer)]
    found = [layer for layer in found if adapter is None or adapter in layer.configs]
    if not found:
        of = "" if adapter is None else f' of the adapter "{adapter}"'
        raise ValueError(
            f"model must hold SCAR layers{of}, got a {type(model).__name__} without any. "
            "Add one with get_peft_model(model, ScarConfig(...)) or PeftModel.from_pretrained."
        )
    return found
