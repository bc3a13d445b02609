"""What the method claims, on a language model that learned two registers in the same minute.

The concept is whether a text is archaic; only function words tell, so that a token's register lies in its context.
"""

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import scar_peft
from scar_peft.coder import encode, pre_activations
from scar_peft.metrics import auroc
from scar_peft.training import LabelReader, ScarTrainer, ScarTrainingArguments
from scar_peft.training.activations import ActivationRows, activation_windows
from tests.support.scar_texts import WORDS, register_texts, tiny_llama, train_language_model, word_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAYER = 1
STEPS = 600
PROMPT_TOKENS = 14
NEW_TOKENS = 24
TRAINING = register_texts(800, seed=1)
TEST = register_texts(120, seed=77)


@pytest.fixture(scope="module")
def language_model() -> Any:
    model = tiny_llama(layers=2, hidden=64)
    loss = train_language_model(model, word_tokenizer(), TRAINING, steps=300)
    assert loss < 1.3  # ln 40 = 3.7 before
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small-scale")


@pytest.fixture(scope="module")
def supervised(language_model: Any, folder: Path) -> Any:
    return train(language_model, 1.0, folder)


@pytest.fixture(scope="module")
def unsupervised(language_model: Any, folder: Path) -> Any:
    return train(language_model, 0.0, folder)


def train(language_model: Any, concept_weight: float, folder: Path) -> Any:
    torch.manual_seed(0)
    config = scar_peft.ScarConfig(layers=[LAYER], site="block", concepts=["archaic"], n_latents=384, k=32)
    model = get_peft_model(copy.deepcopy(language_model), config)
    args = ScarTrainingArguments(
        folder / f"weight-{concept_weight}",
        store_dir=folder / "activations",
        learning_rate=2e-3,
        max_steps=STEPS,
        batch_tokens=1024,
        concept_weight=concept_weight,
        save_steps=None,
        eval_steps=STEPS,
        progress_bar=False,
    )
    result = ScarTrainer(model, TRAINING, args=args, processing_class=word_tokenizer()).train()
    assert result.metrics[f"eval_nmse/{LAYER}"] < 0.01  # both reconstruct; only one is told the concept
    return model


def token_scores(model: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre-activations of the concept `[N]`, all latents `[N, n]` and labels `[N]` of the tokens of texts never seen."""
    layer = scar_peft.scar_layers(model)[0]
    config, weights = layer.config("default"), layer.weights("default")
    reader = LabelReader(concepts=("archaic",), columns=("archaic",))
    targets = {LAYER: layer.get_base_layer()}
    windows = activation_windows(model, word_tokenizer(), TEST, reader, targets)
    rows = ActivationRows.cat([window for _, window in windows])
    with torch.no_grad():
        x = rows.acts[LAYER]
        latents = encode(x, weights, k=config.kept, activation=config.activation, always=config.always_kept)
        return pre_activations(x, weights)[:, 0], latents, rows.labels[:, 0].long()


def archaic_share(model: Any, of: int, rule: str, strength: float) -> float:
    """P(archaic) of what is sampled behind archaic (1) or modern (0) prompts, by naive Bayes on words."""
    tokenizer = word_tokenizer()
    counts = [Counter(dict.fromkeys(WORDS, 1)), Counter(dict.fromkeys(WORDS, 1))]
    for row in register_texts(400, seed=5):
        counts[row["archaic"]].update(row["text"].split())
    totals = [count.total() for count in counts]
    log_odds = torch.tensor(
        [math.log(counts[1][word] / totals[1]) - math.log(counts[0][word] / totals[0]) for word in WORDS]
    )
    prompts = [tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS] for row in TEST if row["archaic"] == of]
    ids = torch.tensor(prompts)
    torch.manual_seed(0)
    with scar_peft.steering(model, archaic=strength, rule=rule):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0
        )
    return float(torch.sigmoid(log_odds[out[:, PROMPT_TOKENS:]].sum(1)).mean())


def is_monotone(values: list[float], slack: float = 0.03) -> bool:
    return all(later >= earlier - slack for i, earlier in enumerate(values) for later in values[i:])


def test_the_concept_latent_detects_the_concept_and_no_other_latent_does(supervised: Any, unsupervised: Any) -> None:
    pre, latents, labels = token_scores(supervised)
    each = [auroc(latents[:, latent], labels) for latent in range(latents.shape[1])]
    best, second = sorted(each, reverse=True)[:2]
    _, plain_latents, _ = token_scores(unsupervised)
    plain = max(auroc(plain_latents[:, latent], labels) for latent in range(latents.shape[1]))
    assert auroc(pre, labels) > 0.95
    assert each[0] == best > plain + 0.2
    assert second < 0.75


def test_scores_of_texts_separate_the_registers(supervised: Any) -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer([row["text"] for row in TEST], return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad(), scar_peft.record_scores(supervised) as recording:
        supervised(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
    scores = recording.scores.pooled("mean", ids["attention_mask"])["archaic"]
    assert auroc(scores, torch.tensor([row["archaic"] for row in TEST])) > 0.99


def test_adding_the_concept_makes_modern_prompts_archaic(supervised: Any) -> None:
    found = [archaic_share(supervised, 0, "add", strength) for strength in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert is_monotone(found)
    assert found[0] <= 0.05 and found[-1] >= 0.9


def test_scaling_the_concept_down_makes_archaic_prompts_modern(supervised: Any) -> None:
    found = [archaic_share(supervised, 1, "scale", scale - 1.0) for scale in (1.0, -5.0, -10.0, -20.0, -50.0)]
    assert is_monotone(found[::-1])
    assert found[0] >= 0.95 and found[-1] <= 0.05


def test_gated_addition_works_in_both_directions(supervised: Any) -> None:
    assert archaic_share(supervised, 0, "add_gated", 2.0) >= 0.9
    assert archaic_share(supervised, 1, "add_gated", -2.0) <= 0.05


def test_scaling_cannot_switch_on_what_is_off(supervised: Any) -> None:
    assert archaic_share(supervised, 0, "scale", 49.0) < 0.5
