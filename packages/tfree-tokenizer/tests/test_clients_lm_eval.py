"""The evaluation harness reads a saved folder with its own code: choices, generation and perplexity on local tasks."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from tests.support.processes import PACKAGES, run_python
from tfree_tokenizer.remote.spelling_tfree import final_positions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"),
]

WORDS = ["Zwetschge", "Haus", "klein", "Żółć", "das"]
KNOWN = ["Haus", "klein", "das"]  # words of the dictionary

# What `lm_eval` does on the command line; here as a module so that our packages can be hidden from it.
HARNESS = """
import runpy, sys
sys.argv = ["lm_eval", *sys.argv[1:]]
runpy.run_module("lm_eval", run_name="__main__")
"""

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
doc_to_text: "{{{{prompt}}}}"
metadata:
  version: 1.0
"""
CHOICE = """
task: copy_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATION = """
task: copy_generation
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs:
  until: [" is", "\\n"]
  max_gen_toks: 20
  do_sample: false
metric_list:
  - metric: exact_match
"""
PERPLEXITY = """
task: copy_perplexity
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
"""


def write_tasks(folder: Path) -> None:
    rows = [
        {
            "prompt": f"the {word} is small",
            "answer": word,
            "choices": WORDS,
            "text": f"the {word} is small {word}",
        }
        for word in WORDS
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    known = [row for row in rows if row["answer"] in KNOWN]
    (folder / "known.jsonl").write_text("\n".join(json.dumps(row) for row in known))
    for name, data, task in [
        ("choice", "rows", CHOICE),
        ("generation", "rows", GENERATION),
        ("perplexity", "known", PERPLEXITY),
    ]:
        head = COMMON.format(data=folder / f"{data}.jsonl")
        if name == "perplexity":
            head = head.replace('"{{prompt}}"', '""')
        (folder / f"{name}.yaml").write_text(head + task)


@pytest.fixture(scope="module")
def results(copier, tmp_path_factory):
    """The harness's own result file for all three tasks."""
    folder = tmp_path_factory.mktemp("harness")
    copier.model.save_pretrained(folder / "model")
    copier.tokenizer.save_pretrained(folder / "model")
    write_tasks(folder)
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={folder / 'model'},trust_remote_code=True",
        "--tasks": "copy_choice,copy_generation,copy_perplexity",
        "--include_path": str(folder),
        "--batch_size": "3",
        "--device": "cpu",
        "--output_path": str(folder / "out.json"),
    }
    arguments = [text for option in options.items() for text in option]
    run_python(HARNESS, *arguments, "--log_samples", hidden=PACKAGES, cwd=folder, timeout=800)
    (report,) = folder.glob("out*.json")
    samples = {
        name: [json.loads(line) for line in next(folder.glob(f"samples_copy_{name}*.jsonl")).read_text().splitlines()]
        for name in ("choice", "generation")
    }
    return json.loads(report.read_text())["results"], samples


def test_the_most_likely_choice_is_the_copied_word(results):
    assert results[0]["copy_choice"]["acc,none"] == 1.0


def test_its_log_likelihoods_are_those_of_the_model(results, copier):
    for sample in results[1]["choice"]:
        prompt, found = sample["doc"]["prompt"], [float(value[0]) for value in sample["filtered_resps"]]
        for word, value in zip(WORDS, found, strict=True):
            ids = copier.ids(f"{prompt} {word}")["input_ids"]
            words = final_positions(ids, copier.tokenizer.first_byte_id)[0].nonzero().squeeze(1)
            with torch.no_grad():
                logits = copier.model(ids[:, :-1]).logits[0, words[-2] :].log_softmax(1)
            expected = logits.gather(1, ids[0, words[-2] + 1 :, None]).sum().item()
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_generated_answers_are_the_copied_words(results):
    assert results[0]["copy_generation"]["exact_match,none"] == 1.0


def test_perplexity_of_a_text_is_that_of_its_words_after_the_end_token(results, copier):
    total = 0.0
    for word in KNOWN:
        ids = copier.ids(f"the {word} is small {word}")["input_ids"]
        total += copier.model.score(torch.nn.functional.pad(ids, (1, 0), value=0)).sum().item()
    found = results[0]["copy_perplexity"]["word_perplexity,none"]
    assert found == pytest.approx(math.exp(-total / (5 * len(KNOWN))), rel=1e-3)
