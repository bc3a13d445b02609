"""`pipeline("explain")` through the Hub: what a pipeline pushes is complete, and a stranger can use it."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from transformers import pipeline

from atman_explain import ExplainPipeline, explain
from tests.support.atman import tiny_model
from tests.support.atman_tokenizers import byte_level
from tests.support.processes import PACKAGES, run_python

REPOSITORY = "user/explains-itself"
TEXT, TARGET = "Oslo is the capital of", " Norway"
STRANGER = """
import json, sys
from transformers import pipeline

repository, text, target = sys.argv[1:]
answers = {}
try:
    pipeline("explain", model=repository, trust_remote_code=False)
except (KeyError, ValueError) as error:
    answers["untrusted"] = type(error).__name__
pipe = pipeline("explain", model=repository, trust_remote_code=True, revision="v1")
found = pipe(text, target=target, granularity="word")
answers["scores"] = found.scores.tolist()
answers["html"] = found._repr_html_()[:20]
(kernels,) = (module for name, module in sys.modules.items() if name.endswith(".kernels_atman"))
answers["backend"] = kernels.BACKEND
answers["ours"] = sorted({"shared_kernels", "atman_explain"} & set(sys.modules))
pipe.save_pretrained(sys.argv[1].replace("/", "-"))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def pushed():
    tokenizer = byte_level()
    model = tiny_model("llama", vocab_size=len(tokenizer)).float()
    pipe = pipeline("explain", model=model, tokenizer=tokenizer)
    pipe.push_to_hub(REPOSITORY)
    HfApi().create_tag(REPOSITORY, tag="v1")
    return model, tokenizer


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stranger_explains_with_the_code_of_the_repository(pushed, tmp_path):
    model, tokenizer = pushed
    answers = json.loads(run_python(STRANGER, REPOSITORY, TEXT, TARGET, hidden=PACKAGES, cwd=tmp_path, timeout=300))
    wanted = explain(model, tokenizer, TEXT, target=TARGET, granularity="word")
    torch.testing.assert_close(torch.tensor(answers["scores"]), wanted.scores, atol=1e-5, rtol=1e-4)
    assert answers["untrusted"] in ("KeyError", "ValueError")
    assert answers["html"].startswith("<")
    assert answers["backend"] == "torch"
    assert answers["ours"] == []
    again = sorted(path.name for path in (tmp_path / REPOSITORY.replace("/", "-")).glob("*_atman.py"))
    assert again == sorted(name for name in HfApi().list_repo_files(REPOSITORY) if name.endswith("_atman.py"))


def test_the_repository_lists_the_task_and_all_its_code(pushed):
    files = HfApi().list_repo_files(REPOSITORY)
    assert {"config.json", "model.safetensors", "tokenizer.json", "pipeline_atman.py", "hook_atman.py"} <= set(files)


def test_with_the_package_no_code_of_the_repository_has_to_run(pushed):
    found = pipeline("explain", model=REPOSITORY, pipeline_class=ExplainPipeline)
    assert type(found) is ExplainPipeline
    assert found(TEXT, target=TARGET, granularity="word").targets[0].text == TARGET
