"""T-FREE through the Hub: what we push is complete, and a stranger without our packages can use it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tfree_tokenizer
from tests.support import audit
from tests.support.processes import PACKAGES, run_python
from tests.support.tfree import tiny_tfree

REPOSITORY = "user/tfree-tiny"
TOKENIZER_ONLY = "user/tfree-words"
TEXT = "the house is Donaudampfschiff,  small\n\tHaus Donaudampfschiff"

# One interpreter answers for all tests below, because starting one costs seconds.
STRANGER = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

repository, tokenizer_only, text, folder = sys.argv[1:]
answers = {}
trusted = {"trust_remote_code": True, "revision": "v1"}

for Auto in (AutoTokenizer, AutoModelForCausalLM):
    try:
        Auto.from_pretrained(repository, revision="v1", trust_remote_code=False)
        answers[Auto.__name__] = "loaded"
    except ValueError as error:
        answers[Auto.__name__] = str(error)

tokenizer = AutoTokenizer.from_pretrained(repository, **trusted)
model = AutoModelForCausalLM.from_pretrained(repository, **trusted).eval()
inputs = tokenizer(text, return_tensors="pt")
answers["ids"] = inputs.input_ids.tolist()
answers["text"] = tokenizer.decode(inputs.input_ids[0])
answers["generated"] = model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist()
(kernels,) = (module for name, module in sys.modules.items() if name.endswith(".kernels_tfree"))
answers["backend"] = kernels.BACKEND
answers["ours"] = sorted({"shared_kernels", "tfree_tokenizer"} & set(sys.modules))
with torch.no_grad():
    torch.save(model(inputs.input_ids).logits, Path(folder) / "logits.pt")

model.save_pretrained(Path(folder) / "again")
tokenizer.save_pretrained(Path(folder) / "again")
generator = pipeline("text-generation", model=repository, **trusted)
answers["pipeline"] = generator("the house", max_new_tokens=3, do_sample=False)[0]["generated_text"]
words = AutoTokenizer.from_pretrained(tokenizer_only, trust_remote_code=True)
answers["tokenizer only"] = words(text).input_ids
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Visit:
    """What a stranger found in the repository, and the objects that were pushed there."""

    answers: dict[str, Any]
    folder: Path
    model: Any
    tokenizer: Any
    inputs: Any


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    folder = tmp_path_factory.mktemp("stranger")
    model, tokenizer = tiny_tfree(seed=1)
    tokenizer.push_to_hub(TOKENIZER_ONLY)
    tokenizer.push_to_hub(REPOSITORY)
    model.push_to_hub(REPOSITORY)
    HfApi().create_tag(REPOSITORY, tag="v1")
    tiny_tfree(seed=2)[0].push_to_hub(REPOSITORY)
    printed = run_python(STRANGER, REPOSITORY, TOKENIZER_ONLY, TEXT, str(folder), hidden=PACKAGES)
    inputs = tokenizer(TEXT, return_tensors="pt")
    return Visit(json.loads(printed.splitlines()[-1]), folder, model, tokenizer, inputs)


def test_a_stranger_without_our_packages_gets_the_same_ids_and_text(visit):
    assert visit.answers["ours"] == []
    assert visit.answers["ids"] == visit.inputs.input_ids.tolist()
    assert visit.answers["text"] == TEXT


def test_the_revision_pins_the_weights_for_a_stranger(visit):
    with torch.no_grad():
        expected = visit.model(visit.inputs.input_ids).logits
    found = torch.load(visit.folder / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    generated = visit.model.generate(**visit.inputs, max_new_tokens=6, do_sample=False)
    assert visit.answers["generated"] == generated.tolist()


def test_the_text_generation_pipeline_needs_only_the_repository(visit):
    inputs = visit.tokenizer("the house", return_tensors="pt")
    generated = visit.model.generate(**inputs, max_new_tokens=3, do_sample=False)[0]
    assert visit.answers["pipeline"] == visit.tokenizer.decode(generated, skip_special_tokens=True)


@pytest.mark.parametrize("loader", ["AutoTokenizer", "AutoModelForCausalLM"])
def test_an_untrusted_load_is_refused_and_says_what_to_pass(visit, loader):
    assert "trust_remote_code" in visit.answers[loader]


def test_a_repository_may_hold_a_tokenizer_alone(visit):
    assert "config.json" not in HfApi().list_repo_files(TOKENIZER_ONLY)
    assert [visit.answers["tokenizer only"]] == visit.inputs.input_ids.tolist()


def test_saving_what_was_loaded_writes_the_same_code_and_tensors(visit):
    pushed, again = Path(snapshot_download(REPOSITORY, revision="v1")), visit.folder / "again"
    code = {path.name: path.read_bytes() for path in pushed.glob("*.py")}
    assert code.keys() >= {"configuration_tfree.py", "modeling_tfree.py", "tokenization_tfree.py", "kernels_tfree.py"}
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == code
    before, after = (load_file(folder / "model.safetensors") for folder in (pushed, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    words = "tfree_words.json"
    assert (again / words).read_bytes() == (pushed / words).read_bytes()


def test_the_repository_holds_only_code_json_safetensors_and_text(visit):
    suffixes = {Path(name).suffix for name in HfApi().list_repo_files(REPOSITORY)}
    assert suffixes <= {".py", ".json", ".safetensors", ".md", ".jinja"}


def test_kernels_are_used_where_they_are_installed_and_the_numbers_stay(visit):
    kernels = pytest.importorskip("shared_kernels")
    from tfree_tokenizer.remote.kernels_tfree import BACKEND

    assert visit.answers["backend"] == "torch"
    assert f"shared_kernels {kernels.__version__}" == BACKEND


def test_with_our_package_no_trust_is_needed(visit):
    tfree_tokenizer.register()
    model = AutoModelForCausalLM.from_pretrained(REPOSITORY, revision="v1").eval()
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY, revision="v1")
    assert type(model) is tfree_tokenizer.TFreeForCausalLM
    assert tokenizer(TEXT).input_ids == visit.answers["ids"][0]
    assert model.generate(**visit.inputs, max_new_tokens=6, do_sample=False).tolist() == visit.answers["generated"]


def test_loading_unpickles_nothing(visit):
    with audit.no_unpickling():
        AutoTokenizer.from_pretrained(REPOSITORY, revision="v1", trust_remote_code=True)
        AutoModelForCausalLM.from_pretrained(REPOSITORY, revision="v1", trust_remote_code=True)
