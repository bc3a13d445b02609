"""The demo's part on SCAR: one prompt at five strengths, and a text colored by what the model reads in it."""

import html
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import scar_peft
from examples.page import Section

MODEL = Path("miniatures/tfree/checkpoint")
ADAPTER = Path("miniatures/scar/checkpoint")
PROMPT = "Choose this option to see"
STRENGTHS = (0.0, 0.4, 0.6, 0.8, 1.0)
COLORS = {"scripture": "214, 69, 65", "german": "65, 105, 214"}  # red, blue
MIXED = """And it came to pass in those days, that the king sent for his servants, and they did eat bread.
To insert a new table, choose Insert - Table, enter the number of rows and columns and click OK.
Wählen Sie das Dokument aus und klicken Sie auf die Schaltfläche Speichern.
The dialog shows the name of the file and the size of the selected objects.
Thou shalt not take the name of the file in vain."""


def scar_section(out: Path) -> Section:  # noqa: ARG001 (all sections take the folder of the pictures)
    """Load the committed adapter, steer with it, and read its scores."""
    section = Section("SCAR: what does the model read, and what shall it write?")
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=True, dtype="float32")
    model = PeftModel.from_pretrained(base, ADAPTER).eval()
    size = (ADAPTER / "adapter_model.safetensors").stat().st_size
    section.text(
        f"An adapter of {size / 1000:.0f} kB on the T-FREE miniature knows two concepts: the style of the King James "
        "Bible, and German. It reads them from the model's activations and writes them into the same activations."
    )
    _show_strengths(section, model, tokenizer)
    _show_scores(section, model, tokenizer)
    return section


def _show_strengths(section: Section, model: Any, tokenizer: Any) -> None:
    """Each row of one batch has strengths of its own."""
    zeros = torch.zeros(len(STRENGTHS))
    steering = {
        "scripture": torch.cat([torch.tensor(STRENGTHS), zeros]),
        "german": torch.cat([zeros, torch.tensor(STRENGTHS)]),
    }
    batch = tokenizer([PROMPT] * 2 * len(STRENGTHS), return_tensors="pt")
    torch.manual_seed(3)
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 40, "max_new_tokens": 16}
    ids = model.generate(**batch, **settings, steering=steering)
    texts = [text.removeprefix(PROMPT) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    rows = {"scripture": texts[: len(STRENGTHS)], "german": texts[len(STRENGTHS) :]}
    section.text(f"“{PROMPT} ...”, ten requests in one batch, each with a strength of its own:")
    section.parts.append(_side_by_side(rows))
    print(f"\n{PROMPT} ...")
    for concept, written in rows.items():
        for strength, text in zip(STRENGTHS, written, strict=True):
            print(f"  {concept} {strength:3.1f} {text!r}")


def _side_by_side(rows: dict[str, list[str]]) -> str:
    """A table of texts: a row for each concept, a column for each strength."""
    head = "".join(f"<th>strength {strength:g}</th>" for strength in STRENGTHS)
    cell = '<td style="text-align: left; vertical-align: top">{}</td>'.format
    lines = (
        f"<tr><th>{html.escape(concept)}</th>{''.join(cell(html.escape(text)) for text in texts)}</tr>"
        for concept, texts in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _show_scores(section: Section, model: Any, tokenizer: Any) -> None:
    batch = tokenizer(MIXED, return_tensors="pt", return_offsets_mapping=True)
    spans = batch.pop("offset_mapping")[0].tolist()
    with torch.no_grad(), scar_peft.record_scores(model) as record:
        model(**batch)
    scores = {concept: record.scores[concept][0].tolist() for concept in COLORS}
    section.text("One text, colored by the score of each word; scripture is red, German is blue:")
    section.parts.append(f"<blockquote>{_colored(MIXED, spans, scores)}</blockquote>")
    for concept, values in scores.items():
        found = [MIXED[a:b] for (a, b), value in zip(spans, values, strict=True) if value > 0.5]
        print(f"  {concept}: {' '.join(' '.join(found).split())}")


def _colored(text: str, spans: list[list[int]], scores: dict[str, list[float]]) -> str:
    """HTML with each span of the text on a ground as strong as its highest score."""
    parts, end = [], 0
    for i, (start, stop) in enumerate(spans):
        concept = max(scores, key=lambda name: scores[name][i])
        ground = f"rgba({COLORS[concept]}, {0.6 * scores[concept][i]:.2f})"
        hint = ", ".join(f"{name} {values[i]:.2f}" for name, values in scores.items())
        parts.append(html.escape(text[end:start]))
        parts.append(f'<span style="background: {ground}" title="{hint}">{html.escape(text[start:stop])}</span>')
        end = stop
    return "".join([*parts, html.escape(text[end:])])
