"""Passes of encoder-decoder models: source tokens lose attention in the encoder, and where the decoder reads them."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .batches_atman import tiled
from .configuration_atman import AtManConfig
from .errors_atman import UnsupportedModelError
from .hook_atman import active, in_this_thread
from .observing_atman import Observer
from .passages_atman import Passage, RunSettings, Suppression, forward_rows, pack
from .prompts_atman import EncodedPrompt
from .suppressing_atman import SuppressedColumns

SITES = ("encoder", "cross")


@dataclass(frozen=True)
class Seq2SeqModules:
    """The attention modules that have a key for every source token, in the order of their first calls."""

    encoder: tuple[nn.Module, ...]
    cross: tuple[nn.Module, ...]

    def chosen(self, config: AtManConfig) -> list[nn.Module]:
        """Those that are manipulated.

        Raises:
            ValueError: a layer does not exist in one of the sites.
        """
        chosen: list[nn.Module] = []
        for site in config.sites or SITES:
            modules = self.encoder if site == "encoder" else self.cross
            for layer in range(len(modules)) if config.layers is None else config.layers:
                if not -len(modules) <= layer < len(modules):
                    raise ValueError(f"layers must lie in [0, {len(modules)}) of site {site!r}, got {layer}.")
                chosen.append(modules[layer])
        return chosen


def check_settings(model: PreTrainedModel, config: AtManConfig) -> None:
    """Refuse what encoder-decoders do not have.

    Raises:
        ValueError: a site is no site of source tokens, or target tokens are to be units.
        UnsupportedModelError: the model reads no tokens, or writes none.
    """
    if model.main_input_name != "input_ids" or not model.can_generate():
        raise UnsupportedModelError(
            f"model must turn tokens into tokens, but {type(model).__name__} reads {model.main_input_name!r} and "
            f"{'generates' if model.can_generate() else 'does not generate'} text."
        )
    for site in config.sites or ():
        if site not in SITES:
            raise ValueError(
                f"sites must be among {SITES} for an encoder-decoder model, got {site!r}: its units are tokens of the "
                "source, which other attention does not see."
            )
    if config.attribute_target:
        raise ValueError(
            "attribute_target must be False for an encoder-decoder model, got True: target tokens stand in the "
            "decoder, where no source token is, and suppression acts on the source."
        )


def check_lengths(model: PreTrainedModel, passage: Passage) -> None:
    """Refuse what does not fit into encoder or decoder.

    Raises:
        ValueError: there are more tokens than positions.
    """
    read = len(_start(model, passage.target_ids)) + len(passage.target_ids) - 1
    for name, length, part in (
        ("prompt", len(passage.prompt_ids), model.get_encoder()),
        ("target", read, model.get_decoder()),
    ):
        limit = getattr(part.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"{name} needs {length} positions, but the model has {limit} for it; shorten it.")


def generate_target(model: PreTrainedModel, prompt: EncodedPrompt, max_new_tokens: int) -> tuple[int, ...]:
    """Answer a prompt greedily; without start tokens, and without the end token, unless it is all there is."""
    inputs = _source(model, prompt.input_ids, prompt.model_inputs)
    forced = len(_start(model, ())) - 1
    # one token more than asked for: some models force the last one to be the end
    with active(Observer()):  # so that masks are made even where a module does not say that it is causal
        out = model.generate(**inputs, max_new_tokens=forced + max_new_tokens + 1, do_sample=False, num_beams=1)
    new = out[0, 1 + forced :].tolist()[:max_new_tokens]
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return tuple(new[:-1] if len(new) > 1 and new[-1] in ends else new)


def observe_modules(model: PreTrainedModel, passage: Passage) -> Seq2SeqModules:
    """Find the attention modules of a model by the lengths of their queries and keys.

    Raises:
        UnsupportedModelError: encoder or cross-attention did not come by.
    """
    P = len(passage.prompt_ids)
    written = 1 if P > 1 else 2  # differs from P, so that no two kinds of attention look alike
    ids = torch.full((1, written), _start(model, ())[0], device=model.device)
    observer = Observer()
    with active(observer):
        inputs = _source(model, passage.prompt_ids, passage.model_inputs)
        model(**inputs, decoder_input_ids=ids, use_cache=False)
    kinds = {"encoder": (P, P), "cross": (written, P)}
    found = {
        site: tuple(m for m, shape in zip(observer.called, observer.lengths, strict=True) if shape == lengths)
        for site, lengths in kinds.items()
    }
    for site, modules in found.items():
        if not modules:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no attention with one key per source token in its {site} site, so nothing "
                "can be suppressed there; write an adapter and pass it to atman_explain.register_adapter."
            )
    return Seq2SeqModules(**found)


@dataclass(frozen=True)
class _Plain:
    """A passage, and what its plain run showed."""

    passage: Passage
    inputs: dict[str, Any]
    """Of one row."""
    decoder_ids: Tensor
    """[1, L]"""
    readouts: Tensor
    """[M]"""
    embeds: Tensor
    """[P, D]"""
    encoded: Tensor
    """[1, P, D], the encoder's output."""


class Seq2SeqPasses:
    """A few passages of one encoder-decoder model; columns are the P source tokens, rows predict the target.

    Args:
        model: in eval mode, switched to AtMan's attention.
        passages: what to run.
        modules: the attention modules of the model.
        config: which of them are manipulated.
        settings: how to run them.
    """

    is_causal = False

    def __init__(
        self,
        model: PreTrainedModel,
        passages: Sequence[Passage],
        modules: Seq2SeqModules,
        config: AtManConfig,
        settings: RunSettings,
    ) -> None:
        self._model = model
        self._settings = settings
        self._chosen: Collection[int] = {id(module) for module in modules.chosen(config)}
        self._keeps_encoder = not any(id(module) in self._chosen for module in modules.encoder)
        self._plain = [self._run_plainly(passage) for passage in passages]
        self.baseline = [each.readouts for each in self._plain]

    def embeds(self, passage: int) -> Tensor:
        """Input embeddings [P, D] of the source tokens."""
        return self._plain[passage].embeds

    def run(self, items: Sequence[Suppression]) -> Iterator[tuple[int, Tensor]]:
        """Yield the index of every item and its read-outs [M], passage by passage."""
        for number, plain in enumerate(self._plain):
            mine = [index for index, item in enumerate(items) if item.passage == number]
            length = plain.decoder_ids.shape[1] + (0 if self._keeps_encoder else len(plain.passage.prompt_ids))
            most = self._settings.most_items([plain.passage], self._model.config.get_text_config().vocab_size)
            for group in pack([length] * len(mine), tokens=self._settings.tokens, most=most):
                chosen = [mine[each] for each in group]
                factors = torch.stack([items[index].factors() for index in chosen])
                yield from zip(chosen, self._run(plain, factors), strict=True)

    def _run_plainly(self, passage: Passage) -> _Plain:
        inputs = _source(self._model, passage.prompt_ids, passage.model_inputs)
        ids = (*_start(self._model, passage.target_ids), *passage.target_ids[:-1])
        decoder_ids = torch.tensor([ids], device=self._model.device)
        seen: dict[str, Tensor] = {}

        def look(encoder: Any, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            embeds = kwargs.get("inputs_embeds")
            seen["embeds"] = encoder.get_input_embeddings()(inputs["input_ids"]) if embeds is None else embeds
            seen["encoded"] = output[0]

        handle = self._model.get_encoder().register_forward_hook(in_this_thread(look), with_kwargs=True)
        try:
            with active(Observer()):  # with the same masks as in suppressed runs
                readouts = self._read(passage, inputs, decoder_ids)
        finally:
            handle.remove()
        return _Plain(passage, inputs, decoder_ids, readouts[0], seen["embeds"][0], seen["encoded"])

    def _run(self, plain: _Plain, factors: Tensor) -> Tensor:
        """Read-outs [n, M] under factors [n, P]."""
        n = len(factors)
        inputs = plain.inputs
        if self._keeps_encoder:
            encoded = BaseModelOutput(last_hidden_state=plain.encoded.expand(n, -1, -1))
            inputs = {"attention_mask": inputs["attention_mask"].expand(n, -1), "encoder_outputs": encoded}
        else:
            inputs = tiled(inputs, n)
        wide = torch.float64 if self._model.dtype == torch.float64 else torch.float32
        with active(SuppressedColumns(self._chosen, factors.to(wide), self._settings.mode, self._settings.heads)):
            return self._read(plain.passage, inputs, plain.decoder_ids.expand(n, -1))

    def _read(self, passage: Passage, inputs: dict[str, Any], decoder_ids: Tensor) -> Tensor:
        """Read-outs [n, M] of n equal rows."""
        first = decoder_ids.shape[1] - len(passage.target_ids)
        rows = torch.arange(first, decoder_ids.shape[1], device=decoder_ids.device)
        logits = forward_rows(self._model, rows, **inputs, decoder_input_ids=decoder_ids, use_cache=False)
        targets = torch.tensor(passage.target_ids, device=logits.device)
        return self._settings.readout(logits, targets.expand(len(decoder_ids), -1))


def _source(model: PreTrainedModel, ids: Sequence[int], model_inputs: Any) -> dict[str, Any]:
    """The encoder's inputs of one row, on the model's device."""
    if "decoder_input_ids" in model_inputs:
        raise ValueError("prompt must not hold 'decoder_input_ids'; pass the target as target=.")
    row = torch.tensor([ids], device=model.device)
    extra = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in model_inputs.items()
    }
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **extra}


def _start(model: PreTrainedModel, target_ids: Sequence[int]) -> tuple[int, ...]:
    """What the decoder reads before the target: its start token, and the first token that `generate` forces.

    The forced token, as BART's `<s>` or a language's, is left out if the target begins with it.
    """
    settings = model.generation_config
    choices = (getattr(model.config, "decoder_start_token_id", None), settings.decoder_start_token_id)
    start = next((each for each in (*choices, settings.bos_token_id) if isinstance(each, int)), None)
    if start is None:
        raise ValueError(
            f"{type(model).__name__} does not say what its decoder starts with; set "
            "model.generation_config.decoder_start_token_id."
        )
    forced = settings.forced_bos_token_id
    return (start,) if forced is None or tuple(target_ids[:1]) == (forced,) else (start, forced)
