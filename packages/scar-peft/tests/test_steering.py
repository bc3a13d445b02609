"""Strengths: until told otherwise, inside a block, for one call; by row, by layer, by position."""

import asyncio
import copy
import pickle
import threading
import warnings

import pytest
import torch
from transformers import pipeline

from scar_peft import ScarConfig, record_scores, scar_layers, set_steering, steering
from tests.support import scar_models as tiny

STRENGTHS = [0.5, -1.0, 0.0]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return tiny.adapted()


def generated(model, ids=None, **options):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None} | options
    return model.generate(input_ids=tiny.some_ids() if ids is None else ids, **settings)


@pytest.mark.parametrize("rule", ["scale", "set", "add", "add_gated"])
def test_strengths_by_row_are_those_of_the_rows_alone(model, rule):
    together = tiny.logits(model, steering={"a": STRENGTHS, "b": 0.5}, rule=rule)
    for row, strength in enumerate(STRENGTHS):
        alone = tiny.logits(model, tiny.some_ids()[row : row + 1], steering={"a": strength, "b": 0.5}, rule=rule)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generated_rows_are_those_of_the_rows_alone(model, search):
    copies = search.get("num_return_sequences", 1)
    strengths = [8.0, -8.0, 0.0]
    together = generated(model, steering={"a": strengths}, rule="add", **search)
    assert together.shape == (3 * copies, 14)
    for row, strength in enumerate(strengths):
        alone = generated(model, tiny.some_ids()[row : row + 1], steering={"a": strength}, rule="add", **search)
        assert torch.equal(together[row * copies : (row + 1) * copies], alone)
    assert not torch.equal(together, generated(model, **search))


def test_sampled_sequences_of_one_request_share_its_strength(model):
    def sampled(strength):
        torch.manual_seed(0)
        return generated(model, steering={"a": strength}, rule="add", do_sample=True, num_return_sequences=2)

    expected = sampled(torch.tensor(STRENGTHS))
    assert torch.equal(sampled([s for s in STRENGTHS for _ in range(2)]), expected)


def test_left_padding_changes_nothing(model):
    ids = tiny.some_ids()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :5]], 1)
    mask = (padded != 0).long()
    batch, masks = torch.cat([ids[1:2], padded]), torch.cat([torch.ones(1, 9, dtype=torch.long), mask])
    positions = (masks.cumsum(-1) - 1).clamp(min=0)
    for rule in ("scale", "add"):
        together = tiny.logits(
            model, batch, attention_mask=masks, position_ids=positions, steering={"a": 2.0}, rule=rule
        )
        alone = tiny.logits(model, ids[:1, :5], steering={"a": 2.0}, rule=rule)
        torch.testing.assert_close(together[1:, 4:], alone, rtol=1e-5, atol=1e-5)
    tokens = generated(model, batch, attention_mask=masks, steering={"a": 8.0}, rule="add")
    assert torch.equal(tokens[1, 9:], generated(model, ids[:1, :5], steering={"a": 8.0}, rule="add")[0, 5:])


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generation_is_steered_alike_with_every_cache(model, cache):
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    padded = tiny.some_ids().clone()
    padded[0, :4] = 0
    mask = (padded != 0).long()
    expected = generated(model, padded, attention_mask=mask, steering={"a": STRENGTHS}, rule="add")
    found = generated(model, padded, attention_mask=mask, steering={"a": STRENGTHS}, rule="add", **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["mask", "positional mask", "position_ids", "nothing"])
@pytest.mark.parametrize("rule", ["add", "add_gated", "scale"])
def test_the_first_token_is_left_alone_by_rules_that_add(rule, way):
    base = tiny.built().model  # without a head, so that arguments may come by position
    model = tiny.adapted(base, layers=[1], task_type="FEATURE_EXTRACTION").base_model
    ids = tiny.some_ids()
    mask = torch.ones_like(ids)
    if way in ("mask", "positional mask"):
        mask[0, :4] = 0
    args, kwargs = ((ids, mask) if way == "positional mask" else (ids,)), {}
    if way == "mask":
        kwargs["attention_mask"] = mask
    if way == "position_ids":  # two sequences in one row
        kwargs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3)
    (layer,) = scar_layers(model)
    with tiny.outputs_of(layer.get_base_layer()) as seen:
        model(*args, **kwargs)
        model(*args, **kwargs, steering={"a": [2.0, -2.0, 1.0], "b": 0.3}, rule=rule)
    is_same = (seen[0] == seen[1]).all(-1)
    expected = torch.zeros(3, 9, dtype=torch.bool)
    if rule != "scale":
        expected[:, 0] = True
        if way in ("mask", "positional mask"):
            expected[0, 0], expected[0, 4] = False, True
        if way == "position_ids":
            expected[:, 4] = True
    real = mask.bool()
    assert torch.equal(is_same[real], expected[real]) if rule != "scale" else not is_same[:, 0].all()


def test_the_first_token_is_only_left_alone_once(model):
    """Not at every step of a generation."""
    (layer, _) = scar_layers(model)
    with tiny.outputs_of(layer.get_base_layer()) as neutral:
        generated(model, max_new_tokens=3)
    with tiny.outputs_of(layer.get_base_layer()) as steered:
        generated(model, max_new_tokens=3, steering={"a": 2.0}, rule="add")
    assert torch.equal(neutral[0][:, 0], steered[0][:, 0])
    assert not (neutral[0][:, 1:] == steered[0][:, 1:]).all(-1).any()
    assert not (neutral[1] == steered[1]).all(-1).any()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
def test_positions_choose_prompt_or_generated_tokens(model, options):
    (layer, _) = scar_layers(model)
    for length in (1, 9):
        ids = tiny.some_ids(length=length)
        for positions, expected in (("prompt", [True, False, False]), ("generated", [False, True, True])):
            # A model that is only watched by a neighbor of the target, before and after the change of that target.
            changed = []
            handle = layer.get_base_layer().register_forward_hook(
                lambda module, args, output, changed=changed: changed.append(output.clone()), prepend=True
            )
            with tiny.outputs_of(layer.get_base_layer()) as after:
                request = {"steering": {"a": 3.0}, "rule": "set", "positions": positions}
                generated(model, ids, max_new_tokens=3, **request, **options)
            handle.remove()
            found = [not torch.equal(x, y) for x, y in zip(changed, after, strict=True)]
            assert found == expected, (length, positions)


def test_assisted_tokens_count_as_generated(model):
    assistant = tiny.built()
    request = {"steering": {"a": 8.0}, "rule": "add", "positions": "generated"}
    ids = tiny.some_ids(1)
    expected = generated(model, ids, max_new_tokens=6, **request)
    assert torch.equal(generated(model, ids, max_new_tokens=6, assistant_model=assistant, **request), expected)
    assert not torch.equal(generated(model, ids, max_new_tokens=6), expected)


def test_positions_come_from_the_configuration_too():
    model = tiny.adapted(steering_positions="generated")
    assert torch.equal(tiny.logits(model, steering={"a": 2.0}), tiny.logits(model))
    assert not torch.equal(tiny.logits(model, steering={"a": 2.0}, positions="all"), tiny.logits(model))


def test_strengths_by_layer(model):
    for index in (1, 2):
        for layer in scar_layers(model):
            with tiny.outputs_of(layer.get_base_layer()) as seen:
                tiny.logits(model)
                tiny.logits(model, steering={"a": {index: 2.0}})
            if layer.layer_index <= index:
                assert torch.equal(*seen) == (layer.layer_index < index)
    by_layer = tiny.logits(model, steering={"a": {1: 2.0, 2: 2.0}})
    assert torch.equal(by_layer, tiny.logits(model, steering={"a": 2.0}))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"steering": {"c": 1.0}}, r"steering must name concepts of the adapter, \['a', 'b'\], got \['c'\]"),
        ({"steering": {"a": float("nan")}}, r'steering\["a"\] must be finite, got nan'),
        ({"steering": {"a": [1.0, float("inf")]}}, r'steering\["a"\] must be finite, got \[1.0, inf\]'),
        ({"steering": {"a": "strong"}}, r'steering\["a"\] must be a number, or one number per row of the batch, got'),
        ({"steering": {"a": True}}, r'steering\["a"\] must be a number, or one number per row of the batch, got True'),
        ({"steering": {"a": [[1.0]]}}, r'steering\["a"\] must be a number, or one .*, got the shape \(1, 1\)'),
        ({"steering": {"a": []}}, r'steering\["a"\] must be a number, or one .*, got the shape \(0,\)'),
        ({"steering": {"a": {5: 1.0}}}, r'steering\["a"\] must name layers of the adapter, \[1, 2\], got \[5\]'),
        (
            {"steering": {"a": [1.0, 2.0]}},
            "steering must give one strength per row of the batch, got 2 strengths for 3",
        ),
        ({"steering": {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0]}}, r"strengths for as many rows, got \[2, 3\] rows"),
        ({"steering": {"a": 1.0}, "rule": "push"}, "rule must be one of scale, set, add, add_gated, got 'push'"),
        ({"steering": {"a": 1.0}, "mode": "x"}, "mode must be one of residual, reconstruct, got 'x'"),
        ({"steering": {"a": 1.0}, "positions": "x"}, "positions must be one of all, generated, prompt, got 'x'"),
        ({"rule": "add"}, "rule and positions need strengths to go with"),
    ],
)
def test_bad_requests_are_named_and_change_nothing(model, request_, message):
    model.set_steering("b", 0.5)
    expected = tiny.logits(model)
    with pytest.raises(ValueError, match=message):
        tiny.logits(model, **request_)
    assert torch.equal(tiny.logits(model), expected)
    if "rows" not in message and "row of the batch, got 2" not in message:  # those that do not depend on the batch
        with pytest.raises(ValueError, match=message):
            model.set_steering(**request_)
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("a", 1.0), {"scale": 2.0}, "scale must be given without a strength"),
        (("a",), {"scale": 2.0, "rule": "add"}, "scale must be given without a strength"),
        (("a",), {"scale": float("inf")}, "scale must be finite, got inf"),
        (({"a": 1.0},), {"scale": 2.0}, "strength and scale need the name of one concept"),
        ((None, 1.0), {}, "strength and scale need the name of one concept"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(model, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.set_steering(*args, **kwargs)


def test_a_model_without_adapters_says_so():
    for call in (lambda base: set_steering(base, "a", 1.0), lambda base: record_scores(base).__enter__()):
        with pytest.raises(ValueError, match="model must hold SCAR layers, got a LlamaForCausalLM without any"):
            call(tiny.built())


def test_set_steering_holds_until_the_next_call(model):
    neutral = tiny.logits(model)
    model.set_steering("a", 1.0)
    a = tiny.logits(model)
    assert torch.equal(a, tiny.logits(model, steering={"a": 1.0}) if model.set_steering(None) is None else None)
    model.set_steering("a", 1.0)
    model.set_steering({"b": -1.0}, rule="scale")
    both = tiny.logits(model)
    assert not torch.equal(both, a)
    model.set_steering("b", None)
    assert torch.equal(tiny.logits(model), a)
    model.set_steering(None)
    assert torch.equal(tiny.logits(model), neutral)
    set_steering(model.get_base_model(), {"a": 1.0})  # any module tree
    assert torch.equal(tiny.logits(model), a)


def test_scale_counts_as_the_original_does(model):
    model.set_steering("a", scale=-100.0)
    expected = tiny.logits(model)
    model.set_steering("a", -101.0, rule="scale")
    assert torch.equal(tiny.logits(model), expected)


def test_blocks_nest_and_end(model):
    neutral = tiny.logits(model)
    with steering(model, a=1.0):
        a = tiny.logits(model)
        with steering(model, {"b": 2.0}):
            both = tiny.logits(model)
            with steering(model, a=None):
                only_b = tiny.logits(model)
        assert torch.equal(tiny.logits(model), a)
    assert torch.equal(tiny.logits(model), neutral)
    assert torch.equal(both, tiny.logits(model, steering={"a": 1.0, "b": 2.0}))
    assert torch.equal(only_b, tiny.logits(model, steering={"b": 2.0}))


def test_set_steering_inside_a_block_outlasts_it_and_leaves_the_blocks_strengths_behind(model):
    b = tiny.logits(model, steering={"b": 2.0})
    both = tiny.logits(model, steering={"a": 1.0, "b": 2.0})
    with steering(model, a=1.0):
        model.set_steering("b", 2.0)
        assert torch.equal(tiny.logits(model), both)
    assert torch.equal(tiny.logits(model), b)
    with steering(model, a=1.0):
        model.set_steering(None)
    assert torch.equal(tiny.logits(model), tiny.logits(model, steering={"b": 0.0}))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_strengths_end_with_an_exception(model, error):
    neutral = tiny.logits(model)

    def fail(module, args, output):
        raise error

    handle = model.get_base_model().lm_head.register_forward_hook(fail)
    with pytest.raises(error):
        generated(model, steering={"a": 1.0}, return_concept_scores=True)
    with pytest.raises(error):
        tiny.logits(model, steering={"a": 1.0})
    with pytest.raises(error), steering(model, a=1.0), record_scores(model):
        tiny.logits(model)
    handle.remove()
    assert torch.equal(tiny.logits(model), neutral)
    assert not scar_layers(model)[0]._live_recorders


def test_threads_do_not_see_each_others_blocks(model):
    strengths = [0.0, 0.5, -1.0, 3.0]
    expected = [tiny.logits(model, steering={"a": strength}) for strength in strengths]
    found, barrier = [[] for _ in strengths], threading.Barrier(len(strengths))

    def work(number):
        with torch.no_grad(), steering(model, a=strengths[number]):
            barrier.wait()
            for _ in range(5):
                found[number].append(tiny.logits(model))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(strengths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, several in zip(expected, found, strict=True):
        assert len(several) == 5
        assert all(torch.equal(each, wanted) for each in several)


def test_threads_with_different_padding_do_not_mix_it_up(model):
    ids = tiny.some_ids()
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][:, :4] = 0
    request = {"steering": {"a": 2.0}, "rule": "add"}
    expected = [tiny.logits(model, ids, attention_mask=mask, **request) for mask in masks]
    found = [[], []]

    def work(number):
        with torch.no_grad():
            for _ in range(10):
                found[number].append(tiny.logits(model, ids, attention_mask=masks[number], **request))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, several in zip(expected, found, strict=True):
        assert len(several) == 10
        assert all(torch.equal(each, wanted) for each in several)


def test_tasks_do_not_see_each_others_blocks(model):
    async def work(strength):
        with steering(model, a=strength):
            await asyncio.sleep(0)
            return tiny.logits(model)

    async def both():
        return await asyncio.gather(work(1.0), work(-1.0))

    one, other = asyncio.run(both())
    assert torch.equal(one, tiny.logits(model, steering={"a": 1.0}))
    assert torch.equal(other, tiny.logits(model, steering={"a": -1.0}))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_steered_model_is_a_model_of_its_own(model, how):
    model.set_steering({"a": 1.0, "b": [1.0, 2.0, 3.0]})
    mask = torch.ones_like(tiny.some_ids())
    expected = tiny.logits(model, attention_mask=mask)
    with record_scores(model):
        tiny.logits(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for layer in scar_layers(twin):  # no inputs travel with a model
        assert layer._last_pass.attention_mask is None
        assert not layer._passes
    assert torch.equal(tiny.logits(twin), expected)
    twin.set_steering(None)
    assert torch.equal(tiny.logits(model), expected)
    assert not torch.equal(tiny.logits(twin), expected)
    with steering(twin, a=5.0):
        assert torch.equal(tiny.logits(model), expected)
    for layer in scar_layers(twin):
        assert layer.get_base_layer().scar is layer
    model.set_steering(None)
    neutral = tiny.logits(model)
    bare = twin.unload()
    assert torch.equal(tiny.logits(bare), neutral)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bare.modules())
    assert not torch.equal(tiny.logits(model, steering={"a": 1.0}), neutral)


def test_a_copy_made_inside_a_block_is_not_steered_by_it(model):
    neutral = tiny.logits(model)
    with steering(model, a=1.0):
        twin = copy.deepcopy(model)
        assert torch.equal(tiny.logits(twin), neutral)


def test_default_steering_holds_from_loading_on(tmp_path):
    from peft import PeftModel

    model = tiny.adapted(default_steering={"a": {1: 2.0}, "b": -1.0}, steering_rule="scale")
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.built(), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), expected)
    assert not torch.allclose(tiny.logits(loaded, steering={"a": None, "b": None}), expected)
    plain = tiny.built()
    plain.load_adapter(tmp_path)  # a program that knows nothing of this package
    torch.testing.assert_close(tiny.logits(plain), expected)


def test_what_is_saved_inside_a_block_is_the_configuration(model, tmp_path):
    with steering(model, a=1.0, rule="scale", mode="reconstruct"):
        model.save_pretrained(tmp_path)
    saved = ScarConfig.from_pretrained(tmp_path)
    assert (saved.default_steering, saved.steering_rule, saved.mode) == (None, "add_gated", "residual")


def test_a_pipeline_is_steered(model):
    from tests.support.tfree import tiny_tfree

    base, tokenizer = tiny_tfree(hidden_size=32, num_hidden_layers=3)
    model = tiny.adapted(base)
    pipe = pipeline("text-generation", model=base, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False}
    neutral = pipe("the house", **options)
    with steering(model, a=20.0, rule="add"):
        assert pipe("the house", **options) != neutral
    assert pipe("the house", **options) == neutral


def test_several_adapters_act_together_in_any_order():
    results = []
    for names in (["first", "second"], ["second", "first"]):
        base = tiny.built().double()
        model = None
        for name in names:
            seed, concepts = {"first": (1, ["a", "b"]), "second": (2, ["c", "d", "e"])}[name]
            config = tiny.settings(concepts=concepts)
            torch.manual_seed(seed)
            if model is None:
                model = tiny.adapted(base, adapter_name=name, seed=seed, concepts=concepts)
            else:
                model.add_adapter(name, config)
                tiny.give_biases(model, name)
        model.base_model.set_adapter(names)
        x, y = tiny.before_and_after(model, scar_layers(model)[0], steering={"a": 1.0, "d": -2.0, "e": 0.5})
        results.append((x, y, tiny.logits(model, steering={"a": 1.0, "d": -2.0, "e": 0.5})))
        model.set_adapter("first")
        _, first = tiny.before_and_after(model, scar_layers(model)[0], steering={"a": 1.0, "d": -2.0, "e": 0.5})
        model.set_adapter("second")
        _, second = tiny.before_and_after(model, scar_layers(model)[0], steering={"a": 1.0, "d": -2.0, "e": 0.5})
        if names[0] == "first":
            torch.testing.assert_close(y - x, (first - x) + (second - x), rtol=0, atol=1e-9)
    assert torch.equal(results[0][0], results[1][0])


def test_the_order_of_activation_does_not_matter():
    model = tiny.adapted(adapter_name="first")
    model.add_adapter("second", tiny.settings(concepts=["c"], mode="reconstruct"))
    request = {"a": 1.0, "c": 0.5}
    model.base_model.set_adapter(["first", "second"])
    expected = tiny.logits(model, steering=request)
    model.base_model.set_adapter(["second", "first"])
    assert torch.equal(tiny.logits(model, steering=request), expected)


def test_adapters_that_share_a_concept_are_both_steered_and_that_is_said_once(caplog):
    from transformers.utils import logging

    model = tiny.adapted(adapter_name="first", concepts=["shared here", "b"])
    model.add_adapter("second", tiny.settings(concepts=["shared here"]))
    one = tiny.logits(model, steering={"shared here": 1.0})
    logger = logging.get_logger("scar_peft.remote.steering_scar")
    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger=logger.name):
            tiny.logits(model, steering={"shared here": 1.0})
            assert not caplog.records  # only one of them is active
            model.base_model.set_adapter(["first", "second"])
            both = [tiny.logits(model, steering={"shared here": 1.0}) for _ in range(3)]
    finally:
        logging.disable_propagation()
    assert not torch.equal(both[0], one)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "the adapters ['first', 'second'] share the concept \"shared here\": strengths apply to each of them."
    ]


def test_a_moved_model_takes_its_strengths_along(model):
    model.set_steering({"a": [1.0, 2.0, 3.0]})
    single = tiny.logits(model)
    model.double()
    assert scar_layers(model)[0]._plans["default"].groups[0].values.dtype == torch.float64
    torch.testing.assert_close(tiny.logits(model), single.double(), rtol=1e-4, atol=1e-4)


def test_nothing_is_said_where_nothing_is_wrong(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with record_scores(model), steering(model, a=1.0):
            tiny.logits(model)
