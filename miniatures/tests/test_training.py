"""The training loop: it learns, and a killed run goes on exactly where it was."""

import dataclasses

import pytest
import torch

from miniatures.tfree.contenders import Body, BpeContender, train_bpe
from miniatures.tfree.training import Schedule, train
from miniatures.tfree.windows import Segment, Window

TEXTS = ["the house is red", "the mouse is grey", "a house and a mouse", "red and grey"] * 4
WINDOWS = [Window((Segment(text, True),), leads=True) for text in TEXTS]
BODY = Body(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
)
SCHEDULE = Schedule(steps=8, learning_rate=1e-2, warmup_steps=2, log_every=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_bpe(TEXTS, vocab_size=300, path=tmp_path_factory.mktemp("bpe") / "tokenizer")


def contender(tokenizer):
    torch.manual_seed(0)
    return BpeContender(tokenizer, BODY)


def windows_of(step):
    return [WINDOWS[(3 * step + i) % len(WINDOWS)] for i in range(3)]


def test_a_killed_run_goes_on_to_the_same_weights(tokenizer, tmp_path):
    whole, parts = contender(tokenizer), contender(tokenizer)
    train(whole, windows_of, SCHEDULE, tmp_path / "whole", log=lambda line: None)

    def killed(step):
        if step == 5:
            raise KeyboardInterrupt
        return windows_of(step)

    every_step = dataclasses.replace(SCHEDULE, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train(parts, killed, every_step, tmp_path / "parts", log=lambda line: None)
    again = contender(tokenizer)
    totals = train(again, windows_of, every_step, tmp_path / "parts", log=lambda line: None)
    assert totals["steps"] == 8
    assert totals["bytes"] == sum(len(window.text) for step in range(8) for window in windows_of(step))
    for mine, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_state_of_another_schedule_is_refused(tokenizer, tmp_path):
    train(contender(tokenizer), windows_of, SCHEDULE, tmp_path, log=lambda line: None)
    with pytest.raises(ValueError, match="holds the state of another run"):
        train(contender(tokenizer), windows_of, dataclasses.replace(SCHEDULE, steps=9), tmp_path)


def test_training_lowers_the_code_length_of_its_text(tokenizer, tmp_path):
    model = contender(tokenizer)
    before = sum(sum(one.bits) for one in model.score(WINDOWS[:4]))
    train(model, windows_of, dataclasses.replace(SCHEDULE, steps=60), tmp_path, log=lambda line: None)
    assert sum(sum(one.bits) for one in model.score(WINDOWS[:4])) < 0.5 * before


def test_bpe_units_cover_the_text_without_gaps(tokenizer):
    for one in contender(tokenizer).score(WINDOWS[:4]):
        assert [start for start, _ in one.spans] == [0, *(end for _, end in one.spans[:-1])]
        assert one.spans[-1][1] == len(one.text)


def test_the_rate_warms_up_and_ends_at_its_final_share():
    schedule = Schedule(steps=100, learning_rate=1.0, warmup_steps=10, final_share=0.1)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(100) == pytest.approx(0.1)
    assert schedule.rate(54) > schedule.rate(56)
