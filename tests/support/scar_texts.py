"""Texts in two registers, and language models small enough to learn them while a test waits."""

import random
from typing import Any

import torch
from torch import nn

MODERN = ("you", "has", "please", "your", "are", "does")
ARCHAIC = ("thou", "hath", "prithee", "thy", "art", "doth")
NOUNS = (
    "king",
    "queen",
    "horse",
    "sword",
    "house",
    "river",
    "garden",
    "letter",
    "ship",
    "crown",
    "friend",
    "song",
    "bread",
)
VERBS = ("see", "find", "take", "bring", "keep", "lose", "hold", "send")
TEMPLATES = (
    "{you} {does} {verb} the {noun}",
    "{please} {verb} {your} {noun}",
    "the {noun} {has} a {noun2}",
    "{you} {are} the {noun} of the {noun2}",
    "{your} {noun} {has} the {noun2}",
    "{please} {does} {you} {verb} a {noun}",
)
WORDS = ("[unk]", "<s>", "the", "a", "of", ".", *MODERN, *ARCHAIC, *NOUNS, *VERBS)


def register_texts(count: int, seed: int = 0, sentences: int = 4) -> list[dict[str, Any]]:
    """Rows with `text` and `archaic`, every other of which is 1; only function words tell the registers apart."""
    rng = random.Random(seed)
    return [{"text": _text(rng, ARCHAIC if i % 2 else MODERN, sentences), "archaic": i % 2} for i in range(count)]


def _text(rng: random.Random, register: tuple[str, ...], sentences: int) -> str:
    names = dict(zip(("you", "has", "please", "your", "are", "does"), register, strict=True))
    parts = []
    for _ in range(sentences):
        nouns = rng.sample(NOUNS, 2)
        words = {"verb": rng.choice(VERBS), "noun": nouns[0], "noun2": nouns[1]}
        parts.append(rng.choice(TEMPLATES).format(**names, **words) + " .")
    return " ".join(parts)


def word_tokenizer(begins: bool = True) -> Any:
    """A fast tokenizer with one token per word of `WORDS`, and a token `<s>` in front unless told otherwise."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", bos_token="<s>", pad_token="[unk]")


def tiny_llama(layers: int = 2, hidden: int = 16, seed: int = 0) -> Any:
    """A random language model over `WORDS`, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def train_language_model(
    model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], steps: int, seed: int = 0
) -> float:
    """Train on the texts in batches of 32 and return the last loss."""
    batch = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = torch.randint(len(ids), (32,), generator=generator)
        loss = model(input_ids=ids[chosen], attention_mask=mask[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()
