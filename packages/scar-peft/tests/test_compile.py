"""torch.compile: one graph whatever the strength; eager backends, because only the tracing is at stake."""

import pytest
import torch

from scar_peft import record_scores, steering, swap_weights
from tests.support import scar_models as tiny

SLOW = pytest.mark.slow  # tracing takes seconds


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.fixture
def model():
    return tiny.adapted(tiny.llama(num_hidden_layers=1), layers=[0])


def run(compiled, ids=None):
    return compiled(input_ids=tiny.some_ids() if ids is None else ids, use_cache=False).logits


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["add_gated", *(pytest.param(rule, marks=SLOW) for rule in ("scale", "set", "add"))])
def test_strengths_do_not_compile_again(model, rule):
    counter = Counter()
    base = model.get_base_model()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    model.set_steering("a", 0.1, rule=rule)
    run(compiled)
    run(compiled)
    graphs = counter.graphs
    for strength in range(1, 11):
        model.set_steering("a", strength / 4, rule=rule)
        assert_near(run(compiled), run(base))
    for strength in range(1, 4):
        with steering(model, a=-strength, rule=rule):
            assert_near(run(compiled), run(base))
    assert counter.graphs == graphs == 1


def test_neutral_disabled_and_steered_are_one_graph_each(model):
    counter = Counter()
    base = model.get_base_model()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    neutral = run(compiled)
    assert torch.equal(neutral, run(base))
    assert counter.graphs == 1
    for _ in range(3):
        with steering(model, a=1.0):
            assert_near(run(compiled), run(base))
        assert torch.equal(run(compiled), neutral)
    assert counter.graphs == 2
    model.set_steering("a", 1.0)
    for _ in range(3):
        with model.disable_adapter():
            assert torch.equal(run(compiled), neutral)
        assert_near(run(compiled), run(base))
    assert counter.graphs <= 3


@SLOW
def test_strengths_by_row_do_not_compile_again(model):
    counter = Counter()
    base = model.get_base_model()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    for shift in range(4):
        with steering(model, a=[shift, 1.0, -1.0], b=0.5):
            assert_near(run(compiled), run(base))
    assert counter.graphs == 1


def test_padding_masks_are_seen_by_the_graph(model):
    base = model.get_base_model()
    compiled = torch.compile(base, backend=Counter(), fullgraph=True)
    model.set_steering("a", 2.0, rule="add")
    for pads in (0, 5):
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[0, :pads] = 0
        arguments = {"input_ids": tiny.some_ids(), "attention_mask": mask, "use_cache": False}
        assert_near(compiled(**arguments).logits, base(**arguments).logits)


@SLOW
def test_other_batches_are_one_more_graph_at_most(model):
    counter = Counter()
    base = model.get_base_model()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    model.set_steering("a", 2.0)
    for rows, length in ((3, 9), (2, 11), (4, 7), (5, 12)):
        ids = tiny.some_ids(rows, length)
        assert_near(run(compiled, ids), run(base, ids))
    assert counter.graphs <= 3


@SLOW
def test_the_wrapper_compiles_too(model):
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    model.set_steering("a", 0.5)
    run(compiled)
    graphs = counter.graphs
    for strength in (1.0, 2.0, -1.0):
        model.set_steering("a", strength)
        assert_near(run(compiled), run(model))
    assert counter.graphs == graphs


def test_blocks_compile_on_their_own(model):
    base = model.get_base_model()
    counter = Counter()
    model.set_steering("a", 2.0, rule="add")
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = tiny.logits(base, attention_mask=mask, use_cache=False)
    for block in base.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        assert_near(tiny.logits(base, attention_mask=mask, use_cache=False), expected)
    assert counter.graphs <= 2


@SLOW
def test_recording_breaks_the_graph_and_is_right(model):
    base = model.get_base_model()
    compiled = torch.compile(base, backend=Counter())
    for pads in (0, 4):
        mask = torch.ones(3, 9, dtype=torch.long)
        mask[0, :pads] = 0
        arguments = {"input_ids": tiny.some_ids(), "attention_mask": mask, "use_cache": False}
        with record_scores(model) as wanted:
            base(**arguments)
        with record_scores(model) as found:
            compiled(**arguments)
        assert_near(found.scores["a"], wanted.scores["a"])
        assert torch.equal(found.scores.is_scored, wanted.scores.is_scored)


@SLOW
def test_swapped_weights_do_not_compile_again(model, tmp_path):
    tiny.adapted(tiny.llama(num_hidden_layers=1), layers=[0], seed=6).save_pretrained(tmp_path)
    counter = Counter()
    base = model.get_base_model()
    compiled = torch.compile(base, backend=counter, fullgraph=True)
    model.set_steering("a", 2.0)
    before = run(compiled)
    swap_weights(model, "default", tmp_path)
    assert_near(run(compiled), run(base))
    assert not torch.allclose(run(compiled), before)
    assert counter.graphs == 1


@SLOW
def test_reconstruction_compiles(model):
    base = model.get_base_model()
    compiled = torch.compile(base, backend=Counter())
    with steering(model, a=1.0, mode="reconstruct"):
        assert_near(run(compiled), run(base))


@SLOW
def test_generated_positions_in_a_compiled_decode_step(model):
    base = model.get_base_model()
    ids = tiny.some_ids()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    for request in ({"positions": "generated"}, {"rule": "add"}):
        with steering(model, {"a": 8.0}, **request):
            expected = base.generate(ids, **options)
    forward = base.forward
    base.forward = torch.compile(forward, backend=Counter())
    try:
        for request in ({"positions": "generated"}, {"rule": "add"}):
            with steering(model, {"a": 8.0}, **request):
                found = base.generate(ids, **options)
    finally:
        base.forward = forward
    assert torch.equal(found, expected)


@SLOW
def test_the_default_backend_agrees(model):
    base = model.get_base_model()
    compiled = torch.compile(base, fullgraph=True)
    for strength in (0.5, -2.0):
        model.set_steering("a", strength)
        torch.testing.assert_close(run(compiled), run(base), rtol=1e-3, atol=1e-4)


@SLOW
def test_gradients_through_a_compiled_model_are_those_of_eager(model):
    base = model.get_base_model()
    model.set_steering("a", 1.5)
    found = []
    with torch.enable_grad():
        for forward in (base, torch.compile(base, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            forward(input_ids=tiny.some_ids(), use_cache=False).logits.square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-3)
