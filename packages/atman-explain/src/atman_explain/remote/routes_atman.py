"""Which way a model is run: packed suffixes where that is exact, full-length batches everywhere else."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapter_blip_atman import BlipPasses, at_patches, generate_blip, is_blip, locate_blip_patches
from .batches_atman import BatchPasses
from .configuration_atman import AtManConfig
from .decoder_atman import DecoderInput, DecoderPasses
from .errors_atman import UnsupportedModelError
from .final_layer_atman import RowsRefused
from .images_atman import locate_images
from .observing_atman import Observation, further_inputs, observe_decoder
from .passages_atman import Passage, Readout, RunSettings, Suppression, agree
from .prompts_atman import EncodedPrompt
from .seq2seq_atman import (
    Seq2SeqModules,
    Seq2SeqPasses,
    check_lengths,
    check_settings,
    generate_target,
    observe_modules,
)
from .switching_atman import evaluation_mode
from .vision_atman import VisionPasses, check_vision_settings, locate_patches

_TOKENS = {"cpu": 1024}  # positions in one pass: beyond this, activations leave a CPU's cache
_TOKENS_ON_GPU = 16384


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
        self._can_pack = True
        self._is_proven = False  # that packed runs are exact for this model
        self._trims = True  # whether its last layer can be run on some rows only
        self._has_own_code = not type(model).__module__.startswith("transformers.")  # may treat some prompts otherwise
        self._source_modules: Seq2SeqModules | None = None
        self._is_blip = is_blip(model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model reads the prompt in one place and writes the target in another."""
        return bool(self.model.config.is_encoder_decoder)

    def token_budget(self, config: AtManConfig) -> int:
        """Positions to compute in one pass."""
        return config.max_tokens_per_batch or _TOKENS.get(self.model.device.type, _TOKENS_ON_GPU)

    def with_site(self, config: AtManConfig) -> AtManConfig:
        """Settings that name the site of a model that has a single one, other than the decoder."""
        return at_patches(self.model, config) if self._is_blip else config

    def check_settings(self, config: AtManConfig) -> None:
        """Refuse settings that mean nothing for this model.

        Raises:
            ValueError: a site is one that the model does not have, or target tokens cannot be units.
            UnsupportedModelError: the model has no language modeling head.
        """
        if self.is_encoder_decoder:
            check_settings(self.model, config)
        elif not (self._is_blip or self.model.can_generate()):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not continue a text, so it has no target to explain; load the model "
                "with AutoModelForCausalLM or the like. For classifiers of images see explain_classifier."
            )
        elif missing := [site for site in config.sites or () if site in ("encoder", "cross")]:
            raise ValueError(
                f"sites must not have {missing[0]!r} for {type(self.model).__name__}, which is no encoder-decoder."
            )
        elif "vision" in (config.sites or ()):
            check_vision_settings(config)

    def check_passage(self, passage: Passage) -> None:
        """Refuse what does not fit into the model.

        Raises:
            ValueError: prompt and target are longer than the model's positions, or have ids that it does not know.
        """
        self._check_ids("target", passage.target_ids)
        if not passage.model_inputs:  # ids that stand for images may lie outside
            self._check_ids("prompt", passage.prompt_ids)
        if self.is_encoder_decoder:
            check_lengths(self.model, passage)
            return
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and passage.length > limit:
            raise ValueError(
                f"prompt and target need {passage.length} positions ({len(passage.prompt_ids)} of the prompt and "
                f"{len(passage.target_ids)} of the target, whose last is not read), but the model has {limit}; shorten "
                "one of them."
            )

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        embedding = self.model.get_input_embeddings()  # looked up out of range, it would bring down a GPU
        if isinstance(embedding, nn.Embedding):
            known = max(embedding.num_embeddings, self.model.config.get_text_config().vocab_size)  # T-FREE: few rows
            if max(ids) >= known:
                raise ValueError(f"{name} must have ids in [0, {known}), got {max(ids)}.")

    def locate_images(self, prompts: Sequence[EncodedPrompt], config: AtManConfig) -> list[EncodedPrompt]:
        """Say where the images are: in their prompts, or in the vision tower if attention is changed there."""
        locate = locate_patches if config.sites == ("vision",) else locate_images
        if self._is_blip:
            locate = locate_blip_patches
        return [locate(self.model, prompt) for prompt in prompts]

    def generate(self, prompt: EncodedPrompt, max_new_tokens: int) -> tuple[int, ...]:
        """Continue a prompt greedily; without the end-of-sequence token, unless it is all there is."""
        if self.is_encoder_decoder:
            return generate_target(self.model, prompt, max_new_tokens)
        if self._is_blip:
            return generate_blip(self.model, prompt, max_new_tokens)
        longest = (0,) * max_new_tokens
        self.check_passage(Passage(prompt_ids=prompt.input_ids, target_ids=longest, model_inputs=prompt.model_inputs))
        ids = torch.tensor([prompt.input_ids], device=self.model.device)
        extra = further_inputs(prompt.model_inputs, self.model)
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

        The first packed run of a model, and every one with images or by code that is not transformers' own, is held
        against its plain run. Where they differ,
        for example because a model lets image tokens see later ones, whole rows are run in batches: slower, and exact.
        A prompt of one token has no suffix, so that it proves nothing. Hybrids, some of whose layers are recurrent,
        and models with position bias (ALiBi) run whole rows from the start.
        """
        settings = RunSettings(
            mode=config.mode, heads=config.heads, readout=readout, tokens=tokens, most=config.batch_size
        )
        if self.is_encoder_decoder:
            if self._source_modules is None:
                self._source_modules = observe_modules(self.model, passages[0])
            return Seq2SeqPasses(self.model, passages, self._source_modules, config, settings)
        if config.sites == ("vision",):
            passes = BlipPasses if self._is_blip else VisionPasses
            return passes(self.model, passages, config, settings)
        is_known = bool(self._modules)
        packed = self._open_packed(passages, config, settings) if config.mode != "shift_min_all" else None
        if packed is not None:
            return packed
        whole = [self._observe(each, readout) for each in passages]
        if self._is_hybrid() and not is_known:
            warnings.warn(
                f"{type(self.model).__name__} has {self._num_layers()} layers but {len(self._modules)} attention "
                "modules: units are suppressed in these only, what recurrent layers carry on stays, and whole rows are "
                "run for every unit.",
                stacklevel=5,
            )
        return BatchPasses(self.model, passages, whole, chosen=self._chosen(config), settings=settings)

    def _open_packed(
        self, passages: Sequence[Passage], config: AtManConfig, settings: RunSettings
    ) -> DecoderPasses | None:
        """Passes over packed suffixes; None where these would not be exact."""
        if not self._can_pack:
            return None
        longest = max(range(len(passages)), key=lambda n: passages[n].first_row)
        observed = {
            n: self._observe(each, settings.readout)
            for n, each in enumerate(passages)
            if each.model_inputs or self._has_own_code or (n == longest and not self._is_proven)
        }
        if self._is_hybrid() or any(each.has_position_bias for each in observed.values()):
            self._can_pack = False
            return None
        if all(each.is_causal for each in observed.values()):
            inputs = [observed[n].input if n in observed else self._text_input(p) for n, p in enumerate(passages)]
            for trims in (True, False) if self._trims else (False,):
                packed = self._agreeing(passages, with_equal_axes(inputs), observed, config, settings, trims)
                if packed is not None:
                    self._is_proven |= passages[longest].first_row > 0
                    self._trims = trims
                    return packed
        self._can_pack = False
        warnings.warn(
            f"{type(self.model).__name__} gives other results when the rows after a position are run alone, so "
            "whole rows are run for every unit: exact, but about twice the work.",
            stacklevel=6,
        )
        return None

    def _agreeing(
        self,
        passages: Sequence[Passage],
        inputs: Sequence[DecoderInput],
        observed: Mapping[int, Observation],
        config: AtManConfig,
        settings: RunSettings,
        trims: bool,
    ) -> DecoderPasses | None:
        """Packed passes; None where they do not give what was observed."""
        chosen = self._chosen(config)
        try:
            packed = DecoderPasses(
                self.model, passages, inputs, self._modules, chosen=chosen, settings=settings, trims=trims
            )
            found = [(packed.baseline[n], each.readouts) for n, each in observed.items()]
            if observed:
                longest = max(observed, key=lambda n: passages[n].first_row)
                found.append((packed.probe(longest), observed[longest].readouts))
        except RowsRefused:
            return None
        device = self.model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
        return packed if all(agree(one, other, dtype) for one, other in found) else None

    def steered_modules(self, config: AtManConfig, prompt_ids: tuple[int, ...]) -> frozenset[int]:
        """`id` of modules that hold the attention to change while a model generates; a run finds single layers."""
        if self.is_encoder_decoder:
            passage = Passage(prompt_ids=prompt_ids, target_ids=prompt_ids[:1])
            with evaluation_mode(self.model):
                return frozenset(id(each) for each in observe_modules(self.model, passage).chosen(config))
        if self._is_blip:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be steered by its prompt: its text models compute attention on "
                "their own."
            )
        if config.layers is None:
            return frozenset(id(module) for module in self.model.get_decoder().modules())
        with evaluation_mode(self.model):
            self._observe(Passage(prompt_ids=prompt_ids, target_ids=prompt_ids[:1]), Readout())
        return frozenset(id(module) for module in self._chosen(config))

    def _num_layers(self) -> int:
        return getattr(self.model.config.get_text_config(), "num_hidden_layers", 0)

    def _is_hybrid(self) -> bool:
        """Whether some layers have no attention, so that rows depend on those before them in other ways, too."""
        return len(self._modules) < self._num_layers()

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


def with_equal_axes(inputs: Sequence[DecoderInput]) -> list[DecoderInput]:
    """Give the positions of texts as many axes as those of passages with images have."""
    shapes = {each.position_ids.shape[:-1]: each.position_ids.ndim for each in inputs}
    widest = max(shapes, key=lambda shape: shapes[shape])
    return [replace(each, position_ids=each.position_ids.expand(*widest, -1)) for each in inputs]
