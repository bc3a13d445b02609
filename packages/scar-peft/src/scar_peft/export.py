"""A model with an adapter -> a repository that detects and steers by itself, through `trust_remote_code`."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .card import TAGS
from .coder import fold_concepts
from .config import ScarConfig
from .layer import ScarLayer, scar_layers
from .remote.modeling_scar import ROWS, steered_class
from .remote.section_scar import ScarSection
from .remote.settings_scar import ELEMENTWISE

_CARD = """
# {title}

`{base}` with a SCAR adapter built in: it detects {concepts} in every token that it reads, and steers what it writes
towards or away from it. Only transformers is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
inputs = tokenizer("Once upon a time", return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=20, steering={{{concept}: -1.0}})
print(tokenizer.decode(written[0], skip_special_tokens=True))
```

Scores come from the same pass:

```python
with model.record_scores() as record:
    model(**inputs)
print(record.scores, record.pooled("mean"))  # every token's score, and one per text
```

`model.set_steering({concept}, -1.0)` holds until the next call, `with model.steering(...)` inside a block. Without
`trust_remote_code` the repository is the base model, unsteered. Pin `revision` to a commit that you have read.

- **Where**: site `{site}`, blocks {layers}; rule `{rule}`, gate `{gate}`.
- **Labels**: {labels}.
- **Licence**: {license} for the concepts; the weights of the base model come with its own licence.
"""


def export_remote_code(
    model: nn.Module,
    repo_dir: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
    repo_id: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folder that detects and steers where neither this package nor peft is installed.

    It holds the whole language model, the rows of the adapter's concepts and the code that uses them. What
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` makes of it has `set_steering`, `steering`,
    `record_scores` and `generate(steering=...)`. Upload the folder as it is.

    Args:
        model: a PEFT model, or any transformers causal language model that holds the adapter.
        repo_dir: folder to write; made if it does not exist.
        adapter_name: which adapter.
        tokenizer: saved along, so that the folder is complete.
        repo_id: where it will be uploaded, for the card's code. None: the folder itself.
        max_shard_size: of one safetensors file.

    Raises:
        ValueError: the adapter needs all latents, the base model is quantized, brings code of its own or has further
            adapters, or is no causal language model of transformers.

    Example:
        >>> export_remote_code(model, "out", tokenizer=tokenizer, repo_id="user/llama-detox")
        >>> HfApi().upload_folder(repo_id="user/llama-detox", folder_path="out")
    """
    base = _language_model(model)
    layers = scar_layers(model, adapter_name)
    config = layers[0].config(adapter_name)
    section = _section(config, [layer.layer_index for layer in layers])
    _check_base(base)
    steered = _steered_model(base, section, _tensors(base, layers, adapter_name))
    steered.save_pretrained(repo_dir, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(repo_dir)
    _write_card(config, section, Path(repo_dir), repo_id, has_tokenizer=tokenizer is not None)


def _language_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _section(config: ScarConfig, layers: list[int]) -> ScarSection:
    if config.mode != "residual" or config.resolved_gate == "topk":
        raise ValueError(
            f'mode must be "residual" and gate must not be "topk", because only the concepts\' rows are exported, got '
            f'mode="{config.mode}" and gate="{config.resolved_gate}".'
        )
    taus = {str(layer): config.threshold_at(layer) for layer in layers} if config.resolved_gate == "threshold" else None
    return ScarSection(
        layers=layers,
        site=config.site,
        concepts=list(config.concepts),
        activation=ELEMENTWISE[config.activation],
        gate=config.resolved_gate,
        gate_threshold=taus,  # type: ignore[arg-type]
        normalize=config.normalize,
        norm_eps=float(config.norm_eps),
        rule=config.steering_rule,
        positions=config.steering_positions,
        skip_first_token=config.skip_first_token,
        default_steering=json.loads(json.dumps(config.default_steering)),
        calibration=config.calibration or None,
    )


def _check_base(base: Any) -> None:
    name, module = type(base).__name__, type(base).__module__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not module.startswith("transformers."):
        raise ValueError(
            f"model must be a causal language model of transformers itself, got {name} of {module}. Publish the "
            "adapter with push_to_hub instead."
        )
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError("model must not be quantized; load the base model in its own dtype, and the adapter onto it.")


def _tensors(base: nn.Module, layers: list[ScarLayer], adapter_name: str) -> dict[str, Tensor]:
    """The plain model's tensors, and the concepts' rows under the names that the exported model has for them."""
    names = {module: name for name, module in base.named_modules()}
    adapters = tuple(f"{name}." for module, name in names.items() if isinstance(module, ScarLayer))
    tensors = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith(adapters)}
    for layer in layers:
        count = len(layer.config(adapter_name).concepts)
        with torch.no_grad():
            rows = fold_concepts(layer.weights(adapter_name), count)
        place = names[layer.get_base_layer()]
        tensors |= {f"{place}.{ROWS}.{name}": row.float().contiguous() for name, row in rows._asdict().items()}
    return tensors


def _steered_model(base: Any, section: ScarSection, tensors: dict[str, Tensor]) -> PreTrainedModel:
    config = copy.deepcopy(base.config)
    config.scar = section.to_dict()
    with torch.device("meta"):  # the tensors themselves are put in place, so nothing is copied
        steered: Any = steered_class(type(base).__name__)(config)
    try:
        steered.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"model must have no further adapters; merge or unload them first: {error}") from error
    steered.tie_weights()
    steered.generation_config = base.generation_config
    return steered


def _write_card(
    config: ScarConfig, section: ScarSection, folder: Path, repo_id: str | None, has_tokenizer: bool
) -> None:
    place = json.dumps(repo_id or ".")
    base = config.base_model_name_or_path or None
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        license=config.license,
        pipeline_tag="text-generation",
        tags=["custom_code", *TAGS],
    )
    text = _CARD.format(
        title=repo_id.rpartition("/")[2] if repo_id else f"Steered by {', '.join(section.concepts)}",
        concepts=", ".join(section.concepts),
        concept=json.dumps(section.concepts[0]),
        base=base or "a language model",
        place=place,
        tokenizer=place if has_tokenizer or not base else json.dumps(base),
        site=section.site,
        layers=", ".join(map(str, section.layers)),
        rule=section.rule,
        gate=section.gate,
        labels=config.label_source or "not stated",
        license=config.license or "not stated",
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")
