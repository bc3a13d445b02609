"""Tiny T-FREE models with random weights, built in milliseconds, and one small model that learned to repeat words.

The package is imported inside the fixtures: the root conftest.py must set up the Hub before anything imports it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tfree_tokenizer import TFreeForCausalLM, TFreeTokenizer

UNKNOWN = ("Donaudampfschiff", "Zwetschge", "Żółć")  # words that the tiny dictionary lacks


@dataclass(frozen=True)
class Tiny:
    """A model in eval mode and its tokenizer."""

    model: "TFreeForCausalLM"
    tokenizer: "TFreeTokenizer"

    def ids(self, *texts: str, side: str = "left") -> dict[str, Tensor]:
        """Encode as one padded batch."""
        return dict(self.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side=side))

    def generate(self, *texts: str, **options: Any) -> list[list[int]]:
        """The ids that `generate` adds to each text; greedy unless the options say otherwise."""
        inputs = self.ids(*texts)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
        return self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def build() -> Callable[..., Tiny]:
    """`build(seed, **config_fields)`: a fresh tiny model with random weights."""
    from tests.support.tfree import tiny_tfree

    def make(seed: int = 0, **fields: Any) -> Tiny:
        return Tiny(*tiny_tfree(seed, **fields))

    return make


@pytest.fixture(params=["bce", "dictionary_ce"])
def objective(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny(build: Callable[..., Tiny], objective: str) -> Tiny:
    """A fresh tiny model, in turn with each objective."""
    return build(objective=objective)


@pytest.fixture(scope="session")
def copier() -> Tiny:
    """A model that learned to go on with X after "the X is small", also for words X that it cannot name.

    It is shared: leave it as it is.
    """
    from tests.support.tfree import WORDS, tiny_tfree

    torch.manual_seed(0)
    model, tokenizer = tiny_tfree(objective="dictionary_ce", hash_vocab_size=256, hidden_size=32)
    texts = [f"the {word} is small {word}<|endoftext|>" for word in [*WORDS[:9], *UNKNOWN]]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    return Tiny(model.eval(), tokenizer)
