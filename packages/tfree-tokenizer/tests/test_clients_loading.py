"""Saved folders: dtype and device arguments, and a process that does not have our packages."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.support.processes import PACKAGES, run_python

TEXT = "das Donaudampfschiff\n  ist klein, the Zwetschge"

# Loads the folder, saves it again elsewhere, and tells what it saw.
STRANGER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, again, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu")
inputs = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
torch.save(logits, folder + "/logits.pt")
tokenizer.save_pretrained(again)
model.save_pretrained(again)
generated = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
print(json.dumps({
    "ids": inputs.input_ids.tolist(),
    "generated": generated.tolist(),
    "text": tokenizer.decode(inputs.input_ids[0]),
    "ours": sorted({"shared_kernels", "tfree_tokenizer"} & set(sys.modules)),
}))
"""


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "saved")
    tiny.tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.slow
def test_a_process_without_our_packages_loads_saves_and_loads_again(tiny, folder, tmp_path):
    answers, logits = [], []
    chain = [folder, tmp_path / "again", tmp_path / "third"]
    for source, target in itertools.pairwise(chain):
        printed = run_python(STRANGER, str(source), str(target), TEXT, hidden=PACKAGES, timeout=600)
        answers.append(json.loads(printed.splitlines()[-1]))
        logits.append(torch.load(source / "logits.pt", weights_only=True))
    assert answers[0] == answers[1]
    assert torch.equal(*logits)
    assert answers[0]["ours"] == []
    assert answers[0]["text"] == TEXT
    assert answers[0]["generated"][0][len(answers[0]["ids"][0]) :] == tiny.generate(TEXT)[0]
    states = [load_file(each / "model.safetensors") for each in chain]
    assert all(torch.equal(values, states[2][name]) for name, values in states[0].items())


@pytest.mark.parametrize("trust", [True, False], ids=["remote code", "installed package"])
def test_loading_gives_the_same_logits_and_ids(tiny, folder, trust):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert tokenizer(TEXT)["input_ids"] == tiny.tokenizer(TEXT)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(**tiny.ids(TEXT)).logits, tiny.model(**tiny.ids(TEXT)).logits)


@pytest.mark.parametrize(
    "options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}], ids=str
)
def test_a_device_map_on_the_cpu_changes_nothing(tiny, folder, options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        assert torch.equal(model(**tiny.ids(TEXT)).logits, tiny.model(**tiny.ids(TEXT)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loading_in_another_dtype_leaves_the_dictionary_integer(tiny, folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored, expected = (each.model.embed_tokens.dictionary.get().tensors() for each in (model, tiny.model))
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(stored, expected, strict=True))
    assert bool(torch.isfinite(model(**tiny.ids(TEXT)).logits).all())
    assert model.generate(**tiny.ids(TEXT), max_new_tokens=3).shape[0] == 1


def test_dtype_auto_takes_the_saved_dtype(tiny, tmp_path):
    tiny.model.bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_loading_reports_nothing_missing_and_nothing_left_over(folder):
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_the_body_and_a_classifier_load_from_a_language_model(tiny, folder):
    body = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = tiny.model.model(**tiny.ids(TEXT)).last_hidden_state
        assert torch.equal(body(**tiny.ids(TEXT)).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    assert classifier(**tiny.ids(TEXT)).logits.shape == (1, 4)


def test_shards_and_a_second_save_keep_every_tensor(tiny, folder, tmp_path):
    tiny.model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    expected = tiny.model.state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in model.state_dict().items())
