"""SCAR through the Hub: an adapter arrives in one commit with a card whose code runs; an export steers alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import scar_peft
from scar_peft.card import MARK, model_card, write_card
from scar_peft.export import export_remote_code
from scar_peft.hub import push_to_hub, register_push, save_with_card
from tests.support import audit
from tests.support.atman_tokenizers import byte_level
from tests.support.processes import PACKAGES, run_python
from tests.support.snippets import run_page, snippets

BASE = "user/tiny-base"
EXPORTED = "user/steers-itself"
HIDDEN = {*PACKAGES, "scar_peft", "peft"}
IDS = torch.tensor([[40, 50, 60, 70]])
METRICS = {
    "data": "64 held-out lines",
    "nmse": 0.0123,
    "concepts": {"rude": {"auroc": 0.987, "f1": 0.9, "token_auroc": float("nan"), "positive_texts": 32}},
    "steering": [
        {"concept": "rude", "rule": "scale", "strength": -1.0, "share of rude texts": 0.125, "perplexity": 12.5},
        {"concept": "rude", "rule": "scale", "strength": 0.0, "share of rude texts": 0.75, "perplexity": 10.0},
    ],
}


@pytest.fixture(scope="module", autouse=True)
def base() -> None:
    """The language model on the Hub that adapters are for."""
    torch.manual_seed(0)
    tokenizer = byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).push_to_hub(BASE)
    tokenizer.push_to_hub(BASE)


def adapted(adapter_name: str = "default", **fields: object) -> PeftModel:
    values = {"layers": [1], "site": "block", "concepts": ["rude", "formal"], "n_latents": 24, "k": 4}
    config = scar_peft.ScarConfig(task_type="CAUSAL_LM", **values | fields)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config, adapter_name=adapter_name).eval()


def first_block(text: str, folder: Path) -> None:
    page = folder / "first.md"
    page.write_text(f"```python\n{snippets(text)[0].code}```\n")
    run_page(page, folder)


def pushed_card(repo_id: str, **options: str) -> ModelCard:
    return ModelCard.load(hf_hub_download(repo_id, "README.md", **options))


def test_the_first_block_of_a_pushed_card_names_the_package_and_runs(repo_id, tmp_path, capsys):
    push_to_hub(adapted(), repo_id)
    text = pushed_card(repo_id).text
    code = snippets(text)[0].code
    assert code.startswith("# pip install scar-peft\nimport scar_peft")
    assert f'PeftModel.from_pretrained(base, "{repo_id}")' in code
    first_block(text, tmp_path)
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_all_blocks_of_a_pushed_card_run(repo_id, tmp_path):
    push_to_hub(adapted(), repo_id)
    assert run_page(Path(hf_hub_download(repo_id, "README.md")), tmp_path) == 2


def test_what_is_pushed_is_one_commit_without_anything_that_could_be_code(repo_id):
    found = push_to_hub(adapted(), repo_id, commit_message="An adapter")
    commits = HfApi().list_repo_commits(repo_id)
    assert (commits[0].commit_id, commits[0].title) == (found.oid, "An adapter")
    names = set(HfApi().list_repo_files(repo_id)) - {".gitattributes"}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_the_pushed_adapter_steers_as_the_one_it_was(repo_id):
    model = adapted()
    push_to_hub(model, repo_id)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo_id).eval()
    with torch.no_grad():
        wanted, found = (each(IDS, steering={"rude": -1.0}).logits for each in (model, again))
        assert not torch.equal(wanted, model(IDS).logits)
    assert torch.equal(found, wanted)


def test_the_card_tells_the_hub_what_the_adapter_is_and_how_good(repo_id):
    push_to_hub(adapted(metrics=METRICS, license="cc-by-nc-sa-4.0", label_source="hand-made"), repo_id)
    card = pushed_card(repo_id)
    data = card.data
    assert set(data.tags) >= {"scar", "sparse-autoencoder", "steering"}
    assert (data.library_name, data.base_model, data.license) == ("peft", BASE, "cc-by-nc-sa-4.0")
    assert data.pipeline_tag == "text-generation"
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [("roc_auc", 0.987), ("f1", 0.9)]
    assert data.eval_results[0].dataset_name == "64 held-out lines"
    assert "- **Labels**: hand-made." in card.text
    assert "- **Licence**: cc-by-nc-sa-4.0;" in card.text


def test_the_card_shows_thresholds_metrics_and_the_steering_curve():
    calibration = {"rude": {"threshold": 1.5, "mean_positive": 3.0}, "formal": {"threshold": 0.25}}
    config = scar_peft.ScarConfig(layers=[1], concepts=["rude", "formal"], metrics=METRICS, calibration=calibration)
    text = model_card(config, "user/x", title="Manners").text
    assert "# Manners" in text
    assert "| concept | latent | threshold | AUROC | F1 |" in text
    assert "| rude | 0 | 1.5 | 0.987 | 0.9 |" in text
    assert "| formal | 1 | 0.25 |  |  |" in text
    assert "| reconstruction error (nmse) | 0.0123 |" in text
    assert "| concept | rule | strength | share of rude texts | perplexity |" in text
    assert "| rude | scale | -1 | 0.125 | 12.5 |" in text
    assert "Measured on 64 held-out lines." in text


def test_a_named_adapter_is_loaded_from_its_folder(repo_id, tmp_path):
    push_to_hub(adapted("manners"), repo_id)
    text = pushed_card(repo_id).text
    assert 'subfolder="manners"' in text
    first_block(text, tmp_path)


def test_push_to_hub_of_the_peft_model_writes_the_same_card(repo_id, tmp_path):
    register_push()
    model = adapted()
    model.push_to_hub(repo_id, private=True, commit_message="As usual", tags=["manners"], max_shard_size="1GB")
    assert HfApi().list_repo_commits(repo_id)[0].title == "As usual"
    card = pushed_card(repo_id)
    assert MARK in card.text
    assert {"manners", "scar"} <= set(card.data.tags)
    first_block(card.text, tmp_path)


def test_other_adapters_are_pushed_as_ever(repo_id):
    register_push()
    base = AutoModelForCausalLM.from_pretrained(BASE)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).push_to_hub(repo_id)
    assert PeftConfig.from_pretrained(repo_id).peft_type == "LORA"
    assert MARK not in pushed_card(repo_id).text


def test_a_revision_is_made_and_the_main_branch_stays(repo_id):
    push_to_hub(adapted(), repo_id, revision="v2")
    assert MARK in pushed_card(repo_id, revision="v2").text
    assert "README.md" not in HfApi().list_repo_files(repo_id)


def test_a_card_that_somebody_edited_keeps_its_text(tmp_path):
    model = adapted()
    save_with_card(model, tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(MARK, "My own words."))
    save_with_card(model, tmp_path)
    card = ModelCard.load(path)
    assert "My own words." in card.text
    assert {"scar", "steering"} <= set(card.data.tags)


def test_a_card_of_ours_is_renewed(tmp_path):
    model = adapted()
    save_with_card(model, tmp_path)
    model.peft_config["default"].metrics = METRICS
    save_with_card(model, tmp_path, "user/renewed")
    assert "# renewed" in (tmp_path / "README.md").read_text()
    assert "0.987" in (tmp_path / "README.md").read_text()


def test_a_saved_folder_is_where_its_card_loads_from(tmp_path, monkeypatch):
    save_with_card(adapted(), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run_page(tmp_path / "README.md", tmp_path) == 2


def test_the_card_of_a_classifier_has_no_generation(tmp_path):
    config = scar_peft.ScarConfig(layers=[1], concepts=["rude"], task_type="SEQ_CLS")
    write_card(config, tmp_path, "user/x", trust_remote_code=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(" in card.text
    assert "trust_remote_code=True" in card.text
    assert "generate" not in snippets(card.text)[0].code


def test_a_model_without_scar_adapter_is_refused(tmp_path):
    model = SimpleNamespace(peft_config={"default": LoraConfig()})
    with pytest.raises(ValueError, match=r"model must have a SCAR adapter, got adapters \['default'\] of other types"):
        save_with_card(model, tmp_path)


# One interpreter answers for the tests below, because starting one costs seconds.
STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

repository, folder, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
answers, trusted = {}, {"trust_remote_code": True, "revision": "v1"}
tokenizer = AutoTokenizer.from_pretrained(repository, revision="v1")
for name, place, options in (("hub", repository, trusted), ("folder", folder, {"trust_remote_code": True})):
    model = AutoModelForCausalLM.from_pretrained(place, **options).eval()
    with torch.no_grad():
        plain = model(ids).logits
        with model.steering(rude=1.5, rule="add"), model.record_scores() as record:
            steered = model(ids).logits
        model.set_steering("formal", -1.0)
        held = model(ids).logits
        model.set_steering(None)
    written = model.generate(ids, max_new_tokens=4, do_sample=False, steering={"rude": 1.5}, return_concept_scores=True)
    answers[name] = {
        "plain": plain.tolist(), "steered": steered.tolist(), "held": held.tolist(),
        "scores": record.scores["rude"].tolist(),
        "written": written.sequences.tolist(), "written scores": written.concept_scores["rude"].tolist(),
    }
(kernels,) = {module.BACKEND for name, module in sys.modules.items() if name.endswith(".kernels_scar")}
answers["backend"] = kernels
answers["ours"] = sorted({"shared_kernels", "scar_peft", "peft"} & set(sys.modules))
model.save_pretrained("again")
pipe = pipeline("text-generation", model=repository, **trusted)
answers["pipeline"] = pipe("Oslo", max_new_tokens=3, do_sample=False)[0]["generated_text"]
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Visit:
    """What a stranger found in the exported model, and the adapter that it was made of."""

    answers: dict[str, Any]
    folder: Path
    model: PeftModel


@pytest.fixture(scope="module")
def visit(base, tmp_path_factory) -> Visit:
    folder = tmp_path_factory.mktemp("stranger")
    model = adapted(license="apache-2.0")
    export_remote_code(model, folder / "exported", tokenizer=byte_level(), repo_id=EXPORTED)
    HfApi().create_repo(EXPORTED)
    HfApi().upload_folder(repo_id=EXPORTED, folder_path=folder / "exported")
    HfApi().create_tag(EXPORTED, tag="v1")
    arguments = EXPORTED, str(folder / "exported"), json.dumps(IDS.tolist())
    printed = run_python(STRANGER, *arguments, hidden=sorted(HIDDEN), cwd=folder)
    return Visit(json.loads(printed.splitlines()[-1]), folder, model)


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_stranger_without_our_packages_and_peft_steers_like_the_adapter(visit, place):
    assert visit.answers["ours"] == []
    assert visit.answers["backend"] == "torch"
    found = {name: torch.tensor(values) for name, values in visit.answers[place].items()}
    with torch.no_grad(), scar_peft.record_scores(visit.model) as record:
        wanted = {"steered": visit.model(IDS, steering={"rude": 1.5}, rule="add").logits}
    with torch.no_grad():
        wanted["plain"] = visit.model(IDS).logits
        wanted["held"] = visit.model(IDS, steering={"formal": -1.0}).logits
    wanted["scores"] = record.scores["rude"]
    request = {"steering": {"rude": 1.5}, "return_concept_scores": True}
    written = visit.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, **request)
    wanted |= {"written": written.sequences, "written scores": written.concept_scores["rude"]}
    assert not torch.equal(wanted["plain"], wanted["steered"])
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5, msg=name)


def test_a_strangers_pipeline_needs_only_the_repository(visit):
    assert visit.answers["pipeline"].startswith("Oslo")


def test_what_a_stranger_saves_has_the_same_code_and_tensors(visit):
    pushed, again = Path(snapshot_download(EXPORTED, revision="v1")), visit.folder / "again"
    code = {path.name: path.read_bytes() for path in pushed.glob("*.py")}
    assert {"modeling_scar.py", "steering_scar.py", "ops_scar_scar_steer.py"} <= code.keys()
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == code
    assert (again / "model.safetensors").read_bytes() == (pushed / "model.safetensors").read_bytes()


def test_the_exported_repository_holds_only_code_json_safetensors_and_text(visit):
    suffixes = {Path(name).suffix for name in HfApi().list_repo_files(EXPORTED)} - {""}
    assert suffixes <= {".py", ".json", ".safetensors", ".md", ".jinja"}


def test_the_exported_models_card_runs(visit, tmp_path):
    page = Path(hf_hub_download(EXPORTED, "README.md"))
    assert ModelCard.load(page).data.library_name == "transformers"
    assert "custom_code" in ModelCard.load(page).data.tags
    assert run_page(page, tmp_path) == 2


def test_nothing_is_unpickled_on_loading(visit, repo_id):
    push_to_hub(adapted(), repo_id)
    with audit.no_unpickling():
        AutoModelForCausalLM.from_pretrained(EXPORTED, trust_remote_code=True, revision="v1")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), repo_id)
