"""The task: a prompt of facts (key, value) and fillers, then a key; the answer is the value of that key.

Every fact is one token, so exactly one token of the prompt is the evidence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

KEYS = VALUES = FILLERS = 10
FACTS = 6  # in a prompt
BOS = 0
FIRST_FACT = 1
FIRST_KEY = FIRST_FACT + KEYS * VALUES
FIRST_ANSWER = FIRST_KEY + KEYS
FIRST_FILLER = FIRST_ANSWER + VALUES
VOCABULARY = FIRST_FILLER + FILLERS
STEPS = 400
BATCH = 96


@dataclass(frozen=True)
class Prompts:
    """Prompts with their answers and evidence."""

    ids: Tensor
    """[B, 18] int64: BOS, facts and fillers in any order, a key."""
    answers: Tensor
    """[B] int64, the token that follows."""
    evidence: Tensor
    """[B] int64, the column of the fact that says so."""


def draw_prompts(count: int, generator: torch.Generator) -> Prompts:
    """Draw prompts: six facts with different keys and ten fillers, shuffled, then one of the six keys."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :FACTS]
    values = torch.randint(VALUES, (count, FACTS), generator=generator)
    facts = FIRST_FACT + keys * VALUES + values
    fillers = FIRST_FILLER + torch.randint(FILLERS, (count, FILLERS), generator=generator)
    order = torch.rand(count, FACTS + FILLERS, generator=generator).argsort(1)
    middle = torch.cat([facts, fillers], dim=1).gather(1, order)
    asked = torch.randint(FACTS, (count, 1), generator=generator)
    ids = torch.cat([torch.full((count, 1), BOS), middle, FIRST_KEY + keys.gather(1, asked)], dim=1)
    evidence = (order == asked).int().argmax(1) + 1
    return Prompts(ids, FIRST_ANSWER + values.gather(1, asked).squeeze(1), evidence)


def train_model(seed: int, steps: int = STEPS) -> LlamaForCausalLM:
    """Train a small Llama to answer; ten seconds of one core."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        max_position_embeddings=64,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        prompts = draw_prompts(BATCH, generator)
        logits = model(input_ids=prompts.ids, logits_to_keep=1).logits[:, -1]
        optimizer.zero_grad()
        F.cross_entropy(logits, prompts.answers).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, prompts: Prompts) -> float:
    """Share of right answers."""
    logits = model(input_ids=prompts.ids, logits_to_keep=1).logits[:, -1]
    return (logits.argmax(-1) == prompts.answers).double().mean().item()
