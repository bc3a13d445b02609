"""The model cards of the committed miniatures: complete, and what they show works."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from tests.support.snippets import run_page
from tests.support.tree import ROOT

CARDS = sorted(ROOT.glob("miniatures/*/checkpoint/README.md"))
AUTO_CLASSES = {"text-generation": AutoModelForCausalLM, "image-text-to-text": AutoModelForImageTextToText}

by_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.parent.name)


@by_card
def test_the_card_says_what_the_hub_needs_to_know(card):
    data = ModelCard.load(card).data
    assert data.license
    assert data.library_name == "transformers"
    assert data.pipeline_tag
    assert data.tags


@by_card
def test_the_snippets_of_the_card_run(card, tmp_path):
    (tmp_path / "miniatures").symlink_to(ROOT / "miniatures")
    assert run_page(card, tmp_path) > 0


@by_card
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
