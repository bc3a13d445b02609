"""`steer`: the factors that a prompt has while a model reads it and writes on."""

import contextlib
import contextvars
import threading

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from atman_explain import UnsupportedModelError, explain, steer
from tests.support.atman import MODES, PROMPT, padded, reference_readouts, tiny_model
from tests.support.atman_tokenizers import byte_level

FACTORS = torch.tensor([1.0, 1.0, 0.1, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
NEW = 6
CACHED_MODES = MODES[:3]  # under the fourth, rows depend on keys that a cache does not have yet
IDS = torch.tensor([PROMPT])


def written(model, ids=IDS, **settings):
    """Ids and logits [NEW, V] of a greedy continuation."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | settings
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral-window", "gemma2"])
def model(request):
    return tiny_model(request.param).float()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").float()


@pytest.mark.parametrize("mode", MODES)
def test_a_steered_pass_is_that_of_the_definition(mode):
    model = tiny_model("llama")
    target = (5, 21, 14)
    wanted = reference_readouts(model, PROMPT, target, torch.cat([FACTORS, torch.ones(2)])[None], mode=mode)[0]
    with steer(model, factors=FACTORS, mode=mode), torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *target[:-1]]])).logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0], wanted)


@pytest.mark.parametrize("mode", CACHED_MODES)
def test_generation_is_the_same_with_and_without_a_cache_and_padding(model, mode):
    plain = written(model)[1]
    left = padded(PROMPT, side="left", length=16)
    with steer(model, factors=FACTORS, mode=mode):
        ids, logits = written(model)
        uncached = written(model, use_cache=False)[1]
        static = written(model, cache_implementation="static")[1]
        after_padding = written(model, left["input_ids"], attention_mask=left["attention_mask"])
    assert (plain - logits).abs().max() > 0.1
    torch.testing.assert_close(uncached, logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(static, logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(after_padding[1], logits, atol=1e-3, rtol=1e-4)
    assert after_padding[0].tolist() == ids.tolist()


def test_every_step_of_a_generation_is_that_of_the_definition():
    model = tiny_model("llama")
    with steer(model, factors=FACTORS):
        ids, logits = written(model)
    target = tuple(ids[0].tolist())
    factors = torch.cat([FACTORS, torch.ones(NEW - 1)])[None]
    wanted = reference_readouts(model, PROMPT, target, factors)[0]
    found = logits[0].log_softmax(-1).gather(1, ids[0][:, None])[:, 0].double()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)  # generate casts logits to float32


def test_beams_and_several_sequences_are_those_of_a_batch_of_one(llama):
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": NEW, "do_sample": False}
    other = torch.tensor(PROMPT[::-1])[None]
    with steer(llama, factors=FACTORS):
        one = llama.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    with steer(llama, factors=1 / (FACTORS + 0.5)):
        two = llama.generate(other, attention_mask=torch.ones_like(IDS), **options)
    both = torch.cat([IDS, other])
    with steer(llama, factors=torch.stack([FACTORS, 1 / (FACTORS + 0.5)])):
        together = llama.generate(both, attention_mask=torch.ones_like(both), **options)
    assert together.tolist() == [*one.tolist(), *two.tolist()]


def test_log_additive_zero_is_masking(llama):
    factors, mask = torch.ones(12), torch.ones_like(IDS)
    factors[4], mask[0, 4] = 0.0, 0
    positions = torch.arange(12)[None]
    with torch.no_grad():
        masked = llama(IDS, attention_mask=mask, position_ids=positions).logits[0, 5:]
        with steer(llama, factors=factors, mode="log_additive"):
            steered = llama(IDS, position_ids=positions).logits[0, 5:]
    torch.testing.assert_close(steered, masked, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_factors_of_one_change_nothing(llama, mode):
    with torch.no_grad():
        plain = llama(IDS).logits
        with steer(llama, factors=torch.ones(12), mode=mode):
            torch.testing.assert_close(llama(IDS).logits, plain, atol=1e-5, rtol=1e-5)


def test_nested_contexts_multiply(llama):
    first, second = FACTORS.clone(), torch.ones(12)
    second[2], second[7] = 4.0, 0.5
    with torch.no_grad():
        with steer(llama, factors=first * second):
            wanted = llama(IDS).logits
        with steer(llama, factors=first), steer(llama, factors=second):
            found = llama(IDS).logits
        with steer(llama, factors=first):
            alone = llama(IDS).logits
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, alone)


def test_nested_contexts_must_agree_in_mode(llama):
    with (
        steer(llama, factors=FACTORS),
        pytest.raises(ValueError, match="nested steer contexts must be the same, got mode='multiply' inside"),
        steer(llama, factors=FACTORS, mode="multiply"),
    ):
        pass


def test_two_models_can_be_steered_at_once(llama):
    other = tiny_model("llama", seed=1).float()
    with torch.no_grad():
        with steer(llama, factors=FACTORS):
            wanted = llama(IDS).logits
        with steer(llama, factors=FACTORS), steer(other, factors=1 / (FACTORS + 0.5)):
            torch.testing.assert_close(llama(IDS).logits, wanted)


def test_layers_and_heads_are_chosen():
    model = tiny_model("llama")
    target = (5,)
    for choice in ({"layers": (1,)}, {"heads": (0, 3)}, {"layers": (0,), "heads": (2,)}):
        wanted = reference_readouts(model, PROMPT, target, FACTORS[None], **choice)[0]
        with steer(model, factors=FACTORS, **choice), torch.no_grad():
            found = model(IDS).logits[0, -1].log_softmax(-1)[5]
        torch.testing.assert_close(found, wanted[0])


def test_parts_of_a_prompt_are_found_by_text_and_by_characters():
    tokenizer, text = byte_level(), "Oslo is the capital of Norway."
    model = tiny_model("llama", vocab_size=len(tokenizer)).float()
    inputs = tokenizer(text, return_tensors="pt")
    places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    start = text.index("capital")
    factors = [3.0 if b > start and a < start + 7 else 1.0 for a, b in places]
    with torch.no_grad():
        with steer(model, factors=factors):
            wanted = model(**inputs).logits
        for weights in ({"capital": 3.0}, {(start, start + 7): 3.0}, {" capital": 3.0}):
            with steer(model, tokenizer, text, weights):
                torch.testing.assert_close(model(**inputs).logits, wanted)


def test_an_encoder_decoder_is_steered_where_it_reads_the_source():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 48}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, initializer_factor=2.0)).eval()
    factors, mask = torch.ones(12), torch.ones_like(IDS)
    factors[4], mask[0, 4] = 0.0, 0
    start = torch.tensor([[0, 3]])
    with torch.no_grad():
        masked = model(IDS, attention_mask=mask, decoder_input_ids=start).logits
        with steer(model, factors=factors, mode="log_additive"):
            steered = model(IDS, decoder_input_ids=start).logits
    torch.testing.assert_close(steered, masked, atol=1e-4, rtol=1e-4)


def test_the_model_is_restored_whatever_happens(llama):
    before = llama.config._attn_implementation
    with contextlib.suppress(KeyboardInterrupt), steer(llama, factors=FACTORS):
        assert llama.config._attn_implementation == "atman"
        raise KeyboardInterrupt
    assert llama.config._attn_implementation == before
    assert not llama._forward_pre_hooks


def test_threads_take_the_context_along_when_asked(llama):
    found = []

    def run():
        with torch.no_grad():
            found.append(llama(IDS).logits)

    with torch.no_grad(), steer(llama, factors=FACTORS):
        wanted = llama(IDS).logits
        for target, arguments in ((run, ()), (contextvars.copy_context().run, (run,))):
            thread = threading.Thread(target=target, args=arguments)
            thread.start()
            thread.join()
    assert not torch.allclose(found[0], wanted)
    torch.testing.assert_close(found[1], wanted)


def test_attention_weights_are_refused(llama):
    with steer(llama, factors=FACTORS), pytest.raises(ValueError, match="output_attentions=True is not available"):
        llama(IDS, output_attentions=True)


def test_an_explanation_inside_is_refused(llama):
    with steer(llama, factors=FACTORS), pytest.raises(ValueError, match="inside a steer context"):
        explain(llama, None, list(PROMPT), target=[5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"weights or factors must be given"),
        ({"factors": [1.0, -0.5]}, r"factors must be finite and not negative"),
        ({"factors": [1.0, float("nan")]}, r"factors must be finite and not negative"),
        ({"factors": [1.0, float("inf")]}, r"factors must be finite and not negative"),
        ({"factors": [[[1.0]]]}, r"factors must be \[P\] or \[rows, P\].*got \[1, 1, 1\]"),
        ({"weights": {"a": 0.0}}, r"weights need the prompt"),
        ({"prompt": "Oslo is", "weights": {"Berlin": 0.0}}, r"'Berlin' was not found in the prompt"),
        ({"prompt": "Oslo is", "weights": {"Oslo": -1.0}}, r"weights\['Oslo'\] must be finite and not negative.*-1.0"),
        ({"prompt": "Oslo is", "weights": {(3, 99): 0.0}}, r"0 <= start < end <= 7.*\(3, 99\)"),
        ({"prompt": "Oslo is", "weights": {"Oslo": 0.0}, "occurrence": 3}, r"occurrence must lie in \[0, 0\]"),
        ({"factors": [1.0], "mode": "divide"}, r"mode must be one of .*'shift_min'.*got 'divide'"),
        ({"factors": [1.0], "layers": [7]}, r"layers must lie in \[0, 2\), got 7"),
    ],
)
def test_bad_input_is_named(arguments, message):
    tokenizer = byte_level()
    model = tiny_model("llama", vocab_size=len(tokenizer)).float()
    with pytest.raises(ValueError, match=message), steer(model, tokenizer, **arguments):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_a_batch_of_other_size_is_refused(llama):
    with (
        steer(llama, factors=torch.ones(2, 12)),
        pytest.raises(ValueError, match="a batch of 3 rows, but factors were given for 2"),
    ):
        llama(IDS.expand(3, -1))


def test_something_that_is_no_model_is_refused():
    with (
        pytest.raises(UnsupportedModelError, match=r"must be a transformers model.*Linear"),
        steer(torch.nn.Linear(1, 1), factors=[1.0]),
    ):
        pass
