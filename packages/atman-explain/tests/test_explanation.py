"""The result object: its sums, its groups, its file, and what it refuses."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from atman_explain.remote import json_atman, records_atman
from atman_explain.remote.explanation_atman import Explanation, Target
from atman_explain.remote.units_atman import Unit

TOKENS = ("Oslo", " is", " nice", ".", " The", " capital", ".")
NAN = math.nan


def text_units(tokens=TOKENS):
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    return tuple(Unit(text=token, columns=(i,), span=(ends[i] - len(token), ends[i])) for i, token in enumerate(tokens))


def example(scores=None, **fields):
    scores = torch.tensor([[3.0, -1.0, 0.5, 0.0, 2.0, 0.25, 0.0]]) if scores is None else scores
    targets = tuple(Target(text=f" t{i}", id=10 + i) for i in range(len(scores)))
    defaults = {
        "scores": scores,
        "units": text_units(),
        "targets": targets,
        "baseline_logprobs": torch.tensor([-0.5] * len(scores), dtype=scores.dtype),
        "prompt": "".join(TOKENS),
        "prompt_ids": tuple(range(len(TOKENS))),
        "tokens": TOKENS,
        "special": (False,) * len(TOKENS),
        "config": {"mode": "shift_min", "layers": [0, 1], "factor": None},
    }
    return Explanation(**defaults | fields)


def image_example(scores=None):
    """Four patches of image 0 (2 x 2), one tile of image 1 (1 x 3), one word."""
    units = [Unit(text="", columns=(i,), kind="image", image=0, box=(i // 2, i % 2, 1, 1)) for i in range(4)]
    units += [Unit(text="", columns=(4, 5, 6), kind="image", image=1, box=(0, 0, 1, 3)), Unit(text="hi", columns=(7,))]
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [10.0] * 6]) if scores is None else scores
    return example(scores, units=tuple(units), grids=((2, 2), (1, 3)), prompt=None)


def test_top_ranks_support_and_skips_what_was_not_computed():
    explanation = example(torch.tensor([[1.0, NAN, -5.0, 2.0, 2.0, 0.0, 0.0]]))
    assert [(unit.text, score) for unit, score in explanation.top(3)] == [(".", 2.0), (" The", 2.0), ("Oslo", 1.0)]
    assert len(explanation.top(100)) == 6


def test_top_sums_targets_unless_one_is_named():
    explanation = example(torch.tensor([[1.0, 0.0, 3.0, 0, 0, 0, 0], [0.0, 9.0, -3.0, 0, 0, 0, 0]]))
    assert explanation.top(1)[0][0].text == " is"
    assert explanation.top(1, target=0)[0][0].text == " nice"
    with pytest.raises(ValueError, match=r"target must lie in \[0, 2\) \(one per target token\), got 2"):
        explanation.top(1, target=2)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        explanation.top(0)


def test_total_adds_targets_and_their_log_probabilities():
    total = example(torch.arange(14.0).reshape(2, 7)).total()
    assert total.scores.tolist() == [[7.0, 9.0, 11.0, 13.0, 15.0, 17.0, 19.0]]
    assert total.targets == (Target(text=" t0 t1", id=None),)
    assert total.baseline_logprobs.tolist() == [-1.0]
    assert total.config["target_granularity"] == "complete"
    assert example().total().targets == example().targets


def test_normalized_maps_each_target_to_0_and_1():
    scores = torch.tensor([[-1.0, 0.0, 1.0, 3.0, NAN, 0, 0], [2.0] * 7, [NAN] * 7])
    result = example(scores).normalized()
    assert result.scores[0, :4].tolist() == [0.0, 0.25, 0.5, 1.0]
    assert result.scores[0, 4].isnan()
    assert result.scores[1].tolist() == [0.0] * 7
    assert result.scores[2].isnan().all()
    assert result.score_unit == "normalized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_post_processing_keeps_dtype_and_says_what_it_did(dtype):
    explanation = example(torch.tensor([[-2.0, 1.0, 0, 0, 0, 0, 0]], dtype=dtype))
    squared, absolute = explanation.squared(), explanation.absolute()
    assert squared.scores[0, :2].tolist() == [4.0, 1.0] and squared.score_unit == "nats²"
    assert absolute.scores[0, :2].tolist() == [2.0, 1.0] and absolute.score_unit == "|nats|"
    assert {each.scores.dtype for each in (squared, absolute, explanation.normalized(), explanation.total())} == {dtype}
    assert explanation.score_unit == "nats" and "postprocess" not in explanation.config


def test_sentences_add_up_their_tokens():
    explanation = example(is_coarse=(True, False, False, False, False, False, False))
    result = explanation.aggregate("sentence")
    assert [unit.text for unit in result.units] == ["Oslo is nice.", " The capital."]
    assert [unit.columns for unit in result.units] == [(0, 1, 2, 3), (4, 5, 6)]
    assert result.scores.tolist() == [[2.5, 2.25]]
    assert result.is_coarse == (True, False)
    assert result.aggregate("paragraph").scores.tolist() == [[4.75]]


def test_words_join_their_punctuation_and_spaces():
    assert [unit.text for unit in example().aggregate("word").units] == ["Oslo", " is", " nice.", " The", " capital."]


def test_groups_of_indices_become_the_units():
    result = example().aggregate([[4, 5], [0, 2]])
    assert [(unit.text, unit.columns, unit.span) for unit in result.units] == [
        (" The capital", (4, 5), (13, 25)),
        ("Oslo …  nice", (0, 2), None),
    ]
    assert result.scores.tolist() == [[2.25, 3.5]]


def test_image_units_stay_alone_by_text_and_join_to_rectangles_by_index():
    explanation = image_example()
    explanation = replace(
        explanation, prompt="hi", units=(*explanation.units[:5], replace(explanation.units[5], span=(0, 2)))
    )
    assert explanation.aggregate("word").units == explanation.units
    joined = explanation.aggregate([[0, 1], [0, 3]]).units
    assert [unit.box for unit in joined] == [(0, 0, 1, 2), None]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("token", 'groups must be "word", "sentence", "paragraph" or lists of units, got \'token\''),
        ([], "groups must hold at least one list of units"),
        ([[0], []], r"groups\[1\] must hold at least one unit, each once, got \[\]"),
        ([[1, 1]], r"groups\[0\] must hold at least one unit, each once, got \[1, 1\]"),
        ([[7]], r"groups\[0\] must hold unit indices in \[0, 7\), got \[7\]"),
        ([[-1]], r"groups\[0\] must hold unit indices in \[0, 7\), got \[-1\]"),
    ],
)
def test_bad_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        example().aggregate(groups)


def test_groups_need_text_and_one_kind():
    with pytest.raises(ValueError, match="needs the prompt's text, but only ids were given; pass lists of units"):
        replace(example(), prompt=None).aggregate("word")
    with pytest.raises(ValueError, match=r"needs the place of unit 0 \('Oslo'\) in the text"):
        replace(example(), units=tuple(replace(unit, span=None) for unit in text_units())).aggregate("word")
    with pytest.raises(ValueError, match=r"groups\[0\] must hold units of one kind and one image"):
        image_example().aggregate([[3, 4]])


def test_image_map_lays_patches_and_tiles_out():
    explanation = image_example()
    assert explanation.image_map(0, target=0).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert explanation.image_map(1).tolist() == [[15.0, 15.0, 15.0]]
    part = explanation.aggregate([[0], [1], [2]])
    assert part.image_map(0, 0)[1, 1].isnan()
    with pytest.raises(ValueError, match='image 1 has no units; explain with units="all" or units="image"'):
        part.image_map(1)
    with pytest.raises(ValueError, match="i must be the index of one of the 2 images of the prompt, got 2"):
        explanation.image_map(2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": torch.zeros(1, 6)}, r"scores must be \[targets, units\] = \[1, 7\], got \[1, 6\]"),
        ({"baseline_logprobs": torch.zeros(2)}, r"baseline_logprobs must be \[targets\] = \[1\], got \[2\]"),
        ({"tokens": ("a",)}, r"tokens must have one entry per prompt id \(7\), got 1"),
        ({"special": (True,)}, r"special must have one entry per prompt id \(7\) or none, got 1"),
        ({"is_coarse": (True,)}, r"is_coarse must have one entry per unit \(7\), got 1"),
        ({"units": ()}, "targets and units must not be empty, got 1 targets and 0 units"),
    ],
)
def test_fields_that_disagree_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        example(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_explanations_come_back_exactly(tmp_path, dtype):
    scores = torch.randn(2, 7, dtype=dtype)
    scores[1, 3] = NAN
    units = (
        replace(text_units()[0], shares=(0.5,)),
        *text_units()[1:6],
        Unit(text="\ud800\n", columns=(9,), kind="target"),
    )
    explanation = example(scores, units=units, is_coarse=(True,) + (False,) * 6)
    explanation.save(tmp_path / "e.json")
    loaded = Explanation.load(tmp_path / "e.json")
    assert torch.equal(loaded.scores.nan_to_num(7.0), scores.nan_to_num(7.0)) and loaded.scores.dtype == dtype
    assert loaded.units == explanation.units and loaded.targets == explanation.targets
    assert loaded.to_dict() == explanation.to_dict()
    assert json.loads((tmp_path / "e.json").read_text())["scores"][1][3] is None
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_images_come_back_too():
    explanation = image_example()
    loaded = Explanation.from_dict(json.loads(json.dumps(explanation.to_dict())))
    assert loaded.units == explanation.units and loaded.grids == explanation.grids
    assert torch.equal(loaded.image_map(1), explanation.image_map(1))


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    example().save(tmp_path / "e.json")
    before = (tmp_path / "e.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(json_atman.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        example().total().save(tmp_path / "e.json")
    assert (tmp_path / "e.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_infinite_scores_and_odd_settings_cannot_be_written():
    with pytest.raises(ValueError, match=r"scores\[0\] must not be infinite to be written as JSON"):
        example(torch.tensor([[math.inf] + [0.0] * 6])).to_dict()
    with pytest.raises(
        ValueError, match=r"config\.dtype must be a finite number, a text, a list or an object, got dtype"
    ):
        example(config={"dtype": torch.float32}).to_dict()


def at(values, path, value):
    values = copy.deepcopy(values)
    part = values
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other", "format must be 'atman-explanation', got 'other'"),
        (["version"], True, "version must be an integer, got True"),
        (["version"], 2, r"version must lie in \[1, 1\], got 2"),
        (["dtype"], "float16", r"dtype must be one of \['float32', 'float64'\], got 'float16'"),
        (["dtype"], ["float32"], "dtype must be a string, got list"),
        (["scores", 0, 2], NAN, r"scores\[0\]\[2\] must be a number in .*, got nan"),
        (["scores", 0, 2], math.inf, r"scores\[0\]\[2\] must be a number in .*, got inf"),
        (["scores", 0, 2], True, r"scores\[0\]\[2\] must be a number in .*, got True"),
        (["scores", 0, 2], "1", r"scores\[0\]\[2\] must be a number in .*, got '1'"),
        (["scores", 0, 2], 1e39, r"scores\[0\]\[2\] must be a number in \[-3.4e\+38, 3.4e\+38\], got 1e\+39"),
        (["scores", 0, 2], 10**200, r"scores\[0\]\[2\] must be a number in .*, got int of 665 bits"),
        (["scores", 0], [1.0], r"scores\[0\] must have 7 entries, got 1"),
        (["scores"], [], "scores must have 1 entries, got 0"),
        (["baseline_logprobs", 0], {}, r"baseline_logprobs\[0\] must be a number in .*, got dict"),
        (["targets", 0, "id"], -1, r"targets\[0\]\.id must lie in \[0, \d+\], got -1"),
        (["targets", 0, "name"], "x", r"targets\[0\] must not have the key 'name'"),
        (["units", 1, "columns"], [0, 1.0], r"units\[1\]\.columns\[1\] must be an integer, got 1.0"),
        (["units", 1, "kind"], "audio", r"units\[1\]\.kind must be one of \['text', 'image', 'target'\], got 'audio'"),
        (["units", 1, "span"], [1], r"units\[1\]\.span must have 2 entries, got 1"),
        (["units", 1, "image"], 0, r"units\[1\]\.image must lie in \[0, -1\], got 0"),
        (["units", 1, "box"], [0, 0, 1, 1], r"units\[1\]\.box must lie in the patch grid of the unit's image \(None\)"),
        (["units", 1, "shares"], [0.5, 0.5], r"units\[1\]\.shares must have 1 entries, got 2"),
        (["units", 1, "text"], None, r"units\[1\]\.text must be a string, got NoneType"),
        (["is_coarse"], [1] * 7, r"is_coarse\[0\] must be true or false, got 1"),
        (["prompt"], 3, "prompt must be a string, got int"),
        (["prompt_ids", 0], True, r"prompt_ids\[0\] must be an integer, got True"),
        (["tokens"], "Oslo", "tokens must be a list, got str"),
        (["special"], [False], r"special must have one entry per prompt id \(7\) or none, got 1"),
        (["grids"], [[0, 3]], r"grids\[0\]\[0\] must lie in \[1, \d+\], got 0"),
        (["grids"], [[1 << 20, 1 << 20]], "grids must have at most 4194304 patches in all"),
        (["config"], [], "config must be an object, got list"),
        (["config", "factor"], NAN, "config.factor must be a finite number, a text, a list or an object, got nan"),
        (["surprise"], 1, "explanation must not have the key 'surprise'"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        Explanation.from_dict(at(example().to_dict(), path, value))


@pytest.mark.parametrize("values", [None, [], "{}", {}])
def test_what_is_no_record_is_refused(values):
    with pytest.raises(ValueError, match=r"explanation must (be an object|have the key 'format')"):
        Explanation.from_dict(values)


def test_size_is_checked_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(records_atman, "MAX_SCORES", 6)
    with pytest.raises(ValueError, match="scores must have at most 6 entries, got 1 x 7"):
        Explanation.from_dict(example().to_dict())
    monkeypatch.setattr(json_atman, "MAX_ENTRIES", 5)
    with pytest.raises(ValueError, match="units must have at most 5 entries, got 7"):
        Explanation.from_dict(example().to_dict())


def test_nested_settings_end_somewhere():
    deep = value = {}
    for _ in range(30):
        value["x"] = {}
        value = value["x"]
    with pytest.raises(ValueError, match="must be at most 8 levels deep"):
        Explanation.from_dict(at(example().to_dict(), ["config"], deep))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "format": 2}', "e.json: key 'format' must not occur twice"),
        ('{"format"', "e.json: is not valid JSON at line 1, column 10"),
        ("[" * 100_000, "e.json: "),
        ("[]", "e.json: explanation must be an object, got list"),
        ("\xff", "e.json: "),
    ],
    ids=["repeated-key", "cut-off", "deep", "list", "not-utf-8"],
)
def test_damaged_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "e.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        Explanation.load(path)


def test_missing_and_oversized_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"e\.json: cannot be read: No such file"):
        Explanation.load(tmp_path / "e.json")
    example().save(tmp_path / "e.json")
    monkeypatch.setattr(json_atman, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match=r"e\.json: must be at most 10 bytes"):
        Explanation.load(tmp_path / "e.json")


@pytest.mark.slow  # inseq takes seconds to import
def test_inseq_gets_prompt_and_target_rows():
    pytest.importorskip("inseq")
    scores = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])
    units = (
        Unit(text="ab", columns=(0, 1)),
        Unit(text="c", columns=(2,), shares=(0.5,)),
        Unit(text="t0", columns=(4,), kind="target"),
    )
    explanation = example(scores, units=units, prompt_ids=(5, 6, 7, 8), tokens=("a", "b", "c", "!"), special=())
    result = explanation.to_inseq()
    assert [token.token for token in result.source] == ["a", "b", "c", "!"]
    assert [(token.token, token.id) for token in result.target[4:]] == [(" t0", 10), (" t1", 11)]
    expected = [[1.0, 3.0], [1.0, 3.0], [1.0, 2.0], [0.0, 0.0], [NAN, 5.0], [NAN, NAN]]
    torch.testing.assert_close(result.target_attributions, torch.tensor(expected), equal_nan=True)
    assert result.attr_pos_start == 4
    assert result.step_scores["probability"].tolist() == pytest.approx([math.exp(-0.5)] * 2)
    assert "t0" in result.show(display=False, return_html=True)


@pytest.mark.slow  # inseq takes seconds to import
def test_inseq_refuses_sums_and_images():
    pytest.importorskip("inseq")
    with pytest.raises(ValueError, match="targets must be single tokens for inseq, got a sum"):
        example(torch.zeros(2, 7)).total().to_inseq()
    with pytest.raises(ValueError, match="units must be tokens of prompt or target for inseq, but unit 2 is ''"):
        replace(image_example(), prompt_ids=(), tokens=(), special=()).to_inseq()


def test_short_description_does_not_draw():
    assert repr(example()) == "Explanation(units=7, targets=1, target=' t0')"
