"""Every way of generating that transformers offers works on word ids, unmodified."""

import copy
import itertools

import pytest
import torch

from tfree_tokenizer.remote.spelling_tfree import final_positions

SHORT, LONG = "the house", "das Donaudampfschiff ist klein. the Zwetschge"


def steps_of(tiny, *texts, **options):
    """The ids and the logits [B, new, ids] of a greedy generation."""
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
    out = tiny.model.generate(**tiny.ids(*texts), output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}],
    ids=["dynamic", "uncached", "static", "chunked"],
)
@pytest.mark.parametrize("text", [LONG, "Zwetschge", SHORT])
def test_every_step_of_generate_has_the_logits_of_one_forward_pass(tiny, text, options):
    sequences, logits = steps_of(tiny, text, **options)
    with torch.no_grad():
        expected = tiny.model(sequences[:, :-1], use_cache=False).logits[:, -logits.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert sequences[:, -logits.shape[1] :].tolist() == expected.argmax(2).tolist()


def test_a_left_padded_batch_generates_what_each_row_generates_alone(tiny):
    assert tiny.generate(SHORT, LONG, "Haus") == [tiny.generate(text)[0] for text in (SHORT, LONG, "Haus")]


def test_left_padding_does_not_change_the_logits_of_a_row(tiny):
    with torch.no_grad():
        batch = tiny.model(**tiny.ids(SHORT, LONG)).logits
        alone = tiny.model(**tiny.ids(SHORT)).logits
    torch.testing.assert_close(batch[0, -alone.shape[1] :], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 4, "top_p": 0.9, "temperature": 0.7}]
)
def test_sampling_is_reproducible_and_stays_in_the_vocabulary(tiny, options):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(tiny.generate(SHORT, LONG, do_sample=True, max_new_tokens=12, **options))
    assert runs[0] == runs[1]
    assert all(0 <= token < len(tiny.tokenizer) for row in runs[0] for token in row)


def test_top_k_of_one_is_greedy(tiny):
    assert tiny.generate(LONG, do_sample=True, top_k=1) == tiny.generate(LONG)


def test_ids_that_begin_no_copied_word_are_never_sampled(tiny):
    torch.manual_seed(0)
    first = tiny.tokenizer.first_byte_id
    sampled = {token for row in tiny.generate(SHORT, do_sample=True, top_k=0, num_return_sequences=64) for token in row}
    assert not sampled & set(range(first, first + 512))


def test_beams_are_the_most_likely_of_all_continuations(tiny):
    inputs = tiny.ids(SHORT)
    out = tiny.model.generate(
        **inputs, num_beams=len(tiny.tokenizer), max_new_tokens=2, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        first = tiny.model(**inputs).logits[0, -1].log_softmax(0)
        words = tiny.model.is_word_id().nonzero()
        pairs = torch.cat([inputs["input_ids"].expand(len(words), -1), words], 1)
        second = tiny.model(pairs).logits[:, -1].log_softmax(1)
    joint = (first[words] + second).max()
    torch.testing.assert_close(out.sequences_scores[0] * 2, joint, rtol=1e-4, atol=1e-4)


def test_three_beams_with_a_batch_equal_three_beams_per_row(tiny):
    both = tiny.generate(SHORT, LONG, num_beams=3)
    assert both == [tiny.generate(text, num_beams=3)[0] for text in (SHORT, LONG)]


def test_repetition_penalty_and_no_repeat_ngram_are_obeyed(tiny):
    (new,) = tiny.generate(SHORT, repetition_penalty=1.5, no_repeat_ngram_size=2, max_new_tokens=12)
    ids = tiny.ids(SHORT)["input_ids"][0].tolist() + new
    pairs = list(itertools.pairwise(ids))
    assert len(pairs) == len(set(pairs))
    (plain,) = tiny.generate(SHORT, max_new_tokens=12)
    assert new != plain


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_the_prompt_may_cut_a_spelled_word(tiny, chunk, options):
    texts = ("Donaudampfschiff is Zwetschge Haus", SHORT)
    assert tiny.generate(*texts, prefill_chunk_size=chunk, **options) == tiny.generate(*texts, **options)


def test_prompt_lookup_changes_the_speed_only(tiny):
    repeated = "the Zwetschge is small. the Zwetschge is small. the"
    assert tiny.generate(repeated, prompt_lookup_num_tokens=3, max_new_tokens=16) == tiny.generate(
        repeated, max_new_tokens=16
    )


def test_an_assistant_model_changes_the_speed_only(tiny, build):
    assistant = build(seed=9, num_hidden_layers=1).model
    assert tiny.generate(LONG, assistant_model=assistant, max_new_tokens=12) == tiny.generate(LONG, max_new_tokens=12)


def test_a_conversation_continues_from_the_cache_of_the_last_turn(tiny):
    first = tiny.ids("the Zwetschge is")["input_ids"]
    turn = tiny.model.generate(
        first, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    longer = torch.cat([turn.sequences, tiny.ids("Zwetschge Donau ist")["input_ids"]], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = tiny.model.generate(longer, **options)[:, longer.shape[1] :].tolist()
    continued = tiny.model.generate(longer, past_key_values=copy.deepcopy(turn.past_key_values), **options)
    assert continued[:, longer.shape[1] :].tolist() == expected
    unread = longer[:, turn.past_key_values.get_seq_length() :]
    continued = tiny.model.generate(
        unread, attention_mask=torch.ones_like(longer), past_key_values=turn.past_key_values, **options
    )
    assert continued[:, unread.shape[1] :].tolist() == expected


def test_streaming_the_single_best_word_is_greedy_generation(build, objective):
    tiny = build(objective=objective, copy_spelled_words=False)
    inputs = tiny.ids(SHORT, LONG)
    streamed = tiny.model.generate_topk(**inputs, k=1, max_new_tokens=8)
    generated = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert streamed.tolist() == generated.tolist()


def test_embeddings_of_the_prompt_generate_what_its_ids_generate(tiny):
    inputs = tiny.ids("the house is")
    embeds = tiny.model.get_input_embeddings()(inputs["input_ids"])
    new = tiny.model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert new.tolist() == tiny.generate("the house is")


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4]), torch.tensor([2])], ids=str)
def test_logits_to_keep_slices_the_logits(tiny, keep):
    inputs = tiny.ids("the house is small. das Haus ist klein")
    with torch.no_grad():
        every, kept = tiny.model(**inputs).logits, tiny.model(**inputs, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, every[:, -keep:] if isinstance(keep, int) else every[:, keep])


def test_no_ids_at_all_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match="input_ids"):
        tiny.model.generate(**tiny.ids(""), max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids"):
        tiny.model(torch.zeros(1, 0, dtype=torch.long))


def test_with_a_bos_token_generation_may_start_from_nothing(tiny):
    tiny.model.generation_config.bos_token_id = 1
    out = tiny.model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 4) and int(out[0, 0]) == 1


def test_the_end_token_ends_a_row_and_padding_follows(tiny):
    (free,) = tiny.generate(SHORT, max_new_tokens=8)
    end = free[2]
    stop = free.index(end)
    (row,) = tiny.generate(SHORT, max_new_tokens=8, eos_token_id=end)
    assert row == free[: stop + 1]
    both = tiny.generate(SHORT, LONG, max_new_tokens=8, eos_token_id=end, pad_token_id=0)
    assert both[0][stop + 1 :] == [0] * (len(both[0]) - stop - 1)


def test_scores_of_generate_are_finite_where_words_are_possible(tiny):
    out = tiny.model.generate(
        **tiny.ids(LONG), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for logits in out.logits:
        assert logits.dtype == torch.float32
        assert bool(torch.isfinite(logits).all())


def test_sdpa_and_eager_attention_agree_wherever_a_word_is_seen(tiny):
    inputs = tiny.ids(SHORT, LONG, "Zwetschge the")
    ids, seen = inputs["input_ids"], inputs["attention_mask"].bool()
    seen = (seen & final_positions(ids, tiny.tokenizer.first_byte_id)).cumsum(1) > 0
    logits = []
    for implementation in ("eager", "sdpa"):
        tiny.model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(tiny.model(**inputs).logits)
        assert bool(torch.isfinite(logits[-1]).all())
    torch.testing.assert_close(logits[0][seen], logits[1][seen], rtol=1e-4, atol=1e-4)


def test_bfloat16_generates_finite_logits_close_to_float32(tiny):
    inputs = tiny.ids(SHORT, LONG)
    with torch.no_grad():
        exact = tiny.model(**inputs, output_hash_logits=True)
        rounded = tiny.model.bfloat16()(**inputs, output_hash_logits=True)
    assert rounded.logits.dtype == torch.float32
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(rounded.hash_logits[seen].float(), exact.hash_logits[seen], rtol=0.05, atol=0.05)
    assert tiny.generate(SHORT, LONG)
