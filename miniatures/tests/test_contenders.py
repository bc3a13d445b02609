"""T-FREE under the common measures: words, spans, escapes, and a softmax that is a distribution."""

import math

import pytest
import torch

from miniatures.tfree.contenders import Body, Hashing, TFreeContender, structural_widths
from miniatures.tfree.windows import Segment, Window

BODY = Body(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
)
HASHING = Hashing(hash_vocab_size=64, num_hashes=4, num_lowercase=1)
WORDS = ["the", "house", "The", "mouse", ".", "a", "is", "1", "("]
TEXT = "The house is  a mouse.\n\nthe cat is a(1"


def window(text, leads=True):
    return Window((Segment(text, False),), leads)


@pytest.fixture(scope="module", params=["dictionary_ce", "bce"])
def contender(request):
    tokenizer = pytest.importorskip("tfree_tokenizer").TFreeTokenizer(words=WORDS, ruleset="v2")
    torch.manual_seed(0)
    made = TFreeContender(tokenizer, BODY, HASHING, request.param)
    made.model.eval()
    made.prepare_scoring([window(TEXT)] * 2)
    return made


def test_units_are_words_with_their_places_in_the_text(contender):
    (scored,) = contender.score([window(TEXT)])
    pieces = [TEXT[start:end] for start, end in scored.spans]
    expected = ["The", "house", "is", "  ", "a", "mouse", ".", "\n\n", "the", "cat", "is", "a", "", "(", "1"]
    assert pieces == expected


def test_a_word_outside_the_dictionary_pays_escape_and_spelling_and_is_never_right(contender):
    (scored,) = contender.score([window(TEXT)])
    position = [TEXT[start:end] for start, end in scored.spans].index("cat")
    expected = -math.log2(contender.escape_probability) + contender.spelling.bits("cat")
    assert scored.bits[position] == pytest.approx(expected)
    assert not scored.right[position]
    assert contender.escape_probability == pytest.approx((2 + 0.5) / (2 * 16 + 1))


def test_the_first_words_of_a_text_have_probabilities_that_sum_to_one(contender):
    tokenizer = contender.tokenizer
    ids = [*range(tokenizer.first_byte_id), *range(tokenizer.first_word_id, len(tokenizer))]
    row = torch.tensor([[tokenizer.eos_token_id]])
    with torch.no_grad():
        log_probabilities = contender.model(row).logits[0, 0, ids].log_softmax(-1)
    kept = math.log2(1 - contender.escape_probability)
    for word in WORDS:
        (scored,) = contender.score([window(word)])
        share = log_probabilities[ids.index(tokenizer.first_word_id + WORDS.index(word))].item() / math.log(2)
        assert scored.bits[0] == pytest.approx(-share - kept, rel=1e-4)


def test_scores_do_not_depend_on_the_other_rows(contender):
    alone = contender.score([window("the cat is a mouse")])[0]
    beside = contender.score([window("the cat is a mouse"), window(TEXT)])[0]
    assert beside.bits == pytest.approx(alone.bits, rel=1e-4)


def test_batches_hold_end_of_text_ids_where_documents_end(contender):
    end = contender.tokenizer.eos_token_id
    both = Window((Segment("a house", True), Segment("a", False)), leads=True)
    batch = contender.batch([both, window("a", leads=False)])
    first = contender.tokenizer.first_word_id
    assert batch["input_ids"].tolist() == [[end, first + 5, first + 1, end, first + 5], [first + 5, end, end, end, end]]
    assert batch["labels"].tolist()[1] == [first + 5, -100, -100, -100, -100]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("ruleset", ["v1", "v2"])
def test_every_structural_word_has_a_width(ruleset):
    structural_words = pytest.importorskip("tfree_tokenizer").structural_words
    assert set(structural_widths(ruleset)) == set(structural_words(ruleset))
