"""`pipeline("explain")` as users of transformers call it."""

import pytest
import torch
from transformers import pipeline

import atman_explain  # noqa: F401 (registers the task)
from atman_explain import ExplainPipeline, Explanation, explain
from tests.support.atman import tiny_model
from tests.support.atman_tokenizers import byte_level
from tests.support.vlm import llava

TEXT, TARGET = "Oslo is the capital of", " Norway"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer)).float()


@pytest.fixture(scope="module")
def pipe(model, tokenizer):
    return pipeline("explain", model=model, tokenizer=tokenizer)


def test_the_task_is_known_and_gives_what_explain_gives(pipe, model, tokenizer):
    assert isinstance(pipe, ExplainPipeline)
    found = pipe(TEXT, target=TARGET, granularity="word")
    wanted = explain(model, tokenizer, TEXT, target=TARGET, granularity="word")
    assert isinstance(found, Explanation)
    torch.testing.assert_close(found.scores, wanted.scores)
    assert [unit.text.strip() for unit in found.units] == ["Oslo", "is", "the", "capital", "of"]


def test_a_list_of_prompts_gives_a_list(pipe):
    one, two = pipe([TEXT, "The capital of"], target=[TARGET, " Sweden"])
    torch.testing.assert_close(one.scores, pipe(TEXT, target=TARGET).scores, atol=1e-5, rtol=1e-5)
    assert two.prompt == "The capital of"


def test_data_sets_are_streamed(pipe):
    rows = [{"prompt": TEXT, "target": TARGET}, {"prompt": "The capital of", "target": " Sweden"}]
    found = list(pipe((row for row in rows), granularity="word", batch_size=2))
    assert [each.prompt for each in found] == [TEXT, "The capital of"]
    assert [len(each.units) for each in found] == [5, 3]
    assert [each.prompt for each in pipe(rows)] == [TEXT, "The capital of"]


def test_a_prompt_without_target_is_continued(pipe):
    assert len(pipe(TEXT, max_new_tokens=2).targets) in (1, 2)


def test_bad_input_is_named(pipe):
    with pytest.raises(ValueError, match=r'inputs must be prompts, or dicts with a "prompt", got dict'):
        pipe([{"text": TEXT}])
    with pytest.raises(ValueError, match="granularity must be one of"):
        pipe(TEXT, target=TARGET, granularity="letter")
    with pytest.raises(ValueError, match=r"AtManConfig has no field granularty"):
        pipe(TEXT, target=TARGET, granularty="word")


def test_a_saved_pipeline_has_its_processor_and_its_code(tmp_path):
    vlm = llava(torch.float32)
    pipeline("explain", model=vlm.model, processor=vlm.processor).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "tokenizer.json", "model.safetensors", "pipeline_atman.py"} <= names
