"""A word outside the dictionary is spelled in byte ids, yet it is one position, embedded exactly, and can be copied."""

import pytest
import torch

from tests.support.tfree import WORDS
from tfree_tokenizer import TFreeTokenizer
from tfree_tokenizer.remote.spelling_tfree import byte_ids, final_positions

NEW = "Zwetschge"


def twins(tiny):
    """The model with a dictionary that holds `NEW` and with one that does not: logits for the same text."""
    text = f"das {NEW} ist klein {NEW} das"
    spelled = tiny.ids(text)
    with torch.no_grad():
        short = tiny.model(**spelled, output_hash_logits=True, use_cache=False).hash_logits
    longer = TFreeTokenizer(words=[*WORDS, NEW])
    tiny.model.set_dictionary(longer)
    whole = longer(text, return_tensors="pt")
    with torch.no_grad():
        long = tiny.model(**whole, output_hash_logits=True, use_cache=False).hash_logits
    return spelled["input_ids"], short, whole["input_ids"], long


def test_a_spelled_word_gives_exactly_the_logits_of_its_dictionary_id(build, objective):
    tiny = build(objective=objective, attn_implementation="eager")
    spelled_ids, short, whole_ids, long = twins(tiny)
    assert spelled_ids.shape[1] > whole_ids.shape[1]
    words = final_positions(spelled_ids, tiny.tokenizer.first_byte_id)[0]
    assert torch.equal(short[:, words], long)


def test_hidden_bytes_give_the_logits_of_words_that_were_gathered(tiny):
    inputs = tiny.ids(f"das {NEW} ist klein {NEW} das", "Haus")
    with torch.no_grad():
        gathered = tiny.model(**inputs, use_cache=False).logits
        hidden = tiny.model(**inputs, use_cache=True).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[seen], gathered[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [(1, 1), (4, 3), (2, 9)], ids=str)
def test_a_plain_loop_over_a_cache_may_cut_words_anywhere(tiny, steps):
    ids = tiny.ids(f"das {NEW} ist {NEW} Haus")["input_ids"]
    with torch.no_grad():
        expected = tiny.model(ids).logits
        cache, found, start = None, [], 0
        while start < ids.shape[1]:
            stop = start + steps[len(found) % 2]
            out = tiny.model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, stop
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_plain_loop_may_give_a_mask_and_positions_that_count_ids(tiny):
    inputs = tiny.ids(f"das {NEW} ist {NEW}", "Haus")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = tiny.model(ids, attention_mask=mask).logits[:, -3:]
        first = tiny.model(ids[:, :-3], attention_mask=mask[:, :-3], position_ids=positions[:, :-3])
        rest = {"attention_mask": mask, "position_ids": positions[:, -3:], "past_key_values": first.past_key_values}
        found = tiny.model(ids[:, -3:], **rest).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_product_over_the_bytes_is_the_softmax_weight_of_the_word(tiny):
    text = "das Zwetschge Zwetschgen Zwirn ist"
    ids = tiny.ids(text)["input_ids"]
    spelled = {word: byte_ids(word.encode(), tiny.tokenizer.first_byte_id) for word in text.split()[1:4]}
    with torch.no_grad():
        chosen = {word: sequence_log_probability(tiny.model, ids, spelled[word]) for word in spelled}
        others = tiny.model(ids).logits[0, -1].log_softmax(0)[tiny.model.is_word_id()]
        z = tiny.model(ids, output_hash_logits=True).hash_logits[:, -1]
    tiny.model.set_dictionary(TFreeTokenizer(words=[*WORDS, *spelled]))
    exact = tiny.model.word_logits(z[None])[0, 0][tiny.model.is_word_id()].log_softmax(0)
    torch.testing.assert_close(others, exact[: len(others)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(list(chosen.values())), exact[len(others) :], rtol=1e-4, atol=1e-4)


def sequence_log_probability(model, ids, new):
    """Log-probability that `new` follows `ids`, from one forward pass over both."""
    logits = model(torch.cat([ids, torch.tensor([new])], 1)).logits[0, -len(new) - 1 : -1]
    return logits.log_softmax(1).gather(1, torch.tensor(new)[:, None]).sum()


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("word", ["Zwetschge", "Donaudampfschiff", "Żółć", "Haus"])
def test_a_word_of_the_prompt_is_copied_whether_the_dictionary_holds_it_or_not(copier, word, options):
    new = copier.generate(f"the {word} is small", max_new_tokens=24, eos_token_id=0, **options)[0]
    assert copier.tokenizer.decode(new, skip_special_tokens=True) == word


def test_each_row_copies_its_own_word(copier):
    prompts = [f"the {word} is small" for word in ("Zwetschge", "Haus", "Żółć")]
    new = copier.generate(*prompts, max_new_tokens=16, eos_token_id=0)
    assert copier.tokenizer.batch_decode(new, skip_special_tokens=True) == ["Zwetschge", "Haus", "Żółć"]


def test_copying_can_be_switched_off(build):
    tiny = build(copy_spelled_words=False)
    with torch.no_grad():
        logits = tiny.model(**tiny.ids(f"das {NEW} ist")).logits
    assert bool((logits[..., ~tiny.model.is_word_id()] == torch.finfo(torch.float32).min).all())


def test_word_scores_add_up_the_bytes_of_spelled_words(copier):
    ids = copier.ids("the Zwetschge is small Zwetschge")["input_ids"]
    scores = copier.model.score(ids)
    finals = final_positions(ids, copier.tokenizer.first_byte_id)
    assert bool((scores[~finals] == 0).all())
    assert scores[0, -1] > -0.5


def causal_mask(words, dtype=torch.float32):
    """4-D additive mask [1, 1, L, L] that shows every position the words up to itself."""
    L = words.shape[1]
    visible = torch.ones(L, L, dtype=torch.bool).tril() & words[0]
    return torch.zeros(L, L, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[None, None]


@pytest.mark.parametrize("as_bool", [True, False])
def test_a_4d_mask_that_hides_bytes_inside_words_is_taken_as_it_is(tiny, as_bool):
    ids = tiny.ids(f"das {NEW} ist {NEW}")["input_ids"]
    mask = causal_mask(final_positions(ids, tiny.tokenizer.first_byte_id))
    with torch.no_grad():
        expected = tiny.model(ids).logits
        found = tiny.model(ids, attention_mask=mask == 0 if as_bool else mask).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_4d_mask_that_shows_bytes_inside_words_is_refused(tiny):
    ids = tiny.ids(f"das {NEW} ist")["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask \(4-D\) must hide the bytes inside spelled words"):
        tiny.model(ids, attention_mask=causal_mask(torch.ones_like(ids, dtype=torch.bool)))


def test_a_4d_mask_without_spelled_words_needs_nothing_special(tiny):
    ids = tiny.ids("das Haus ist klein")["input_ids"]
    with torch.no_grad():
        found = tiny.model(ids, attention_mask=causal_mask(torch.ones_like(ids, dtype=torch.bool))).logits
        torch.testing.assert_close(found, tiny.model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [-1, 10_000])
def test_ids_out_of_range_are_refused_by_name(tiny, bad):
    with pytest.raises(IndexError, match="input_ids must lie in"):
        tiny.model(torch.tensor([[1, bad]]))


def test_float_ids_are_refused_by_name(tiny):
    with pytest.raises(TypeError, match="input_ids"):
        tiny.model(torch.tensor([[1.0, 2.0]]))


def test_a_fragment_of_a_spelled_word_reads_as_padding(tiny):
    ids = tiny.ids(f"das {NEW} ist klein")["input_ids"]
    inside = (~final_positions(ids, tiny.tokenizer.first_byte_id))[0]
    fragment = ids[:, inside][:, :3]
    with torch.no_grad():
        alone = tiny.model(ids, output_hash_logits=True).hash_logits[:, -1]
        unfinished = tiny.model(torch.cat([ids, fragment], 1), output_hash_logits=True).hash_logits[:, -1]
    torch.testing.assert_close(unfinished, alone, rtol=1e-5, atol=1e-5)
