"""Which ids form a word, where it stands, and how context words are offered byte by byte."""

import math

import pytest
import torch

from tfree_tokenizer import HashSpec, build_factored_dictionary
from tfree_tokenizer.remote.spelling_tfree import byte_ids, copy_logits, final_positions, find_words, word_positions

FIRST = 3  # byte ids 3 .. 514, then words
SPEC = HashSpec(hash_vocab_size=64, num_hashes=4)
FLOOR = torch.finfo(torch.float32).min


@pytest.fixture
def dictionary():
    words = ["<|a|>", "<|b|>", "<|c|>", *[None] * 256, *[bytes([b]) for b in range(256)], "house", "tree"]
    return build_factored_dictionary(words, SPEC, {0, 1, 2})


def spell(text):
    return byte_ids(text.encode(), FIRST)


def test_a_spelled_word_is_one_position_at_its_last_id(dictionary):
    ids = torch.tensor([[515, *spell("new"), 516]])
    words = find_words(ids, dictionary, SPEC, FIRST)
    assert words.is_final.tolist() == [[True, False, False, True, True]]
    assert words.word[0, 0] == words.word[0, 1] == words.word[0, 2]
    assert [(s.row, s.last, s.data) for s in words.spelled] == [(0, 3, b"new")]
    assert word_positions(words.is_final).tolist() == [[0, 0, 0, 1, 2]]


def test_a_spelled_word_has_the_pattern_of_the_dictionary_word(dictionary):
    words = find_words(torch.tensor([[515, *spell("house")]]), dictionary, SPEC, FIRST)
    pointer, active = words.dictionary.active_rows()
    first, last = words.word[0, 0], words.word[0, -1]
    assert first != last
    assert active[pointer[first] : pointer[first + 1]].tolist() == active[pointer[last] : pointer[last + 1]].tolist()


def test_bytes_without_an_end_and_leading_bytes_are_no_words(dictionary):
    ids = torch.tensor([[*spell("ab")[:1], 515, *spell("cd")[:1]]])
    words = find_words(ids, dictionary, SPEC, FIRST)
    empty = len(words.dictionary) - 1
    assert words.word[0, 0] == empty
    assert words.word[0, 2] == words.word[0, 1] != empty
    assert words.spelled == ()


def test_packed_documents_restart_their_numbering():
    counted = torch.tensor([[True, False, True, True, False, True]])
    starts = torch.tensor([[True, False, False, True, False, False]])
    assert word_positions(counted, starts).tolist() == [[0, 0, 1, 0, 0, 1]]


def test_no_byte_ids_means_every_id_is_a_word():
    assert final_positions(torch.tensor([[0, 5]]), None).all()


@pytest.mark.parametrize("bad", [-1, 517])
def test_an_id_out_of_range_is_named_with_the_range(dictionary, bad):
    with pytest.raises(IndexError, match=rf"input_ids must lie in \[0, 517\).*{bad}"):
        find_words(torch.tensor([[1, bad]]), dictionary, SPEC, FIRST)


def test_float_ids_are_a_type_error(dictionary):
    with pytest.raises(TypeError, match=r"input_ids must be an int64 or int32 tensor, got torch.float32"):
        find_words(torch.ones(1, 2), dictionary, SPEC, FIRST)


def copied(dictionary, ids, scores):
    ids = torch.tensor([ids])
    words = find_words(ids, dictionary, SPEC, FIRST)
    logits = torch.full((1, 1, len(dictionary)), FLOOR)
    logits[0, 0, 515:] = torch.tensor([0.5, -0.5])
    return copy_logits(logits, torch.tensor([[scores]]), words, ids, FIRST, FLOOR)[0, 0]


def test_the_first_byte_gets_the_logsumexp_of_the_words_that_begin_with_it(dictionary):
    logits = copied(dictionary, [*spell("cat"), *spell("cow"), *spell("dog")], [1.0, 2.0, 3.0])
    c, d = FIRST + ord("c"), FIRST + ord("d")
    assert logits[c].item() == pytest.approx(math.log(math.e + math.e**2))
    assert logits[d].item() == pytest.approx(3.0)
    assert logits[515].item() == 0.5


def test_inside_a_word_only_continuations_are_possible_and_the_chain_rule_holds(dictionary):
    context = [*spell("cat"), *spell("cow"), *spell("dog")]
    scores = [1.0, 2.0, 3.0]
    begin = copied(dictionary, context, scores).log_softmax(0)
    inside = copied(dictionary, [*context, FIRST + ord("c")], scores)
    assert (inside > FLOOR).nonzero().ravel().tolist() == [FIRST + ord("a"), FIRST + ord("o")]
    end = copied(dictionary, [*context, FIRST + ord("c"), FIRST + ord("a")], scores)
    path = begin[FIRST + ord("c")] + inside.log_softmax(0)[FIRST + ord("a")]
    path = path + end.log_softmax(0)[FIRST + 256 + ord("t")]
    everything = torch.tensor([0.5, -0.5, *scores]).logsumexp(0)
    assert path.item() == pytest.approx(1.0 - everything.item(), abs=1e-5)


def test_a_fragment_that_nothing_continues_is_treated_as_padding(dictionary):
    logits = copied(dictionary, [*spell("cat"), FIRST + ord("x")], [1.0])
    assert logits[515].item() == 0.5
    assert logits[FIRST + ord("c")].item() == pytest.approx(1.0)
