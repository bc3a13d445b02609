"""Emoji diffusion: scenes, captions, training that goes on after a kill, and what the committed checkpoint draws."""

import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from miniatures.emoji_diffusion.judge import ABSENT, Judge, labels, right_answers
from miniatures.emoji_diffusion.model import (
    CAPTION_LENGTH,
    Sizes,
    build_autoencoder,
    build_denoiser,
    build_text_encoder,
    build_tokenizer,
    words,
)
from miniatures.emoji_diffusion.sampling import draw_captions
from miniatures.emoji_diffusion.scenes import (
    COLORS,
    GROUNDS,
    KINDS,
    PAIR_SIDES,
    SINGLE_SIDES,
    Composer,
    Description,
    Ground,
    Sprite,
    Thing,
    combinations,
    describe,
    tint,
)
from miniatures.emoji_diffusion.stages import DenoiserStage, pixel_values, spread_timesteps
from miniatures.emoji_diffusion.train import save_checkpoint, train_pipeline
from miniatures.emoji_diffusion.training import Average, Schedule, train_stage

MICRO = Sizes(
    autoencoder=(8, 8), denoiser=(8, 8, 16), text_width=16, text_layers=1, heads=2, latent_channels=4, norm_groups=4
)
STAGE = Schedule(steps=3, minutes=10, learning_rate=1e-3, batch_pictures=2, warmup_steps=1, log_every=1)
STAGES = {"autoencoder": STAGE, "decoder": STAGE, "denoiser": STAGE}


@pytest.fixture(scope="module")
def compose():
    def square(side):
        return Sprite(np.full((side, side), 0.5, np.float32), np.ones((side, side, 1), np.float32))

    return Composer({kind: {side: square(side) for side in {*SINGLE_SIDES, *PAIR_SIDES}} for kind in KINDS})


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def trained(compose, tmp_path_factory):
    return train_pipeline(compose, MICRO, STAGES, tmp_path_factory.mktemp("run"), seed=0, log=lambda line: None)


def pair(relation):
    return Description(
        things=(Thing("cat", "red"), Thing("car", "blue")), relation=relation, ground=Ground("snow", False)
    )


def test_a_picture_depends_on_its_seed_alone(compose):
    first, again, other = compose(3, 7), compose(3, 7), compose(3, 8)
    assert np.array_equal(first.pixels, again.pixels) and first.description == again.description
    assert not np.array_equal(first.pixels, other.pixels)


def test_masks_show_objects_of_the_color_told_and_nothing_else(compose):
    for seed in range(40):
        picture = compose(seed)
        description = picture.description
        for thing, mask in zip(description.things, picture.masks, strict=True):
            assert mask.sum() in {side**2 for side in (*SINGLE_SIDES, *PAIR_SIDES)}
            assert np.abs(picture.pixels[mask] - np.array(COLORS[thing.color], float)).max() <= 1
        assert picture.masks.sum(0).max() == 1
        ground = picture.pixels[~picture.masks.any(0)]
        assert len(np.unique(ground, axis=0)) == (2 if description.ground.is_striped else 1)


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)]
)
def test_objects_stand_in_the_relation_told(compose, relation, axis, sign):
    for seed in range(10):
        masks = compose.draw(pair(relation), np.random.default_rng(seed)).masks
        first, second = (np.nonzero(mask)[axis] for mask in masks)
        assert sign * (first.mean() - second.mean()) > 0
        assert min(first.max(), second.max()) < max(first.min(), second.min())


def test_captions_say_what_is_shown():
    assert pair("left of").caption == "red cat left of blue car on snow"
    single = Description(things=(Thing("house", "blue"),), relation=None, ground=Ground("sand", True))
    assert single.caption == "blue house on striped sand"


def test_no_training_picture_shows_a_held_out_combination():
    train, held_out = set(combinations("train")), set(combinations("held-out"))
    assert not train & held_out and train | held_out == set(combinations("all"))
    assert {thing.kind for thing in held_out} == set(KINDS) and {thing.color for thing in held_out} == set(COLORS)
    generator = np.random.default_rng(0)
    for side, things in (("train", train), ("held-out", held_out)):
        shown = [describe(generator, side=side) for _ in range(200)]
        assert {thing for one in shown for thing in one.things} <= things
        assert {one.ground.name for one in shown} == set(GROUNDS)


def test_tinting_keeps_the_order_of_brightness():
    shades = tint(np.linspace(0, 1, 9, dtype=np.float32)[None], COLORS["blue"])[0]
    assert (np.diff(shades.sum(-1)) > 0).all() and shades[4].round().tolist() == list(COLORS["blue"])


def test_the_tokenizer_keeps_words_whole_and_is_an_ordinary_one_when_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    ids = {tuple(loaded(word).input_ids) for word in words()}
    assert len(ids) == len(words()) and {len(row) for row in ids} == {3}
    caption = "red apple left of green cat on striped sky"
    assert loaded.decode(loaded(caption).input_ids, skip_special_tokens=True).strip() == caption
    assert len(loaded(caption, padding="max_length").input_ids) == CAPTION_LENGTH


def test_the_learning_rate_rises_stays_and_falls():
    schedule = Schedule(steps=1000, minutes=10, learning_rate=2.0, batch_pictures=1)
    rates = [schedule.rate(step, schedule.done(step, 0)) for step in range(1001)]
    assert max(rates) == 2.0 == rates[100] == rates[699] and rates[850] == pytest.approx(1.0) and rates[1000] == 0
    assert schedule.done(3, 600) == 1 == schedule.done(1000, 0) and schedule.done(0, 300) == 0.5


def test_the_average_follows_and_forgets_where_it_began():
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, 0.9)
    for step in range(100):
        model.weight.data.fill_(5.0)
        average.update(model, step)
    assert average.weights["weight"].item() == pytest.approx(5.0, abs=1e-3)


def test_a_stopped_training_goes_on_bit_by_bit(compose, tokenizer, tmp_path):
    def weights(name, stop):
        torch.manual_seed(0)
        denoiser, text_encoder = build_denoiser(MICRO), build_text_encoder(MICRO, tokenizer)
        autoencoder = build_autoencoder(MICRO)
        stage = DenoiserStage(denoiser, text_encoder, autoencoder, tokenizer, compose, batch_pictures=2, seed=1)

        def loss_of(step):
            if step == stop:
                raise KeyboardInterrupt
            return stage.loss(step)

        schedule = Schedule(
            steps=3, minutes=10, learning_rate=1e-3, batch_pictures=2, warmup_steps=1, checkpoint_seconds=0
        )
        train_stage(stage, loss_of, schedule, tmp_path / name, log=lambda line: None)
        return [value.detach().clone() for value in stage.state_dict().values()]

    whole = weights("whole.pt", None)
    with pytest.raises(KeyboardInterrupt):
        weights("parts.pt", 2)
    parts = weights("parts.pt", None)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not any(name.startswith("_frozen") for name in torch.load(tmp_path / "whole.pt", weights_only=True)["model"])


def test_a_state_of_another_run_is_refused(tmp_path):
    model = torch.nn.Linear(2, 1)
    train_stage(model, lambda step: model.weight.sum(), STAGE, tmp_path / "a.pt", log=lambda line: None)
    other = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match="holds the state of another run"):
        train_stage(other, lambda step: other.weight.sum(), STAGE, tmp_path / "a.pt", log=lambda line: None)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="loss of step 0 is nan; lower the learning rate"):
        train_stage(model, lambda step: model.weight.sum() * math.nan, STAGE, tmp_path / "a.pt")


def test_timesteps_cover_the_schedule_evenly():
    steps = spread_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert (steps // 100).tolist() == list(range(10))


def test_what_training_writes_loads_as_a_stable_diffusion_pipeline(trained, tmp_path):
    pipeline, metrics = trained
    assert {name: stage["steps"] for name, stage in metrics["training"].items()} == dict.fromkeys(STAGES, 3)
    save_checkpoint(pipeline, metrics, tmp_path / "out")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    parts = (loaded.unet, loaded.vae, loaded.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert loaded.vae_scale_factor == 2
    loaded.set_progress_bar_config(disable=True)
    captions = ["red cat on snow", "blue car on striped sky"]
    drawn = draw_captions(loaded, captions, steps=2)
    assert drawn.shape == (2, 3, 64, 64) and drawn.isfinite().all()
    alone = draw_captions(loaded, captions[1:], seed=1, steps=2)
    assert torch.allclose(drawn[1:], alone, atol=1e-4)
    assert "from_pretrained" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_the_judge_is_asked_about_the_upper_or_left_object_first():
    left, right = labels(pair("left of")), labels(pair("right of"))
    assert (left["first kind"], left["second kind"]) == (right["second kind"], right["first kind"])
    single = labels(Description(things=(Thing("cat", "red"),), relation=None, ground=Ground("snow", False)))
    assert single["second kind"] == ABSENT == single["second color"] and single["layout"] == 0


def test_right_answers_leave_out_what_was_not_asked(compose):
    pictures = [compose(seed) for seed in range(6)]
    descriptions = [picture.description for picture in pictures]
    told = Judge().eval().read(pixel_values(pictures))
    asked = [labels(one) for one in descriptions]
    told = {name: torch.tensor([one[name] for one in asked]) for name in told}
    right = right_answers(told, descriptions)
    assert right["caption"].tolist() == [1.0] * 6
    assert np.isnan(right["second kind"]).tolist() == [one.relation is None for one in descriptions]
    told["ground"] = told["ground"] + 1
    assert right_answers(told, descriptions)["caption"].tolist() == [0.0] * 6
