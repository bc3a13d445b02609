"""AtMan as an algorithm of captum: the scores of `explain`, laid out as the ids that were given."""

import pytest
import torch

from atman_explain import explain
from tests.support.atman import padded, tiny_model
from tests.support.atman_tokenizers import byte_level, sentence_piece

attr = pytest.importorskip("captum.attr")

from atman_explain.integrations.captum import AtManAttribution  # noqa: E402 (captum may be missing)

ROWS = ((3, 17, 5, 9, 28), (11, 4, 33))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def expected(model, rows, targets, side="right", **settings):
    """What `explain` finds row by row, [B, P]."""
    length = max(len(row) for row in rows)
    result = torch.zeros(len(rows), length, dtype=torch.float64)
    for b, (row, target) in enumerate(zip(rows, targets, strict=True)):
        start = length - len(row) if side == "left" else 0
        result[b, start : start + len(row)] = explain(model, None, row, target=target, **settings).scores.sum(0)
    return result


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_explain_and_padding_has_none(model, side):
    batch = padded(*ROWS, side=side)
    atman = AtManAttribution(model)
    scores = atman.attribute(batch["input_ids"], target=7, additional_forward_args=batch["attention_mask"])
    assert isinstance(atman, attr.PerturbationAttribution)
    assert scores.shape == batch["input_ids"].shape
    torch.testing.assert_close(scores, expected(model, ROWS, [[7], [7]], side), rtol=0.0, atol=1e-10)
    assert (scores != 0).equal(batch["attention_mask"].bool())


def test_targets_may_differ_by_row_and_continuations_are_summed(model):
    ids = torch.tensor([ROWS[0], ROWS[0]], dtype=torch.int32)
    atman = AtManAttribution(model)
    by_row = expected(model, [ROWS[0]] * 2, [[7], [8]])
    for target in (torch.tensor([7, 8]), [7, 8], torch.tensor([[7], [8]])):
        torch.testing.assert_close(atman.attribute(ids, target=target), by_row, rtol=0.0, atol=1e-10)
    longer = expected(model, [ROWS[0]] * 2, [[7, 2, 19], [8, 1, 1]])
    scores = atman.attribute(ids, target=torch.tensor([[7, 2, 19], [8, 1, 1]]))
    torch.testing.assert_close(scores, longer, rtol=0.0, atol=1e-10)
    scores = atman.attribute(ids, target=torch.tensor([7]))
    torch.testing.assert_close(scores, expected(model, [ROWS[0]] * 2, [[7], [7]]), rtol=0.0, atol=1e-10)


def test_without_a_target_the_next_token_is_generated(model):
    scores = AtManAttribution(model).attribute(torch.tensor([ROWS[0]]))
    torch.testing.assert_close(scores, explain(model, None, ROWS[0]).scores, rtol=0.0, atol=1e-10)


def test_a_tuple_is_answered_by_a_tuple(model):
    batch = padded(*ROWS, side="left")
    atman = AtManAttribution(model)
    (scores,) = atman.attribute((batch["input_ids"],), 7, (batch["attention_mask"],))
    assert scores.equal(atman.attribute(batch["input_ids"], 7, batch["attention_mask"]))
    (scores,) = atman.attribute((torch.tensor([ROWS[0]]),), 7, (None,))
    assert scores.equal(atman.attribute(torch.tensor([ROWS[0]]), 7))


def test_settings_hold_for_all_calls_or_for_one(model):
    ids = torch.tensor([ROWS[0]])
    atman = AtManAttribution(model, factor=1.0)
    assert not atman.attribute(ids, target=7).any()
    squared = expected(model, [ROWS[0]], [[7, 2]], factor=0.3, postprocess="square")
    scores = atman.attribute(ids, target=[[7, 2]], factor=0.3, postprocess="square")
    torch.testing.assert_close(scores, squared, rtol=0.0, atol=1e-10)
    with pytest.raises(ValueError, match="AtManConfig has no field factr"):
        AtManAttribution(model, factr=0.3)


def test_the_tokens_of_a_word_share_its_score():
    tokenizer = byte_level()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ids = tokenizer("Oslo zq eats", return_tensors="pt")["input_ids"]
    words = tokenizer("Oslo zq eats").word_ids()
    assert len(set(words)) < len(words)
    scores = AtManAttribution(model, tokenizer, granularity="word").attribute(ids, target=7)
    explanation = explain(model, tokenizer, "Oslo zq eats", target=[7], granularity="word")
    assert scores[0].tolist() == [explanation.scores[0, word].item() for word in words]


def test_special_tokens_have_no_score_if_a_processor_knows_them():
    tokenizer = sentence_piece()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ids = tokenizer("the capital", return_tensors="pt")["input_ids"]
    scores = AtManAttribution(model, tokenizer).attribute(ids, target=300)
    assert scores[0, 0] == 0
    assert scores[0, 1:].all()
    assert AtManAttribution(model).attribute(ids, target=300).all()
    assert AtManAttribution(model, tokenizer, include_special=True).attribute(ids, target=300).all()


IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        pytest.param(
            torch.rand(2, 3),
            {},
            r"inputs must be a tensor \[B, P\] of token ids, .* got a torch.float32 tensor of the shape \[2, 3\]",
            id="embeddings",
        ),
        pytest.param(IDS[0], {}, r"inputs must be .* tensor of the shape \[3\]", id="one-row"),
        pytest.param((IDS, IDS), {}, "inputs must be .* got a tuple of 2", id="two-inputs"),
        pytest.param(IDS[:, :0], {}, r"inputs must be .* of the shape \[2, 0\]", id="empty"),
        pytest.param(
            IDS,
            {"additional_forward_args": torch.ones(2, 4)},
            r"additional_forward_args must be an attention mask of the shape \[2, 3\] .* of the shape \[2, 4\]",
            id="mask-of-another-shape",
        ),
        pytest.param(
            IDS,
            {"additional_forward_args": (torch.ones(2, 3), torch.ones(2, 3))},
            "additional_forward_args must be an attention mask .* or a tuple of it alone, got a tuple of 2",
            id="more-forward-arguments",
        ),
        pytest.param(IDS, {"target": 0.5}, "target must be a token id, .* got 0.5", id="target-not-an-id"),
        pytest.param(IDS, {"target": [[1], [2, 3]]}, "target must be a token id, .* got .*2, 3", id="ragged-target"),
        pytest.param(
            IDS,
            {"target": torch.tensor([1, 2, 3])},
            r"target must have a row for each of the 2 rows of inputs, got a torch.int64 tensor of the shape \[3\]",
            id="target-of-another-batch",
        ),
        pytest.param(
            IDS, {"target": 1, "attribute_target": True}, "attribute_target must be False for captum", id="target-units"
        ),
    ],
)
def test_errors_name_the_argument_and_what_arrived(model, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        AtManAttribution(model).attribute(inputs, **arguments)
