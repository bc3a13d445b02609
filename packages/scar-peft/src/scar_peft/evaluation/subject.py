"""What is evaluated: an adapter in a model, the model's tokenizer and a labelled dataset."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import ScarConfig
from ..contexts import adapters_off, evaluation_mode
from ..layer import ScarLayer, scar_layers
from ..training.activations import ActivationRows, activation_windows
from ..training.labels import LabelLevel, LabelReader, rows_of


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a dataset is read."""

    text_column: str = "text"
    """Column of the text."""
    label_columns: Sequence[str] | str | None = None
    """One column per concept, or one for all. None: columns named like the concepts."""
    label_level: LabelLevel = "sequence"
    """What a label is about: "sequence", "token" or "span"."""
    label_threshold: float = 0.5
    """From where a float label counts as positive."""
    batch_size: int = 16
    """Texts per forward pass."""
    max_length: int = 512
    """Longer texts are cut to so many tokens."""
    progress_bar: bool = True
    """Show progress."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Subject:
    """An adapter in a model, with everything that is needed to run it on texts."""

    model: nn.Module
    tokenizer: Any
    adapter: str
    layers: dict[int, ScarLayer]
    """By the block's index."""
    config: ScarConfig

    @classmethod
    def of(cls, model: nn.Module, processing_class: Any, adapter_name: str | None) -> "Subject":
        """Find the adapter and the tokenizer.

        Raises:
            ValueError: there is no adapter, several are active and none is named, or there is no tokenizer.
        """
        adapter = adapter_name or _active_adapter(model)
        layers = {layer.layer_index: layer for layer in scar_layers(model, adapter)}
        config = next(iter(layers.values())).config(adapter)
        return cls(model, processing_class or _tokenizer_of(model), adapter, layers, config)

    @property
    def targets(self) -> dict[int, nn.Module]:
        """Layer -> the module whose output is coded."""
        return {index: layer.get_base_layer() for index, layer in self.layers.items()}

    def device(self, layer: int) -> torch.device:
        """Where a layer's coder is."""
        return self.layers[layer].place(self.adapter)[0]

    @torch.no_grad()
    def scores(self, layer: int, acts: Tensor, kind: str) -> Tensor:
        """Concept scores of rows [N, d] as `record_scores` gives them, [N, C] float32 on the CPU."""
        return self.layers[layer].scores(self.adapter, acts.to(self.device(layer)), kind).float().cpu()

    def reader(self, reading: Reading) -> LabelReader:
        """What reads texts and labels from the rows of a dataset."""
        concepts, columns = tuple(self.config.concepts), reading.label_columns
        return LabelReader(
            concepts=concepts,
            columns=(columns,) if isinstance(columns, str) else tuple(columns or concepts),
            text_column=reading.text_column,
            level=reading.label_level,
            threshold=reading.label_threshold,
        )

    def windows(self, dataset: Any, reading: Reading) -> Iterator[ActivationRows]:
        """Activations and labels of the dataset's tokens, some texts at a time; the first token of a text is pos 0.

        Raises:
            ValueError: the dataset lacks a column, or holds something that is no label.
        """
        reader = self.reader(reading)
        rows: Any = rows_of(dataset)
        total = len(rows) if hasattr(rows, "__len__") else None
        with tqdm(total=total, desc="activations", unit="text", disable=not reading.progress_bar) as bar:
            for done, found in activation_windows(
                self.model,
                self.tokenizer,
                rows,
                reader,
                self.targets,
                batch_size=reading.batch_size,
                max_length=reading.max_length,
                drop_sink_tokens=False,
            ):
                bar.update(done - bar.n)
                yield found


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs without its SCAR adapters, in evaluation mode and without gradients."""
    with evaluation_mode(model), adapters_off(model), torch.no_grad():
        yield


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids as a batch, padded at the end, where causal attention never looks."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _active_adapter(model: nn.Module) -> str:
    names: Any = scar_layers(model)[0].active_adapters
    if len(names) != 1:
        raise ValueError(f"adapter_name must be given, because several are active: {names}.")
    return str(names[0])


def _tokenizer_of(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "name_or_path", "")
    if not name:
        raise ValueError("processing_class must be given: the model does not say where it came from.")
    return AutoTokenizer.from_pretrained(name)
