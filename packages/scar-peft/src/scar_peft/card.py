"""The model card of an adapter: what it does, how to run it, how well it works; all read from its configuration.

`config.metrics` may hold numbers of the whole adapter by name, "concepts" (numbers by concept) and "steering" (a list
of rows with "concept", "rule", "strength" and what was measured); "data" says on which texts.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .config import ScarConfig

TAGS = ("scar", "sparse-autoencoder", "steering")
MARK = "<!-- written by scar-peft; remove this line to keep your own text -->"
"""A card with this line is replaced when the adapter is saved again."""

_BLANK_CARD = "[More Information Needed]"
"""What peft's own card is full of."""

_TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
}
_EXAMPLE_STRENGTH = {"scale": -1.0, "set": 0.0, "add": -0.5, "add_gated": -1.0}
_RULES = {
    "scale": "A strength `a` multiplies the concept's latent by `1 + a` where it is on: 0 changes nothing, -1 removes "
    "it, and a concept that is off stays off.",
    "set": "A strength is the value that the concept's latent gets, on or off; without one, nothing changes.",
    "add": "A strength is the length of a push along the concept's direction, as a share of the token's norm.",
    "add_gated": "A strength is the length of a push along the concept's direction, as a share of the token's norm; "
    "it is less where the concept is already as wanted.",
}
_METRICS = {
    "auroc": ("AUROC", "roc_auc"),
    "token_auroc": ("AUROC, tokens", "roc_auc"),
    "token_auroc_pre": ("AUROC, tokens by pre-activation", "roc_auc"),
    "sequence_auroc": ("AUROC, sequences", "roc_auc"),
    "sequence_auroc_max": ("AUROC, sequences by maximum", "roc_auc"),
    "sequence_auroc_last": ("AUROC, sequences by last token", "roc_auc"),
    "f1": ("F1", "f1"),
    "token_f1": ("F1, tokens", "f1"),
    "sequence_f1": ("F1, sequences", "f1"),
    "fms": ("FMS@1", "fms"),
    "nmse": ("reconstruction error (nmse)", "nmse"),
    "explained_variance": ("explained variance", "explained_variance"),
    "l0": ("latents on per token (L0)", "l0"),
    "dead_fraction": ("share of dead latents", "dead_fraction"),
    "ce_recovered": ("cross-entropy recovered", "ce_recovered"),
}
"""What a number is called in the card, and on the Hub."""

_NOT_SHOWN = ("positive_texts", "negative_texts", "sequence_threshold", "token_threshold")
"""Numbers of a concept that would make its row of the table too long; they are in the configuration."""


def model_card(
    config: ScarConfig,
    repo_id: str | None = None,
    *,
    title: str | None = None,
    tags: Sequence[str] = (),
    subfolder: str | None = None,
    trust_remote_code: bool = False,
) -> ModelCard:
    """Describe an adapter.

    Args:
        config: its configuration, with calibration and metrics where there are any.
        repo_id: where the reader loads it from. None: the folder that the card is in.
        title: heading. None: the repository's name, or the concepts.
        tags: for the Hub, beside those of every SCAR adapter.
        subfolder: part of the repository that holds it; adapters that are not called "default" have their own.
        trust_remote_code: whether the base model brings code of its own, so that loading it has to be allowed.
    """
    title = title or (repo_id.rpartition("/")[2] if repo_id else f"SCAR adapter: {', '.join(config.concepts)}")
    results = _eval_results(config)
    data = ModelCardData(
        base_model=config.base_model_name_or_path or None,
        eval_results=results or None,
        library_name="peft",
        license=config.license,
        model_name=title if results else None,
        pipeline_tag=_TASKS[str(config.task_type)][1] if str(config.task_type) in _TASKS else None,
        tags=[*TAGS, *tags],
    )
    sections = [
        MARK,
        f"# {title}",
        _summary(config),
        f"```python\n{_usage(config, repo_id or '.', subfolder, trust_remote_code)}\n```",
        f"Scores come from the same pass:\n\n```python\n{_DETECTION}\n```",
        _strengths(config),
        "## Concepts",
        _concepts(config),
        *_evaluation(config),
        "## Details",
        _details(config),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def write_card(config: ScarConfig, folder: Path, repo_id: str | None = None, **options: Any) -> None:
    """Write `README.md` into a folder. A card that somebody has edited keeps its text.

    Args:
        config: configuration of the adapter.
        folder: where adapters were saved.
        repo_id: see `model_card`.
        **options: see `model_card`.
    """
    path = folder / "README.md"
    card = model_card(config, repo_id, **options)
    if path.is_file():
        present = ModelCard.load(path)
        is_ours_to_write = MARK in present.text or _BLANK_CARD in present.text
        tags = sorted({*(present.data.tags or []), *card.data.tags})
        card = card if is_ours_to_write else present
        card.data.tags = tags
    card.save(path)


def _summary(config: ScarConfig) -> str:
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "a language model"
    return (
        f"A SCAR adapter for {base}. In the pass that the model makes anyway, it detects {_listed(config.concepts)} in "
        "every token that is read, and steers what is written towards or away from it. The base model's weights stay "
        "as they are."
    )


_USAGE = """\
# pip install scar-peft
import scar_peft  # tells PEFT what a SCAR adapter is
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({base}{trust})
tokenizer = AutoTokenizer.from_pretrained({base}{trust})
model = PeftModel.from_pretrained(base, {place})
inputs = tokenizer("Once upon a time", return_tensors="pt")
{act}"""
_GENERATE = """\
written = model.generate(**inputs, max_new_tokens=20, steering={steering})
print(tokenizer.decode(written[0], skip_special_tokens=True))"""
_PASS = """\
print(model(**inputs, steering={steering}))"""
_DETECTION = """\
with scar_peft.record_scores(model) as record:
    model(**inputs)
print(record.scores, record.pooled("mean"))  # every token's score, and one per text"""


def _usage(config: ScarConfig, place: str, subfolder: str | None, trust_remote_code: bool) -> str:
    act = _GENERATE if str(config.task_type) in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else _PASS
    return _USAGE.format(
        auto_class=_TASKS.get(str(config.task_type), ("AutoModel",))[0],
        base=json.dumps(config.base_model_name_or_path or "the base model"),
        trust=", trust_remote_code=True" if trust_remote_code else "",
        place=json.dumps(place) + (f", subfolder={json.dumps(subfolder)}" if subfolder else ""),
        act=act.format(steering=json.dumps({config.concepts[0]: _EXAMPLE_STRENGTH[config.steering_rule]})),
    )


def _strengths(config: ScarConfig) -> str:
    concept, strength = config.concepts[0], _EXAMPLE_STRENGTH[config.steering_rule]
    return (
        f'{_RULES[config.steering_rule]} `model.set_steering("{concept}", {strength})` holds until the next call; a '
        "tensor gives every row of a batch a strength of its own."
    )


def _concepts(config: ScarConfig) -> str:
    numbers = {name: _numbers_of(config, name) for name in config.concepts}
    columns = list(dict.fromkeys(key for each in numbers.values() for key in each))
    rows = [[name, i, *(numbers[name].get(key) for key in columns)] for i, name in enumerate(config.concepts)]
    note = "\n\nA text whose mean score is above the threshold counts as one with the concept."
    return _table(["concept", "latent", *map(_label, columns)], rows) + (note if "threshold" in columns else "")


def _numbers_of(config: ScarConfig, concept: str) -> dict[str, Any]:
    calibrated, measured = config.calibration.get(concept, {}), config.metrics.get("concepts", {}).get(concept, {})
    shown = {"threshold": calibrated.get("threshold")}
    shown |= {name: value for name, value in measured.items() if name not in _NOT_SHOWN}
    return {name: value for name, value in shown.items() if _is_number(value)}


def _evaluation(config: ScarConfig) -> list[str]:
    """Sections on the whole adapter and on steering; none without numbers."""
    sections = []
    if whole := {name: value for name, value in config.metrics.items() if _is_number(value)}:
        sections.append(_table(["measure", "value"], [[_label(name), value] for name, value in whole.items()]))
    if curve := config.metrics.get("steering"):
        columns = list(dict.fromkeys(key for row in curve for key in row))
        sections += [
            "### Steering",
            _table(list(map(_label, columns)), [[row.get(key) for key in columns] for row in curve]),
        ]
    if data := config.metrics.get("data"):
        sections.append(f"Measured on {data}.")
    return ["## Evaluation", *sections] if sections else []


def _details(config: ScarConfig) -> str:
    sites = {"mlp": "output of the feed-forward part", "block": "residual stream behind the block", "attn": "attention"}
    layers = ", ".join(map(str, config.layers if isinstance(config.layers, list) else [config.layers]))
    kept = "" if config.activation == "relu" else f", {config.k:,} kept per token" if config.k else ""
    stored = "; only the concepts' rows are in this repository" if config.compact else ""
    facts = {
        "Where": f"{sites[config.site]}, block {layers} (counted from 0)",
        "Sparse coder": f"{config.n_latents or 0:,} latents{kept}, activation `{config.activation}`{stored}",
        "Steering": f"rule `{config.steering_rule}`, mode `{config.mode}`, gate `{config.resolved_gate}`, positions "
        f"`{config.steering_positions}`",
        "Labels": config.label_source or "not stated",
        "Licence": f"{config.license or 'not stated'}; the base model has a licence of its own",
        "Limits": "a strong push takes activations where the model has never been: look at perplexity and at texts "
        "before relying on a strength. A score is evidence about words, not a judgement about people",
    }
    return "\n".join(f"- **{name}**: {fact}." for name, fact in facts.items())


def _eval_results(config: ScarConfig) -> list[EvalResult]:
    """AUROC and F1 of each concept for the Hub's index; any others are in the text."""
    return [
        EvalResult(
            task_type="text-classification",
            task_name=f"detection of {concept}",
            dataset_type="text",
            dataset_name=str(config.metrics.get("data") or config.label_source or "held-out texts"),
            metric_type=_METRICS[name][1],
            metric_name=_label(name),
            metric_value=value,
        )
        for concept, numbers in config.metrics.get("concepts", {}).items()
        for name, value in numbers.items()
        if name in _METRICS and _METRICS[name][1] in ("roc_auc", "f1") and _is_number(value)
    ]


def _label(name: str) -> str:
    return _METRICS[name][0] if name in _METRICS else name.replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
