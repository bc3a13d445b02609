"""The model cards of the committed miniatures: complete, and what they show works."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tests.support.snippets import run_page
from tests.support.tree import ROOT

CARDS = sorted(ROOT.glob("miniatures/*/checkpoint/README.md"))
AUTO_CLASSES = {"text-generation": AutoModelForCausalLM, "image-text-to-text": AutoModelForImageTextToText}

ADAPTERS = [card for card in CARDS if ModelCard.load(card).data.library_name == "peft"]


def by(cards):
    return pytest.mark.parametrize("card", cards, ids=lambda card: card.parent.parent.name)


by_card = by(CARDS)


@by_card
def test_the_card_says_what_the_hub_needs_to_know(card):
    data = ModelCard.load(card).data
    assert data.license
    assert data.library_name in ("peft", "transformers")
    assert data.pipeline_tag
    assert data.tags


@by_card
def test_the_snippets_of_the_card_run(card, tmp_path):
    (tmp_path / "miniatures").symlink_to(ROOT / "miniatures")
    assert run_page(card, tmp_path) > 0


@by([card for card in CARDS if card not in ADAPTERS])
def test_the_folder_works_the_same_once_it_is_pushed(card, repo_id):
    HfApi().create_repo(repo_id)
    pushed = HfApi().upload_folder(repo_id=repo_id, folder_path=card.parent)
    trusted = {"trust_remote_code": True}
    auto_class = AUTO_CLASSES[ModelCard.load(card).data.pipeline_tag]
    here = auto_class.from_pretrained(card.parent, **trusted).eval()
    there = auto_class.from_pretrained(repo_id, revision=pushed.oid, **trusted).eval()
    inputs = AutoTokenizer.from_pretrained(repo_id, revision=pushed.oid, **trusted)("A test.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(here(**inputs).logits, there(**inputs).logits)


@by(ADAPTERS)
def test_the_adapter_works_the_same_once_it_is_pushed(card, repo_id, monkeypatch):
    monkeypatch.chdir(ROOT)  # the base model is a folder of this repository
    HfApi().create_repo(repo_id)
    pushed = HfApi().upload_folder(repo_id=repo_id, folder_path=card.parent)
    trusted = {"trust_remote_code": True, "dtype": "float32"}
    here = AutoPeftModelForCausalLM.from_pretrained(card.parent, **trusted).eval()
    there = AutoPeftModelForCausalLM.from_pretrained(repo_id, revision=pushed.oid, **trusted).eval()
    strengths = dict.fromkeys(here.peft_config["default"].concepts, 0.5)
    base = here.peft_config["default"].base_model_name_or_path
    inputs = AutoTokenizer.from_pretrained(base, trust_remote_code=True)("A test.", return_tensors="pt")
    with torch.no_grad():
        plain, steered = here(**inputs).logits, here(**inputs, steering=strengths).logits
        assert not torch.equal(plain, steered)
        assert torch.equal(steered, there(**inputs, steering=strengths).logits)
