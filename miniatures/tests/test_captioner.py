"""The captioner: scenes, questions, packed training, maps by gradients, and what the committed checkpoint knows."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from miniatures.captioner import saliency
from miniatures.captioner.answering import answer
from miniatures.captioner.examples import load_examples, write_examples
from miniatures.captioner.items import EXPLAINED, right_items
from miniatures.captioner.model import Sizes, build_model, build_processor
from miniatures.captioner.questions import NOTHING, ask, sample_questions
from miniatures.captioner.scenes import GRID, NAMES, PLACES, Composer, Sprite
from miniatures.captioner.training import COLUMNS, Learner, Schedule, collate, make_batch, train_stage

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "miniatures/captioner/checkpoint"
MICRO = Sizes(
    hidden_size=16,
    num_attention_heads=2,
    vision_layers=1,
    vision_intermediate_size=24,
    text_layers=2,
    text_intermediate_size=24,
)
SCHEDULE = Schedule(steps=6, learning_rate=3e-3, batch_pictures=2, answers=True, warmup_steps=2, log_every=3)


@pytest.fixture(scope="module")
def compose():
    def square(side, color):
        return Sprite(np.full((side, side, 3), color, np.float32), np.ones((side, side, 1), np.float32))

    colors = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255), (255, 160, 0)]
    return Composer([[square(side, color) for side in (20, 28)] for color in colors])


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def learner():
    torch.manual_seed(0)
    return Learner(build_model(MICRO)).eval()


@pytest.fixture(scope="module")
def trained():
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINT)


def test_a_scene_depends_on_its_seed_alone(compose):
    first, again, other = compose(3, 7), compose(3, 7), compose(3, 8)
    assert np.array_equal(first.pixels, again.pixels) and first.things == again.things
    assert np.array_equal(first.masks, again.masks)
    assert not np.array_equal(first.pixels, other.pixels)


def test_objects_stand_at_their_places_and_masks_show_what_is_seen(compose):
    for seed in range(30):
        picture = compose(seed)
        assert 2 <= len(picture.things) == len(set(picture.things)) <= 4
        assert list(picture.places) == sorted(set(picture.places))
        assert picture.masks.sum(0).max() == 1
        for thing, place, mask in zip(picture.things, picture.places, picture.masks, strict=True):
            color = compose.sprites[thing][0].colors[0, 0]
            assert np.abs(picture.pixels[mask].mean(0) - color).max() < 5
            rows, columns = (axis.mean() for axis in np.nonzero(mask))
            if mask.sum() in (20**2, 28**2):  # nothing stands in front of it
                assert divmod(place, 3) == (int(rows / 32), int(columns / 32))


def test_a_patch_belongs_to_the_object_that_covers_most_of_it(compose):
    picture = compose(5)
    shares = picture.shares()
    assert shares.shape == (len(picture.things), GRID, GRID)
    np.testing.assert_allclose(shares.sum((1, 2)) * 64, picture.masks.sum((1, 2)))
    labels = picture.patch_things()
    full = shares.reshape(len(picture.things), -1) == 1
    for thing, covered in zip(picture.things, full, strict=True):
        assert (labels[covered] == thing + 1).all()
    assert (labels[shares.sum(0).ravel() == 0] == 0).all()


def test_questions_have_the_answers_of_the_picture(compose):
    picture = compose(11)
    asked = ask(picture, np.random.default_rng(0))
    names = [NAMES[thing] for thing in picture.things]
    assert asked[0].answer == " and ".join(names)
    assert asked[0].about == tuple(range(len(names)))
    for one in asked[1:]:
        about = one.about[0] if one.about else None
        if one.kind == "what":
            place = re.fullmatch(r"<image> what is at the (.+) \?", one.prompt)[1]
            assert one.answer == (NOTHING if about is None else names[about])
            assert (PLACES.index(place) in picture.places) == (about is not None)
        elif one.kind == "where":
            assert names[about] in one.prompt and one.answer == PLACES[picture.places[about]]
        else:
            assert one.answer == ("no" if about is None else "yes")
    assert len(sample_questions(picture, np.random.default_rng(0))) == 8


def test_every_word_of_the_questions_is_known_and_an_answer_joins_its_prompt_without_a_seam(compose, processor):
    tokenizer = processor.tokenizer
    for seed in range(20):
        for one in ask(compose(seed), np.random.default_rng(seed)):
            prompt = tokenizer.encode(one.prompt)
            whole = prompt + tokenizer.encode(one.answer, add_special_tokens=False)
            assert tokenizer.unk_token_id not in whole
            assert tokenizer.encode(f"{one.prompt} {one.answer}") == whole
            assert tokenizer.decode(whole[len(prompt) :]) == one.answer


def test_packed_questions_give_the_logits_of_the_stock_model_one_by_one(compose, processor, learner):
    picture = compose(2)
    asked = sample_questions(picture, np.random.default_rng(0))
    batch = collate([picture], [asked], processor)
    with torch.no_grad():
        packed, labels = learner._answer_logits(batch, learner.image_features(batch.pixel_values))
        alone = []
        for one in asked:
            case = saliency.make_case(learner.model, processor, picture, one.prompt, one.answer)
            ids = torch.cat([case.input_ids, case.answer_ids[None, -1:]], 1)
            logits = learner.model(input_ids=ids, pixel_values=case.pixel_values).logits[0]
            alone.append(logits[-len(case.answer_ids) - 1 :])
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [
        token for one in asked for token in [*processor.tokenizer.encode(one.answer, add_special_tokens=False), 2]
    ]


def test_the_processor_prepares_pictures_as_training_does(compose, processor, learner):
    picture = compose(4)
    case = saliency.make_case(learner.model, processor, picture, "<image> what do you see ?", "fire")
    torch.testing.assert_close(case.pixel_values, collate([picture], [[]], processor).pixel_values, rtol=0, atol=1e-6)
    assert case.image_columns.tolist() == list(range(1, COLUMNS))


def test_a_killed_stage_goes_on_to_the_same_weights(compose, processor, learner, tmp_path):
    def batch_of(step):
        return make_batch(compose, processor, SCHEDULE, step, seed=0)

    def killed(step):
        if step == 4:
            raise KeyboardInterrupt
        return batch_of(step)

    start = {name: values.clone() for name, values in learner.state_dict().items()}
    every_step = dataclasses.replace(SCHEDULE, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_stage(learner, killed, every_step, tmp_path / "parts.pt", log=lambda line: None)
    learner.load_state_dict(start)
    totals = train_stage(learner, batch_of, every_step, tmp_path / "parts.pt", log=lambda line: None)
    parts = {name: values.clone() for name, values in learner.state_dict().items()}
    learner.load_state_dict(start)
    lines = []
    train_stage(learner, batch_of, SCHEDULE, tmp_path / "whole.pt", log=lines.append)
    assert totals["steps"] == 6 and totals["pictures"] == 12
    assert len(lines) == 2 and "whole step 3/6 patch_loss" in lines[0]
    for name, values in learner.state_dict().items():
        torch.testing.assert_close(values, parts[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds the state of another run"):
        train_stage(learner, batch_of, dataclasses.replace(SCHEDULE, steps=7), tmp_path / "whole.pt")


def test_training_lowers_both_losses(compose, processor, learner, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, steps=40, learning_rate=1e-2)
    probe = make_batch(compose, processor, schedule, 0, seed=0)

    def losses():
        with torch.no_grad():
            found = learner.losses(probe, answers=True)
        return found["patch_loss"].item(), found["answer_loss"].item()

    before = losses()
    train_stage(learner, lambda step: probe, schedule, tmp_path / "s.pt", log=lambda line: None)
    after = losses()
    assert after[0] < 0.8 * before[0] and after[1] < 0.6 * before[1]


def test_gradient_maps_have_the_properties_of_their_methods(compose, processor, learner):
    case = saliency.make_case(learner.model, processor, compose(2), "<image> what do you see ?", "fire and hot dog")
    tokens = range(1, 3)
    with torch.no_grad():
        features = case.features(case.pixel_values)
        rise = case.logprobs(features) - case.logprobs(torch.zeros_like(features))
    integrated = saliency.integrated_gradients(case, tokens, on_pixels=False)
    torch.testing.assert_close(integrated.sum(1), rise[0, 1:3], rtol=0.02, atol=1e-3)  # completeness
    before = learner.model.config.text_config._attn_implementation
    relevance = saliency.attention_relevance(case, tokens)
    assert learner.model.config.text_config._attn_implementation == before
    others = [
        saliency.input_x_gradient(case, tokens, on_pixels=True),
        saliency.input_x_gradient(case, tokens, on_pixels=False),
        saliency.integrated_gradients(case, tokens, on_pixels=True),
        saliency.random_map(case, tokens, seed=0),
        saliency.grad_cam(case, tokens),
    ]
    assert all(scores.shape == (2, GRID * GRID) for scores in [integrated, relevance, *others])
    assert (relevance >= 0).all() and (others[-1] >= 0).all()


def test_examples_come_back_as_they_were_written(compose, tmp_path):
    material = [(compose(seed), ask(compose(seed), np.random.default_rng(seed))) for seed in range(2)]
    write_examples(material, tmp_path)
    for (picture, questions), example in zip(material, load_examples(tmp_path), strict=True):
        assert np.array_equal(picture.pixels, example.picture.pixels)
        assert np.array_equal(picture.masks, example.picture.masks)
        assert (picture.things, picture.places) == (example.picture.things, example.picture.places)
        assert tuple(questions) == example.questions


def test_the_checkpoint_answers_held_out_questions_of_the_kinds_it_has_learned(trained):
    model, processor = trained
    right = {kind: [] for kind in EXPLAINED}
    for example in load_examples():
        asked = [one for one in example.questions if one.kind in EXPLAINED]
        given = answer(model, processor, [example.picture] * len(asked), [one.prompt for one in asked])
        for one, text in zip(asked, given, strict=True):
            right[one.kind].append(one.answer == text)
    assert sum(right["what"]) >= 0.9 * len(right["what"])
    assert sum(right["list"]) >= 0.6 * len(right["list"])


def test_items_name_the_tokens_that_speak_of_an_object(trained):
    model, processor = trained
    material = [(example.picture, list(example.questions)) for example in load_examples()]
    items = right_items(model, processor, material)
    assert len(items["list"]) >= 6
    for one in items["list"] + items["what"]:
        ids = one.case.answer_ids[one.tokens.start : one.tokens.stop]
        assert processor.tokenizer.decode(ids) == NAMES[one.picture.things[one.object]]
        assert one.shares.sum() > 2


def test_the_card_s_code_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (CHECKPOINT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(code, {})
    assert capsys.readouterr().out.strip() == load_examples()[0].questions[0].answer


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*")) < 8e6
