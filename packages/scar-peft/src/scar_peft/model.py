"""`ScarModel`: what peft calls to put SCAR layers into a model, and what steers `forward` and `generate`."""

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .config import ScarConfig
from .layer import CHILD, MERGE_ERROR, ScarLayer
from .remote.generation_scar import steered_forward, steered_generate
from .remote.sites_scar import hidden_size, owner_of, regular_expression, target_names
from .remote.steering_scar import set_steering
from .remote.strengths_scar import check_layers


class ScarModel(BaseTuner):
    """A model with SCAR adapters; made by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix = "scar_"
    tuner_layer_cls = ScarLayer
    target_module_mapping: dict[str, list[str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass.

        Takes `steering`, `rule`, `mode` and `positions` as `scar_peft.steering` does, for this pass only, and
        `return_concept_scores=True`, which adds `concept_scores` to the output. Under gradient checkpointing, which
        computes blocks again later, call `set_steering` before the pass instead.
        """
        return steered_forward(self.model, self.model, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`, with the same further arguments.

        Example:
            >>> model.generate(**batch, steering={"toxicity": torch.tensor([-1.0, 0.0, 2.0])})
        """
        return steered_generate(self.model, self.model.generate, args, kwargs)

    def set_steering(self, *args: Any, **kwargs: Any) -> None:
        """Steer from now on; see `scar_peft.set_steering`."""
        set_steering(self.model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers, as peft does; always by the configuration.

        Raises:
            ValueError: the adapter's name cannot be a parameter's name.
        """
        if not adapter_name or "." in adapter_name:
            raise ValueError(f'adapter_name must not be empty or hold ".", got {adapter_name!r}.')
        # peft's other way, by the names of saved weights, takes every target for a module that was replaced.
        kwargs.pop("state_dict", None)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: ScarConfig, model_config: dict[str, Any]) -> ScarConfig:
        peft_config.fill_sizes(hidden_size(self.model))
        targets = target_names(self.model, peft_config.layers, peft_config.site)  # type: ignore[arg-type]
        if len(targets) < len(peft_config.layers):  # type: ignore[arg-type]
            raise ValueError(f"layers must name different blocks, got {peft_config.layers}.")
        peft_config.layers = list(targets)
        peft_config.target_modules = regular_expression(targets.values())
        for layer in targets:  # refused now, before anything changes
            peft_config.concept_settings(layer)
        check_layers(peft_config.default_steering or {}, list(targets))
        return peft_config

    def _create_and_replace(
        self,
        peft_config: ScarConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(target, CHILD, None)
        if not isinstance(layer, ScarLayer):
            targets = target_names(self.model, peft_config.layers, peft_config.site)  # type: ignore[arg-type]
            index = next(index for index, name in targets.items() if name == current_key)
            layer = ScarLayer(target, owner_of(self.model, current_key), index, peft_config.site)
            layer.train(target.training)
            target.add_module(CHILD, layer)
        layer.add_adapter(adapter_name, peft_config, inference_mode=peft_config.inference_mode)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_ERROR)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError(MERGE_ERROR)
        for layer in [module for module in self.model.modules() if isinstance(module, ScarLayer)]:
            layer.remove()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model
