"""Writing with the T-FREE miniature many rows at a time, and its extended dictionary."""

import pytest
import torch
from peft import get_peft_model

import scar_peft
from miniatures.scar.base import load_base, with_words_of
from miniatures.scar.train import Coder, adapter_config
from miniatures.scar.writing import Writer

PROMPT = "In the beginning God created"


@pytest.fixture(scope="module")
def base():
    return load_base()


@pytest.fixture(scope="module")
def writer(base):
    return Writer(*base)


@pytest.fixture(scope="module")
def prompts(writer):
    return writer.prompt_ids([PROMPT, "To open the dialog box, choose", "Xyzzyplugh the dialog box"], 4)


def test_only_prompts_of_known_words_are_taken(writer, prompts):
    assert [writer.tokenizer.decode(row) for row in prompts] == ["In the beginning God", "To open the dialog"]


def test_the_head_is_that_of_the_model(base, writer):
    model, tokenizer = base
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits[0, -1].log_softmax(-1)
        found = writer._logits(model.model(ids).last_hidden_state[0, -1]).log_softmax(-1)
    is_word = model.is_word_id()
    torch.testing.assert_close(found[is_word], expected[is_word], atol=1e-3, rtol=1e-3)


def test_copies_share_their_random_numbers(writer, prompts):
    written = writer.write(prompts, copies=2, new_words=5)
    assert written.texts[:2] == written.texts[2:]
    assert written.texts == writer.write(prompts, new_words=5).texts * 2
    assert written.texts != writer.write(prompts, copies=2, new_words=5, seed=1).texts


def test_nats_are_the_cross_entropy_of_the_new_words(base, writer, prompts):
    model, _ = base
    written = writer.write(prompts[:1], new_words=4)
    labels = written.ids.masked_fill(~written.is_new, -100)
    with torch.no_grad():
        expected = model(written.ids, labels=labels).loss
    torch.testing.assert_close(writer.nats_per_word(written)[0], expected, atol=1e-3, rtol=1e-3)


def test_neutral_steering_writes_the_same(prompts):
    model, tokenizer = load_base()
    adapted = get_peft_model(model, adapter_config(Coder(latents=8, k=2), conditioned=True))
    writer = Writer(model, tokenizer)
    plain = writer.write(prompts, new_words=3)
    strengths = {"german": torch.tensor([0.0, 9.0])}
    steered = writer.write(prompts, copies=2, new_words=3, steered=scar_peft.steering(adapted, strengths, rule="add"))
    assert steered.texts[:2] == plain.texts
    assert steered.texts[2:] != plain.texts


def test_words_of_an_extended_dictionary_have_the_states_of_spelled_ones():
    model, tokenizer = load_base()
    text = "the Xyzzyplugh dialog"
    with torch.no_grad():
        spelled = model.model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state
        extended = with_words_of(model, tokenizer, [text])
        ids = extended(text, return_tensors="pt").input_ids
        whole = model.model(ids).last_hidden_state
    assert ids.shape == (1, 3) and spelled.shape[1] > 3
    torch.testing.assert_close(whole[0, -2:], spelled[0, -2:], atol=1e-4, rtol=1e-4)
