"""A tiny checkpoint in the layout of the original T-FREE code, and its mathematics written out plainly.

Nothing here uses the package: hash rows, interleaved rotary positions, the forward pass and decoding are spelled out
from the paper, so that a converted model can be compared with something that shares no line with it.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

SPACING = ["<|no_ws|>", "<|ws|>", "<|2<-ws->|>", "<|4<-ws->|>", "<|6<-ws->|>", "<|8<-ws->|>"]
SPACING += ["<|\n|>", "<|2<-\n->|>", "<|4<-\n->|>", "<|6<-\n->|>", "<|8<-\n->|>"]
WORDS = [
    *SPACING,
    "<|endoftext|>",
    "<|startoftext|>",
    "the",
    "house",
    "House",
    "is",
    "small",
    "Haus",
    ".",
    ",",
    "1",
    "é",
]


@dataclass
class OriginalModel:
    """Random weights under the original's names, and what its code computes with them."""

    v: int = 96
    m: int = 5
    k: int = 2
    hidden: int = 24
    heads: int = 3
    layers: int = 2
    intermediate: int = 40
    theta: float = 10_000.0
    words: list[str] = field(default_factory=lambda: list(WORDS))

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 0.35

        h, f = self.hidden, self.intermediate
        self.weights = {
            "transformer.embeddings.embedding.weight": random(self.v, h),
            "transformer.norm.weight": 1 + random(h),
            "lm_head.weight": random(self.v, h),
        }
        for i in range(self.layers):
            layer = f"transformer.layers.{i}"
            for name in ("query", "key", "value", "dense"):
                self.weights[f"{layer}.attention.{name}.weight"] = random(h, h)
            for name, shape in {"dense_in": (f, h), "swiglu": (f, h), "dense_out": (h, f)}.items():
                self.weights[f"{layer}.mlp.{name}.weight"] = random(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.weights[f"{layer}.{name}.weight"] = 1 + random(h)

    def transformer_config(self) -> dict[str, object]:
        return {
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "rotary_embedding_base": self.theta,
            "mlp_type": "swiglu",
            "norm": "rms",
            "bias_terms": False,
            "sequence_length": 64,
        }

    def tokenizer_config(self) -> dict[str, object]:
        return {
            "lowercase": False,
            "vocab_size": self.v,
            "sequence_length": 64,
            "vocab_population": self.m,
            "vocab_population_partial_lowercase": self.k,
            "do_classic_tokenization": False,
            "prefix_path_tokenizer_file": None,
            "seed": 42,
            "initialize": "hash",
            "entire_words": False,
            "end_of_text": "<|endoftext|>",
            "word_edge_weight": 0.8,
            "cache_dir": None,
        }

    def save(self, folder: Path, *, with_tokenizer: bool = True) -> Path:
        for name in ("transformer", "tokenizer"):
            (folder / name).mkdir(parents=True)
        torch.save(self.weights, folder / "transformer" / "transformer.pt")
        (folder / "transformer" / "transformer_config.yaml").write_text(json.dumps(self.transformer_config()))
        (folder / "tokenizer" / "tokenizer_config.yaml").write_text(json.dumps(self.tokenizer_config()))
        if with_tokenizer:
            torch.save(self.tokenizer_state(), folder / "tokenizer" / "tokenizer.pt")
        return folder

    def tokenizer_state(self, rows: int = 1 << 23) -> dict[str, object]:
        """As the original's, but the table is short and of bytes, and only filled where the words have trigrams."""
        table = torch.zeros(rows, self.m, dtype=torch.uint8)
        used = {trigram for word in self.words if "<|" not in word for trigram in trigrams(word)}
        for trigram in used:
            if number(trigram) < len(table):
                table[number(trigram)] = torch.tensor(self.rows(trigram), dtype=torch.uint8)
        return {"trigram_to_vocab": table, "words": self.words, "word_counts": list(range(len(self.words), 0, -1))}

    def rows(self, trigram: bytes) -> list[int]:
        rows = self._plain_rows(trigram)
        if all(chr(b) in " abcdefghijklmnopqrstuvwxyz" for b in trigram.lower()) and trigram != trigram.lower():
            rows[self.m - self.k :] = self._plain_rows(trigram.lower())[self.m - self.k :]
        return rows

    def _plain_rows(self, trigram: bytes) -> list[int]:
        rows: list[int] = []
        for i in range(self.m):
            attempt = 0
            while (row := _md5(f"{number(trigram)}_{i}_{attempt}") % self.v) in rows:
                attempt += 1
            rows.append(row)
        return sorted(rows)

    def rows_by_trigram(self, word: str) -> list[tuple[bytes, list[int]]]:
        if "<|" in word:
            rows = [_md5(f"{word}_{i}") % self.v for i in range(self.m - self.k)]
            return [(b"", rows + [_md5(f"{word.lower()}_lower_{i}") % self.v for i in range(self.k)])]
        return [(trigram, self.rows(trigram)) for trigram in sorted(trigrams(word))]

    def forward(self, words: list[str]) -> Tensor:
        """Row logits [N, v]."""
        w = self.weights
        table = w["transformer.embeddings.embedding.weight"]
        x = torch.stack([sum(table[row] for _, rows in self.rows_by_trigram(word) for row in rows) for word in words])
        for i in range(self.layers):
            layer = f"transformer.layers.{i}"
            x = x + self._attention(_rms_norm(x, w[f"{layer}.input_layernorm.weight"]), f"{layer}.attention")
            y = _rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(y @ w[f"{layer}.mlp.dense_in.weight"].T)
            x = x + (gate * (y @ w[f"{layer}.mlp.swiglu.weight"].T)) @ w[f"{layer}.mlp.dense_out.weight"].T
        return _rms_norm(x, w["transformer.norm.weight"]) @ w["lm_head.weight"].T

    def _attention(self, x: Tensor, name: str) -> Tensor:
        N, size = len(x), self.hidden // self.heads
        q, k, v = (
            (x @ self.weights[f"{name}.{part}.weight"].T).view(N, self.heads, size).transpose(0, 1)
            for part in ("query", "key", "value")
        )  # [H, N, d]
        scores = self._rotate(q) @ self._rotate(k).transpose(1, 2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -10_000.0)
        mixed = scores.float().softmax(-1) @ v
        return mixed.transpose(0, 1).reshape(N, self.hidden) @ self.weights[f"{name}.dense.weight"].T

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate the pairs (0, 1), (2, 3), ... of every head."""
        _, N, size = x.shape
        angle = torch.arange(N)[:, None] * self.theta ** (-torch.arange(0, size, 2) / size)  # [N, d/2]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
        return torch.stack(turned, -1).flatten(-2)

    def contrast(self, logits: Tensor, words: list[str], edge_weight: float) -> Tensor:
        """The original's word scores [N, W]."""
        p, columns = logits.sigmoid(), []
        for word in words:
            pairs = self.rows_by_trigram(word)
            inner = {row for trigram, rows in pairs if b" " not in trigram for row in rows}
            edge = {row for trigram, rows in pairs if b" " in trigram for row in rows}
            s = p[:, sorted(inner)].sum(1) + edge_weight * p[:, sorted(edge)].sum(1)
            size = len(pairs) * self.m
            columns.append(s / size + (s - p.sum(1)) / max(self.v - size, 1))
        return torch.stack(columns, 1)


def trigrams(word: str) -> set[bytes]:
    data = b" " + word.encode() + b" "
    return {data[i : i + 3] for i in range(len(data) - 2)}


def number(trigram: bytes) -> int:
    return trigram[0] + 256 * trigram[1] + 65536 * trigram[2]


def _md5(text: str) -> int:
    return int(hashlib.md5(text.encode()).hexdigest(), 16)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
