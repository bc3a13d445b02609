"""AtMan as a method of inseq: the scores of `explain`, for inseq's own displays. Slow, as importing inseq is."""

import json
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from atman_explain import explain
from tests.support.atman import tiny_model
from tests.support.atman_tokenizers import byte_level, sentence_piece
from tests.support.processes import run_python

pytestmark = pytest.mark.slow

PROMPT, TEXT = "Oslo is the capital", "Oslo is the capital of Norway"


@pytest.fixture(scope="module")
def inseq() -> Any:
    module = pytest.importorskip("inseq")
    import atman_explain.integrations.inseq  # noqa: F401 (registers the method)

    return module


def loaded(inseq, tokenizer=None, **settings):
    tokenizer = tokenizer or byte_level()
    names = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    names["pad_token_id"] = tokenizer.eos_token_id
    model = tiny_model("llama", vocab_size=len(tokenizer), **names)
    return inseq.load_model(model, "atman", tokenizer=tokenizer, **settings)


def attribute(model, prompt=PROMPT, text=TEXT, **arguments):
    return model.attribute(prompt, text, show_progress=False, **arguments)


def expected(model, prompt=PROMPT, text=TEXT, **settings):
    """What `explain` finds for the ids that inseq uses, [P + M, M]."""
    ids, P = model.tokenizer(text)["input_ids"], len(model.tokenizer(prompt)["input_ids"])
    found = explain(model.model, model.tokenizer, ids[:P], target=ids[P:], attribute_target=True, **settings)
    return found.to_inseq().target_attributions.float()


def scores(output):
    (sequence,) = output.sequence_attributions
    return sequence.target_attributions


def test_scores_are_those_of_explain(inseq):
    model = loaded(inseq)
    output = attribute(model)
    (sequence,) = output.sequence_attributions
    exact = expected(model)
    assert sequence.target_attributions.nan_to_num(9.0).equal(exact.nan_to_num(9.0))
    assert exact[4, 1].abs() > 0.01  # the continuation's first token matters for its second
    assert [each.token for each in sequence.target] == ["Oslo", "Ġis", "Ġthe", "Ġcapital", "Ġof", "ĠNorway"]
    assert model.model.config._attn_implementation != "atman"
    assert output.info["attribution_method"] == "atman"


def test_special_tokens_of_the_prompt_have_no_score_unless_asked_for(inseq):
    model = loaded(inseq, sentence_piece())
    plain = scores(attribute(model, "the panda", "the panda eats"))
    assert plain[0].eq(0).all()
    assert plain.nan_to_num(9.0).equal(expected(model, "the panda", "the panda eats").nan_to_num(9.0))
    assert scores(attribute(model, "the panda", "the panda eats", include_special=True))[0].ne(0).all()


def test_settings_are_given_when_loading_or_for_one_call(inseq):
    model = loaded(inseq, factor=1.0)
    assert not scores(attribute(model)).nan_to_num().any()
    settings = {"factor": 0.3, "mode": "log_additive", "kappa": 0.2}
    exact = expected(model, **settings)
    output = attribute(model, **settings)
    assert scores(output).nan_to_num(9.0).equal(exact.nan_to_num(9.0))
    assert output.info["attribution_args"] == settings
    again = attribute(model, attribution_args={**settings, "batch_size": 1})
    torch.testing.assert_close(scores(again), exact, rtol=0.0, atol=1e-6, equal_nan=True)


def test_the_tokens_of_a_word_share_its_score(inseq):
    model = loaded(inseq, granularity="word")
    found = scores(attribute(model, "Oslo zq", "Oslo zq eats"))
    words = model.tokenizer("Oslo zq").word_ids()
    assert words.count(1) > 1
    assert len({found[column, 0].item() for column, word in enumerate(words) if word == 1}) == 1


def test_prompts_of_unlike_length_do_not_shift_each_other(inseq):
    model = loaded(inseq)
    prompts, texts = ["The", PROMPT], ["The capital of Sweden", TEXT]
    together = attribute(model, prompts, texts)
    for prompt, text, found in zip(prompts, texts, together.sequence_attributions, strict=True):
        alone = expected(model, prompt, text)
        assert found.target_attributions.nan_to_num(9.0).equal(alone.nan_to_num(9.0))
    generated = model.attribute(prompts, generation_args={"max_new_tokens": 3}, show_progress=False)
    assert [each.attr_pos_start for each in generated.sequence_attributions] == [1, 4]


def test_a_span_of_the_continuation_and_step_scores(inseq):
    model = loaded(inseq)
    whole, part = scores(attribute(model)), attribute(model, attr_pos_start=5, step_scores=["probability"])
    torch.testing.assert_close(scores(part)[:5, 0], whole[:5, 1], rtol=0.0, atol=1e-6)
    (sequence,) = part.sequence_attributions
    logprob = explain(model.model, model.tokenizer, PROMPT + " of", target=" Norway").baseline_logprobs
    torch.testing.assert_close(sequence.step_scores["probability"], logprob.exp())


def test_inseqs_displays_sums_and_files_work(inseq, tmp_path, capsys):
    output = attribute(loaded(inseq))
    assert "Norway" in output.show(display=False, return_html=True)
    merged = output.aggregate("spans", target_spans=[(0, 2)])
    torch.testing.assert_close(
        merged.sequence_attributions[0].target_attributions[0].abs(), scores(output)[:2].abs().amax(0)
    )
    output.save(tmp_path / "attribution.json")
    again = inseq.FeatureAttributionOutput.load(tmp_path / "attribution.json")
    assert scores(again).nan_to_num(9.0).equal(scores(output).nan_to_num(9.0))
    assert json.loads((tmp_path / "attribution.json").read_text())
    capsys.readouterr()


def test_encoder_decoders_have_scores_for_the_source(inseq):
    tokenizer = sentence_piece()
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": len(tokenizer), "d_model": 16}
    ids = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    torch.manual_seed(0)
    network = BartForConditionalGeneration(BartConfig(**sizes, **heads, **ids, init_std=0.5)).eval()
    model = inseq.load_model(network, "atman", tokenizer=tokenizer)
    output = attribute(model, "the panda", "it eats")
    (sequence,) = output.sequence_attributions
    target = tokenizer("it eats")["input_ids"]
    found = explain(network, tokenizer, "the panda", target=target)
    assert sequence.source_attributions.equal(found.to_inseq().target_attributions[: len(sequence.source)])
    assert [each.id for each in sequence.target] == [2, *target]
    assert found.scores.abs().min() > 0
    assert sequence.target_attributions is None
    with pytest.raises(ValueError, match="attribute_target must be False for AtMan with an encoder-decoder, got True"):
        attribute(model, "the panda", "it eats", attribute_target=True)


def test_refusals_name_the_argument(inseq):
    model = loaded(inseq)
    with pytest.raises(
        ValueError, match=r"attributed_fn must be left out for AtMan.*got logit_fn; pass delta=\"logit\""
    ):
        attribute(model, attributed_fn="logit")
    with pytest.raises(ValueError, match=r"mode must be one of .*'nope'"):
        attribute(model, mode="nope")
    with pytest.raises(ValueError, match="AtManConfig has no field factr"):
        attribute(model, attribution_args={"factr": 0.1})
    with pytest.raises(ValueError, match="AtManConfig has no field factr"):
        loaded(inseq, factr=0.1)
    with pytest.raises(ValueError, match="targets must be single tokens for inseq"):
        attribute(model, target_granularity="complete")


@pytest.mark.parametrize("order", ["import atman_explain, inseq", "import inseq, atman_explain"])
def test_inseq_knows_atman_in_whatever_order_things_are_imported(order):
    pytest.importorskip("inseq")
    run_python(f"{order}; assert 'atman' in inseq.list_feature_attribution_methods()")
