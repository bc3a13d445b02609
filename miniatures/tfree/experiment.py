"""What training and comparison share: the corpus as windows, contenders by name, and scoring by language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from miniatures.data.packages import cache_folder
from miniatures.data.text import TextDocument, TextSplit, load_split
from miniatures.tfree.contenders import Body, BpeContender, Contender, Hashing, TFreeContender, train_bpe, train_words
from miniatures.tfree.evaluate import bits_per_byte, word_accuracy
from miniatures.tfree.windows import Window, held_out_windows, training_windows

NAMES = ("tfree-dictionary_ce", "tfree-bce", "bpe")
PROMPTS = ("To open the dialog,", "Wählen Sie", "Cliquez sur", "Haga clic en", "Fare clic su")
DATA_SEED = 0
"""Seed of the split and of the windows; runs with different seeds see the same windows in another order."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """Training windows and held-out windows by group ("de", "en scripture", ...)."""

    train_texts: list[str]
    train: list[Window]
    held_out: dict[str, list[Window]]


def load_material(*, window_bytes: int, held_out_bytes: int, split: TextSplit | None = None) -> Material:
    """Read the corpus and cut it into windows."""
    split = load_split(seed=DATA_SEED) if split is None else split
    groups: dict[str, list[TextDocument]] = {}
    for document in split.held_out:
        group = document.language + (" scripture" if document.register == "scripture" else "")
        groups.setdefault(group, []).append(document)
    return Material(
        train_texts=[document.text for document in split.train],
        train=training_windows(split.train, window_bytes=window_bytes, seed=DATA_SEED),
        held_out={
            group: held_out_windows(groups[group], window_bytes=window_bytes, total_bytes=held_out_bytes)
            for group in sorted(groups, key=lambda name: (" " in name, name))
        },
    )


def make_contender(
    name: str, material: Material, *, body: Body, hashing: Hashing, dictionary_words: int, bpe_words: int, seed: int
) -> Contender:
    """Build a freshly initialised contender; its tokenizer comes from the training text, or the cache.

    Raises:
        ValueError: the name is not in `NAMES`.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}.")
    folder = cache_folder() / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    if name == "bpe":
        bpe = train_bpe(material.train_texts, vocab_size=bpe_words, path=folder / f"bpe-{bpe_words}")
        return BpeContender(bpe, body)
    words = train_words(
        material.train_texts, max_words=dictionary_words, path=folder / f"words-{dictionary_words}.json"
    )
    return TFreeContender(words, body, hashing, name.removeprefix("tfree-"))


def score_groups(
    contender: Contender, held_out: dict[str, list[Window]], *, rows: int = 4
) -> dict[str, dict[str, float]]:
    """Bits per byte, top-1 word accuracy, tokens (positions of the model) and ids per white-space word, by group.

    The two differ for T-FREE alone: a word that its dictionary lacks takes one id for each byte, but one position.
    """
    contender.model.eval()
    results = {}
    for group, windows in held_out.items():
        ordered = sorted(windows, key=lambda window: len(window.text))
        scored = [one for i in range(0, len(ordered), rows) for one in contender.score(ordered[i : i + rows])]
        texts = [window.text for window in windows]
        words = sum(len(text.split()) for text in texts)
        ids = sum(len(contender.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        results[group] = {
            "bits_per_byte": bits_per_byte(scored),
            "word_accuracy": word_accuracy(scored),
            "tokens_per_word": sum(len(one.bits) for one in scored) / words,
            "ids_per_word": ids / words,
            "bytes": sum(len(text.encode()) for text in texts),
        }
    return results


def continuations(
    contender: Contender, prompts: Sequence[str], *, seed: int = 0, new_tokens: int = 40
) -> dict[str, str]:
    """Sample one continuation of every prompt (top-p 0.9), after an end-of-text token."""
    tokenizer, model = contender.tokenizer, contender.model.eval()
    settings: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": new_tokens}
    texts = {}
    for prompt in prompts:
        torch.manual_seed(seed)
        ids = [tokenizer.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        rows = torch.tensor([ids], device=model.device)
        written = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **settings)[0].tolist()
        texts[prompt] = tokenizer.decode(written, skip_special_tokens=True)
    return texts


def runs_folder() -> Path:
    """Where states of training runs are kept; not part of the repository."""
    return Path(__file__).with_name("runs")
