"""Metrics of a training run -> the model card of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miniatures.captioner.questions import KINDS, PROMPTS
from miniatures.captioner.scenes import NAMES, PLACES

LEARNED = 0.8
"""Share of right answers from which a kind of question counts as learned."""
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
language: [en]
license: apache-2.0
tags: [llava, emoji]
---

# Captioner miniature

A vision-language model of {parameters:,} parameters and stock architecture: LLaVA with a CLIP vision tower (96 x 96
pixels, 12 x 12 patches) and a Llama decoder. It was asked four kinds of question about scenes of two to four out of
{things} emoji at nine places. It exists so that examples and tests of image explanations run offline, on pictures whose
objects are known.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("miniatures/captioner/checkpoint")
model = AutoModelForImageTextToText.from_pretrained("miniatures/captioner/checkpoint", dtype="float32")
picture = Image.open("miniatures/captioner/examples/00.png")
inputs = processor(text="<image> what do you see ?", images=[picture], return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=12)
print(processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

| kind | question | right, word for word | held-out questions |
| --- | --- | --- | --- |
{rows}

- **Not learned**: {unlearned}. A right answer to those is a guess, and an explanation of it says nothing.
- **Words**: {words} in all; anything else is unknown to the tokenizer. Lists are in reading order.
- **Training**: {patch_steps:,} steps in which the vision tower learns what each patch shows, then {answer_steps:,} on
  questions, where the patch loss stays with a weight of 0.2; {pictures:,} pictures, {minutes:.0f} minutes of {device}
  time, seed {seed}. The patch loss ties an image column to what its patch shows, more strictly than reading captions
  would: maps are easier to get right here than for a model trained on captions alone.
- **Pictures**: Noto Color Emoji (OFL-1.1), names from CLDR (Unicode licence). Held-out pictures are new scenes of the
  same emoji.
- **Not good for**: photographs, other emoji, other questions.

Places: {places}.
Things: {names}.
"""


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Write `README.md` into a checkpoint folder."""
    held_out, training, options = metrics["held_out"], metrics["training"], metrics["options"]
    prompts = PROMPTS | {"what (nothing)": PROMPTS["what"] + " (nothing is)"}
    rows = [
        f"| {kind} | `{prompts[kind].replace('<image> ', '').replace('{}', '...')}` | {100 * share:.1f} % "
        f"| {held_out['questions'][kind]:,} |"
        for kind, share in held_out["accuracy"].items()
    ]
    unlearned = [f"`{kind}`" for kind in KINDS if held_out["accuracy"][kind] < LEARNED]
    text = CARD.format(
        unlearned=" and ".join(unlearned) or "none of them",
        parameters=metrics["parameters"],
        things=len(NAMES),
        rows="\n".join(rows),
        words=metrics["words"],
        patch_steps=training["patches"]["steps"],
        answer_steps=training["answers"]["steps"],
        pictures=sum(stage["pictures"] for stage in training.values()),
        minutes=sum(stage["seconds"] for stage in training.values()) / 60,
        device={"cpu": "CPU", "cuda": "GPU"}[options["device"]],
        seed=options["seed"],
        places=", ".join(PLACES),
        names=", ".join(NAMES),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
