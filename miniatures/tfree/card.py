"""Metrics of a training run -> the model card of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """---
library_name: transformers
pipeline_tag: text-generation
language: [en, de, fr, es, it]
license: apache-2.0
tags: [t-free, tokenizer-free]
---

# T-FREE miniature

A causal language model of {parameters:,} parameters that reads and writes whole words through hashed byte trigrams
(T-FREE, arXiv 2406.19223), objective `{objective}`. It exists so that examples and tests run offline; it has learned
the style of software manuals and of the King James Bible, and knows nothing else.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("miniatures/tfree/checkpoint", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("miniatures/tfree/checkpoint", trust_remote_code=True, dtype="float32")
inputs = tokenizer("Wählen Sie", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

- **Size**: {vocabulary:,} parameters in embedding and head; {words:,} words in the exchangeable dictionary.
- **Training text**: Debian's `libreoffice-help-*` and `debian-reference-*` in English, German, French, Spanish and
  Italian, and `bible-kjv-text`; pages held out in all languages at once.
- **Training**: {steps:,} steps, {megabytes:.1f} MB of text read, {minutes:.0f} minutes on {threads}
  {device} thread(s), seed {seed}.
- **Not good for**: facts, instructions, advice, any use where its output matters.

| held-out text | bits per byte | top-1 word accuracy | positions per word | ids per word |
| --- | --- | --- | --- | --- |
{rows}

Bits per byte is a proper code length; words outside the dictionary pay an escape and a byte-trigram spelling, and count
as wrong in the accuracy. Such a word takes one id for each byte but one position. Words are those between white space.
The text's licences: LibreOffice help MPL-2.0, Debian Reference GPL-2+, King James Bible public domain.
"""


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Write `README.md` into a checkpoint folder."""
    rows = [
        f"| {group} | {row['bits_per_byte']:.3f} | {100 * row['word_accuracy']:.1f} % | {row['tokens_per_word']:.2f} "
        f"| {row['ids_per_word']:.2f} |"
        for group, row in metrics["held_out"].items()
    ]
    training, options = metrics["training"], metrics["options"]
    text = CARD.format(
        parameters=metrics["parameters"],
        objective=metrics["model"].removeprefix("tfree-"),
        vocabulary=metrics["vocabulary_parameters"],
        words=options["dictionary_words"],
        steps=training["steps"],
        megabytes=training["bytes"] / 1e6,
        minutes=training["seconds"] / 60,
        device=options["device"],
        threads=options["threads"],
        seed=options["seed"],
        rows="\n".join(rows),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
