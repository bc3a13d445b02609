"""Which way a model is run: packed suffixes where that is exact, full-length batches everywhere else."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters_atman import find_adapter
from .batches_atman import BatchPasses
from .configuration_atman import AtManConfig
from .decoder_atman import DecoderInput, DecoderPasses
from .images_atman import locate_images
from .observing_atman import Observation, observe_decoder
from .passages_atman import Passage, Readout, RunSettings, Suppression
from .prompts_atman import EncodedPrompt

_TOKENS = {"cpu": 1024}  # positions in one pass: beyond this, activations leave a CPU's cache
_TOKENS_ON_GPU = 16384
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of read-outs, between two ways of computing the same
_TOLERANCE_OF_HALF = 0.25


class Passes(Protocol):
    """Passages of one model, ready to be run with suppressed columns."""

    @property
    def baseline(self) -> Sequence[Tensor]:
        """Read-outs [M] of every passage, nothing suppressed."""
        ...

    @property
    def is_causal(self) -> bool:
        """Whether rows before a suppressed column cannot change."""
        ...

    def embeds(self, passage: int) -> Tensor:
        """Input embeddings [T, D] of a passage's columns."""
        ...

    def run(self, items: Sequence[Suppression]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every item and its read-outs [M], in an order of its own choice."""
        ...


class Router:
    """Knows how a model can be run, and remembers what it found out about it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._modules: tuple[nn.Module, ...] = ()  # not known before the first passage
        self._can_pack = find_adapter(model) is None
        self._is_proven = False  # that packed runs are exact for this model

    def token_budget(self, config: AtManConfig) -> int:
        """Positions to compute in one pass."""
        return config.max_tokens_per_batch or _TOKENS.get(self.model.device.type, _TOKENS_ON_GPU)

    def check_length(self, passage: Passage) -> None:
        """Refuse what does not fit into the model.

        Raises:
            ValueError: prompt and target are longer than the model's positions.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and passage.length > limit:
            raise ValueError(
                f"prompt and target need {passage.length} positions ({len(passage.prompt_ids)} of the prompt and "
                f"{len(passage.target_ids)} of the target, whose last is not read), but the model has {limit}; shorten "
                "one of them."
            )

    def locate_images(self, prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """Say where in their prompts the images are."""
        return [locate_images(self.model, prompt) for prompt in prompts]

    def generate(self, prompt: EncodedPrompt, max_new_tokens: int) -> tuple[int, ...]:
        """Continue a prompt greedily; without the end-of-sequence token, unless it is all there is."""
        ids = torch.tensor([prompt.input_ids], device=self.model.device)
        extra = {name: tensor.to(self.model.device) for name, tensor in prompt.model_inputs.items()}
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            **extra,
        )
        new = out[0, ids.shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return tuple(new[:-1] if len(new) > 1 and new[-1] in ends else new)

    def open(self, passages: Sequence[Passage], config: AtManConfig, readout: Readout, tokens: int) -> Passes:
        """Run passages plainly, and keep what suppressed runs need.

        The first packed run of a model, and every one with images, is held against its plain run. Where they differ,
        for example because a model lets image tokens see later ones, whole rows are run in batches: slower, and exact.
        A prompt of one token has no suffix, so that it proves nothing.
        """
        settings = RunSettings(
            mode=config.mode, heads=config.heads, readout=readout, tokens=tokens, most=config.batch_size
        )
        if config.mode != "shift_min_all" and self._can_pack:
            longest = max(range(len(passages)), key=lambda n: passages[n].first_row)
            observed = {
                n: self._observe(each, readout)
                for n, each in enumerate(passages)
                if each.model_inputs or (n == longest and not self._is_proven)
            }
            inputs = [observed[n].input if n in observed else self._text_input(p) for n, p in enumerate(passages)]
            packed = DecoderPasses(
                self.model, passages, inputs, self._modules, chosen=self._chosen(config), settings=settings
            )
            if all(agree(packed.baseline[n], each.readouts) for n, each in observed.items()) and (
                longest not in observed or agree(packed.probe(longest), observed[longest].readouts)
            ):
                self._is_proven |= passages[longest].first_row > 0
                return packed
            self._can_pack = False
            warnings.warn(
                f"{type(self.model).__name__} gives other results when the rows after a position are run alone, so "
                "whole rows are run for every unit: exact, but about twice the work.",
                stacklevel=5,
            )
        whole = [self._observe(each, readout) for each in passages]
        return BatchPasses(self.model, passages, whole, chosen=self._chosen(config), settings=settings)

    def _observe(self, passage: Passage, readout: Readout) -> Observation:
        seen = observe_decoder(self.model, passage, readout)
        self._modules = seen.modules
        return seen

    def _text_input(self, passage: Passage) -> DecoderInput:
        ids = torch.tensor(passage.ids, device=self.model.device)
        positions = torch.arange(len(ids), device=ids.device)[None]
        return DecoderInput(self.model.get_input_embeddings()(ids[None])[0], positions)

    def _chosen(self, config: AtManConfig) -> list[nn.Module]:
        """The attention modules that are manipulated."""
        if config.layers is None:
            return list(self._modules)
        for layer in config.layers:
            if not -len(self._modules) <= layer < len(self._modules):
                raise ValueError(f"layers must lie in [0, {len(self._modules)}), got {layer}.")
        return [self._modules[layer] for layer in config.layers]


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two ways of computing the same read-outs give the same, up to rounding."""
    tolerance = _TOLERANCE.get(other.dtype, _TOLERANCE_OF_HALF)
    return bool(((one - other).abs() <= tolerance * other.abs().clamp(min=1.0)).all())
