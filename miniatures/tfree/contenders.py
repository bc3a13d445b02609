"""The models that are compared: T-FREE with either objective, and a byte-level BPE softmax, on the same Llama body."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from miniatures.tfree.evaluate import ScoredText, dictionary_word_spans, escape_share, escaped_bits
from miniatures.tfree.spelling import SpellingModel
from miniatures.tfree.windows import Window

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Body:
    """Sizes of the transformer that all contenders share."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 688
    max_position_embeddings: int = 1024


@dataclass(frozen=True, kw_only=True)
class Hashing:
    """T-FREE's embedding and head, and how its dictionary softmax is trained."""

    hash_vocab_size: int = 2048
    num_hashes: int = 8
    num_lowercase: int = 2
    sampled_words: int = 0
    loss_pos_weight: float = 30.0


class Contender(ABC):
    """A tokenizer and a causal language model that can be trained on windows and scored on text."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def encode(self, window: Window) -> list[int]:
        """Ids of a window, with end-of-text ids where documents end and where the window leads with one."""
        end = self.tokenizer.eos_token_id
        ids = [end] if window.leads else []
        for segment in window.segments:
            ids += self.tokenizer.encode(segment.text, add_special_tokens=False)
            ids += [end] if segment.ends_document else []
        return ids

    def batch(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        """Right-padded `input_ids`, `attention_mask` and `labels` `[B, L]`, int64."""
        rows = [self.encode(window) for window in windows]
        length = max(map(len, rows))
        input_ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(length) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, IGNORED)}

    def vocabulary_parameters(self) -> int:
        """Parameters of embedding and head together."""
        return self.model.get_input_embeddings().weight.numel() + self.model.lm_head.weight.numel()

    @abstractmethod
    def score(self, windows: Sequence[Window]) -> list[ScoredText]:
        """Code lengths and first choices for every unit of windows led by an end-of-text token."""

    def prepare_scoring(self, windows: Sequence[Window]) -> dict[str, Any]:
        """Fit what scoring needs on training text; returns what to report of it."""
        return {}


class BpeContender(Contender):
    """Byte-level BPE and a softmax over its vocabulary, with separate embedding and head."""

    name = "bpe"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, body: Body) -> None:
        self.tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                tie_word_embeddings=False,
                rms_norm_eps=1e-5,
                bos_token_id=None,
                eos_token_id=end,
                pad_token_id=end,
                **asdict(body),
            )
        )

    def score(self, windows: Sequence[Window]) -> list[ScoredText]:
        """See `Contender.score`. Units are sub-word pieces; their offsets include the space before a word."""
        batch = self.batch(windows)
        device = self.model.device
        with torch.no_grad():
            logits = self.model(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
            ).logits.float()
        scored = []
        for row, window in enumerate(windows):
            coded = self.tokenizer(window.text, add_special_tokens=False, return_offsets_mapping=True)
            targets = torch.tensor(coded["input_ids"])
            bits, right = _bits_and_hits(logits[row, : len(targets)].cpu(), targets)
            scored.append(ScoredText(window.text, [tuple(span) for span in coded["offset_mapping"]], bits, right))
        return scored


class TFreeContender(Contender):
    """T-FREE words, hashed embedding and head."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        body: Body,
        hashing: Hashing,
        objective: str,
        spelling: SpellingModel | None = None,
    ) -> None:
        from tfree_tokenizer import TFreeConfig, TFreeForCausalLM

        self.name = f"tfree-{objective}"
        self.tokenizer = tokenizer
        self.spelling = spelling if spelling is not None else SpellingModel(tokenizer.dictionary_words)
        self.escape_probability = 0.01
        config = TFreeConfig.for_tokenizer(tokenizer, objective=objective, **asdict(body), **asdict(hashing))
        self.model = TFreeForCausalLM(config)
        self.model.set_dictionary(tokenizer)

    def prepare_scoring(self, windows: Sequence[Window]) -> dict[str, Any]:
        """Estimate the escape probability and, for "bce", fit the decode temperature, both on training text."""
        ids = [number for window in windows for number in self.encode(window)]
        words = (word for word, _ in self._units(ids))
        dictionary = frozenset(word for word in self.tokenizer.words_by_id() if word is not None)
        self.escape_probability = escape_share(words, dictionary)
        report: dict[str, Any] = {"escape_probability": self.escape_probability}
        if self.model.config.objective == "bce":
            groups = [windows[i : i + 4] for i in range(0, min(16, len(windows)), 4)]
            self.model.calibrate_decode(map(self.batch, groups), max_positions=1024)
            report["decode_temperature"] = self.model.config.decode_temperature
        return report

    def score(self, windows: Sequence[Window]) -> list[ScoredText]:
        """See `Contender.score`. Units are words; those outside the dictionary pay an escape and their spelling."""
        batch = self.batch(windows)
        device = self.model.device
        with torch.no_grad():
            hidden = self.model.model(
                batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device), use_cache=False
            ).last_hidden_state
            return [self._score_row(window, hidden[row]) for row, window in enumerate(windows)]

    def _score_row(self, window: Window, hidden: Tensor) -> ScoredText:
        ids = self.tokenizer.encode(window.text, add_special_tokens=False)
        units = self._units(ids)
        # position p of the led row predicts the unit whose first id stands at p in the unled ids
        starts = torch.tensor([position for _, position in units])
        targets = torch.tensor(ids)[starts]
        first, words = self.tokenizer.first_byte_id, self.tokenizer.first_word_id
        outside = ((targets >= first) & (targets < words)).tolist()
        logits = self._word_logits(hidden[starts.to(hidden.device)]).cpu()
        logits[:, first:words] = -torch.inf  # spelled words are coded by escape and spelling, not by copying
        bits, right = _bits_and_hits(logits, targets.masked_fill(torch.tensor(outside), 0))
        structural = structural_widths(self.tokenizer.ruleset)
        widths = [None if out else structural.get(word) for (word, _), out in zip(units, outside, strict=True)]
        spans = dictionary_word_spans(window.text, [word for word, _ in units], widths)
        for number, out in enumerate(outside):
            cost = self.spelling.bits(units[number][0]) if out else bits[number]
            bits[number] = escaped_bits(cost, in_dictionary=not out, escape_probability=self.escape_probability)
            right[number] = right[number] and not out
        return ScoredText(window.text, spans, bits, right)

    def _word_logits(self, hidden: Tensor) -> Tensor:
        """Logits of all ids, float32 [N, ids], from hidden states [N, D]."""
        if self.model.config.objective == "dictionary_ce":  # linear in the hidden state: one matrix product
            return torch.nn.functional.linear(hidden, self.model.get_output_embeddings().weight).float()
        return self.model.word_logits(self.model.lm_head(hidden)[None])[0]

    def _units(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        """Words of an id sequence and where each begins."""
        names = self._names()
        first_byte = self.tokenizer.first_byte_id
        units, spelled, begin = [], bytearray(), 0
        for position, number in enumerate(ids):
            if not first_byte <= number < first_byte + 512:
                units.append((names[number], position))
                continue
            begin = position if not spelled else begin
            spelled.append((number - first_byte) % 256)
            if number >= first_byte + 256:
                units.append((spelled.decode("utf-8", "surrogatepass"), begin))
                spelled = bytearray()
        return units

    def _names(self) -> list[str]:
        if not hasattr(self, "_names_cache"):
            self._names_cache = [name or "" for name in self.tokenizer.words_by_id()]
        return self._names_cache


def structural_widths(ruleset: str) -> dict[str, int]:
    """Characters that each structural word stands for."""
    widths = {"<|no_ws|>": 0, "<|ws|>": 1, "<|\n|>": 1}
    for count in (2, 4) if ruleset == "v1" else (2, 4, 8, 16):
        widths[f"<|{count}<-ws->|>"] = count
    for count in (2, 4):
        widths[f"<|{count}<-\n->|>"] = count
    return widths


def train_bpe(texts: Iterable[str], *, vocab_size: int, path: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, or load the one that an earlier call left in `path`."""
    if not (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
        partial = path.with_name(path.name + ".partial")
        fast.save_pretrained(partial)
        os.replace(partial, path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def train_words(texts: Sequence[str], *, max_words: int, path: Path) -> PreTrainedTokenizerBase:
    """Count the words of a text into a T-FREE dictionary, or load the one that an earlier call left in `path`."""
    from tfree_tokenizer import TFreeTokenizer

    if not path.is_file():
        from tfree_tokenizer import build_dictionary

        words = build_dictionary(texts, max_words=max_words, ruleset="v2")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(list(words)), encoding="utf-8")
        os.replace(partial, path)
    return TFreeTokenizer(words=json.loads(path.read_text(encoding="utf-8")), ruleset="v2")


def _bits_and_hits(logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Code length in bits and first-choice hit of every row; logits `[N, V]`, targets `[N]`."""
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (nats / torch.log(torch.tensor(2.0))).tolist(), (logits.argmax(-1) == targets).tolist()
