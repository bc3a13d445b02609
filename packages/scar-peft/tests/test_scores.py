"""`record_scores` and `return_concept_scores`: every token's scores from the pass that runs anyway."""

import pytest
import torch
from transformers import T5ForConditionalGeneration

from scar_peft import ConceptScores, coder, record_scores, scar_layers, steering
from tests.support import scar_models as tiny
from tests.support.tfree import tiny_tfree


@pytest.fixture
def model():
    with torch.no_grad():
        return tiny.adapted()


def generated(model, ids=None, **options):
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_concept_scores": True} | options
    return model.generate(input_ids=tiny.some_ids() if ids is None else ids, **settings)


def reread(model, sequences, **options):
    """Scores of whole sequences in one pass."""
    with torch.no_grad(), record_scores(model) as record:
        model(input_ids=sequences, **options)
    return record.scores


def assert_belongs_to(scores, model, sequences, **options):
    """What is scored equals what a pass over the whole sequences finds, and the rest is 0."""
    expected = reread(model, sequences, **options)
    assert scores.is_scored.shape == sequences.shape
    for concept in ("a", "b"):
        found = scores[concept]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[scores.is_scored], expected[concept][scores.is_scored], rtol=1e-4, atol=1e-5)
        assert not found[~scores.is_scored].any()


@pytest.mark.parametrize("kind", ["latent", "pre"])
@pytest.mark.parametrize("fields", [{}, {"activation": "topk-sigmoid"}, {"concept_gate": "topk", "gate": "topk"}])
def test_scores_are_those_of_the_coder(fields, kind):
    model = tiny.adapted(tiny.built().double(), layers=[1], **fields)
    (layer,) = scar_layers(model)
    config = layer.config()
    with torch.no_grad(), tiny.outputs_of(layer.get_base_layer()) as seen, record_scores(model, kind) as record:
        model(tiny.some_ids())
    expected = coder.pre_activations(seen[0], layer.weights())
    if kind == "latent":
        expected = coder.latents_of(expected, k=8, activation=config.activation, always=config.always_kept)
    for concept, name in enumerate("ab"):
        torch.testing.assert_close(record.scores[name], expected[..., concept].float())
    assert record.scores.is_scored.all()


def test_scores_are_of_what_the_layer_gets_not_of_what_it_makes(model):
    neutral = reread(model, tiny.some_ids())
    with steering(model, {"a": {2: 3.0}}, rule="set"):
        assert torch.equal(reread(model, tiny.some_ids())["a"], neutral["a"])


def test_layers_have_scores_of_their_own_and_share_a_mean(model):
    with torch.no_grad(), record_scores(model) as record:
        model(tiny.some_ids())
    assert list(record.layers) == [1, 2]
    mean = (record.layers[1]["a"] + record.layers[2]["a"]) / 2
    torch.testing.assert_close(record.scores["a"], mean)


def test_concepts_of_several_adapters_come_together(model):
    model.add_adapter("other", tiny.settings(concepts=["c", "a"], layers=[0]))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad(), record_scores(model) as record:
        model(tiny.some_ids())
    assert sorted(record.scores) == ["a", "b", "c"]
    torch.testing.assert_close(record.scores["a"], sum(record.layers[layer]["a"] for layer in (0, 1, 2)) / 3)


def test_padding_is_not_scored(model):
    ids = tiny.some_ids()
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 6:] = 0, 0
    scores = reread(model, ids, attention_mask=mask)
    assert torch.equal(scores.is_scored, mask.bool())
    assert not scores["a"][mask == 0].any()
    assert scores["a"].isfinite().all()


def test_pooling_counts_scored_tokens_only():
    is_scored = torch.tensor([[False, True, True, True], [True, True, False, False], [False] * 4])
    raw = torch.tensor([[9.0, 1.0, 4.0, -2.0], [-3.0, -1.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    scores = ConceptScores({"a": raw.where(is_scored, 0.0)}, is_scored)
    assert scores.pooled()["a"].tolist() == [1.0, -2.0, 0.0]
    assert scores.pooled("max")["a"].tolist() == [4.0, -1.0, 0.0]
    assert scores.pooled("last")["a"].tolist() == [-2.0, -1.0, 0.0]
    fewer = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    assert scores.pooled("mean", fewer)["a"].tolist() == [2.5, -1.0, 0.0]
    assert scores.pooled("max", fewer)["a"].tolist() == [4.0, -1.0, 0.0]
    assert scores.pooled("last", fewer)["a"].tolist() == [4.0, -1.0, 0.0]


def test_scores_refuse_what_they_do_not_have(model):
    scores = reread(model, tiny.some_ids())
    with pytest.raises(KeyError, match=r"concept must be one of \['a', 'b'\], got 'c'"):
        scores["c"]
    with pytest.raises(ValueError, match="how must be one of mean, max, last, got 'median'"):
        scores.pooled("median")
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of the scores \(3, 9\), got \(3, 8\)"):
        scores.pooled("mean", torch.ones(3, 8))
    with pytest.raises(ValueError, match='kind must be "latent" or "pre", got \'raw\''), record_scores(model, "raw"):
        pass
    with (
        pytest.raises(RuntimeError, match=r"no scores are recorded\. Run the model inside"),
        record_scores(model) as record,
    ):
        _ = record.scores
    with pytest.raises(ValueError, match="return_concept_scores=True needs return_dict=True"):
        model(tiny.some_ids(), return_dict=False, return_concept_scores=True)


def test_scores_print_and_list_their_concepts(model):
    scores = reread(model, tiny.some_ids())
    assert repr(scores) == "ConceptScores(a, b: 3 sequences of 9 tokens)"
    assert (list(scores), len(scores), "a" in scores) == (["a", "b"], 2, True)


def test_forward_returns_scores(model):
    with torch.no_grad():
        output = model(tiny.some_ids(), return_concept_scores=True)
    assert torch.equal(output.concept_scores["a"], reread(model, tiny.some_ids())["a"])
    assert output["concept_scores"] is output.concept_scores


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "eos_token_id": 41},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 4, "num_beams": 3},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_generated_sequences_come_with_their_scores(model, options, strength):
    ids = tiny.some_ids().clone()
    ids[0, :4] = 0
    mask = (ids != 0).long()
    strengths = torch.tensor([1.0, -1.0, 0.5]) * strength
    output = generated(model, ids, attention_mask=mask, steering={"a": strengths}, **options)
    copies = output.sequences.shape[0] // 3
    full = torch.ones_like(output.sequences)
    full[:, :9] = mask.repeat_interleave(copies, 0)
    positions = (full.cumsum(-1) - 1).clamp(min=0)
    with steering(model, a=strengths.repeat_interleave(copies)):
        arguments = {"attention_mask": full, "position_ids": positions}
        assert_belongs_to(output.concept_scores, model, output.sequences, **arguments)
    assert torch.equal(output.concept_scores.is_scored[:, :9], full[:, :9].bool())
    assert not output.concept_scores.is_scored[:, -1].any()  # nobody has read the last token
    if "eos_token_id" not in options:
        assert output.concept_scores.is_scored[:, 9:-1].all()


def test_beams_that_ended_early_are_scored_to_their_end(model):
    plain = generated(model, num_beams=3, max_new_tokens=8).sequences
    end = int(plain[0, 11])
    output = generated(model, num_beams=3, max_new_tokens=8, eos_token_id=end, pad_token_id=0, num_return_sequences=2)
    lengths = [row.index(end, 9) if end in row[9:] else len(row) - 1 for row in output.sequences.tolist()]
    assert output.concept_scores.is_scored.sum(1).tolist() == lengths
    assert min(lengths) < max(lengths)
    assert_belongs_to(output.concept_scores, model, output.sequences)


def test_rows_that_ended_early_are_scored_to_their_end(model):
    """A greedy search goes on feeding padding to them."""
    end = int(generated(model).sequences[1, 10])
    output = generated(model, eos_token_id=end, pad_token_id=0, max_new_tokens=8)
    for row, is_scored in zip(output.sequences.tolist(), output.concept_scores.is_scored, strict=True):
        last = row.index(end, 9) if end in row[9:] else len(row) - 2
        assert is_scored.tolist() == [column <= last for column in range(len(row) - 1)] + [False]
    assert not output.concept_scores.is_scored[1, 11:].any()
    assert_belongs_to(output.concept_scores, model, output.sequences)


@pytest.mark.parametrize("guess", ["an assistant", "the prompt"])
def test_refused_guesses_leave_no_scores(model, guess):
    """Assisted generation reads guesses that it then takes back."""
    ids = tiny.some_ids(1).repeat(1, 2)
    options = {"assistant_model": tiny.built(seed=3)} if guess == "an assistant" else {"prompt_lookup_num_tokens": 3}
    request = {"steering": {"a": 2.0}, "max_new_tokens": 10}
    output = generated(model, ids, **options, **request)
    expected = generated(model, ids, **request)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.concept_scores.is_scored, expected.concept_scores.is_scored)
    torch.testing.assert_close(output.concept_scores["a"], expected.concept_scores["a"], rtol=1e-4, atol=1e-5)


def test_a_cache_from_before_leaves_its_tokens_unscored(model):
    ids = tiny.some_ids()
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        output = generated(model, ids, past_key_values=cache)
    assert output.concept_scores.is_scored.tolist() == [[False] * 6 + [True] * 7 + [False]] * 3
    assert_belongs_to(output.concept_scores, model, output.sequences)


def test_a_prompt_of_embeddings_is_scored_too(model):
    ids = tiny.some_ids()
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_concept_scores": True}
        output = model.generate(inputs_embeds=embeddings, **settings)
    assert output.sequences.shape == (3, 5)
    assert output.concept_scores.is_scored.tolist() == [[True] * 13 + [False]] * 3
    assert_belongs_to(output.concept_scores, model, torch.cat([ids, output.sequences], 1))


def test_without_a_prompt(model):
    output = model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None, return_concept_scores=True)
    assert output.concept_scores.is_scored.tolist() == [[True, True, True, False]]
    assert_belongs_to(output.concept_scores, model, output.sequences)


def test_sequences_of_an_encoder_decoder():
    base = tiny.built(tiny.t5)
    assert isinstance(base, T5ForConditionalGeneration)
    model = tiny.adapted(base, task_type="SEQ_2_SEQ_LM", site="mlp")
    output = generated(model, steering={"a": [1.0, 0.0, -1.0]}, num_beams=2)
    assert output.sequences.shape == (3, 6)
    assert output.concept_scores.is_scored.tolist() == [[True] * 5 + [False]] * 3
    with torch.no_grad(), record_scores(model) as record:
        model(input_ids=tiny.some_ids(), decoder_input_ids=output.sequences, steering={"a": [1.0, 0.0, -1.0]})
    torch.testing.assert_close(record.scores["b"][:, :-1], output.concept_scores["b"][:, :-1], rtol=1e-4, atol=1e-5)


def test_consecutive_passes_over_a_cache_are_one_sequence(model):
    ids = tiny.some_ids()
    with torch.no_grad(), record_scores(model) as record:
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], past_key_values=cache)
    torch.testing.assert_close(record.scores["a"], reread(model, ids)["a"], rtol=1e-4, atol=1e-5)


def test_passes_of_one_sequence_must_have_the_same_rows(model):
    with torch.no_grad(), record_scores(model) as record:
        model(tiny.some_ids(2), use_cache=True)
        cache = model(tiny.some_ids(3), use_cache=True).past_key_values
        model(tiny.some_ids(3, length=1), past_key_values=cache)
        assert record.scores["a"].shape == (3, 10)  # the first batch was another sequence
    scores = record._parts[1, "default"]
    scores[-1] = scores[-1]._replace(scores=scores[-1].scores[:2])
    with pytest.raises(ValueError, match="passes of one sequence must have the same number of rows, got 3 and 2"):
        _ = record.scores


def test_blocks_of_recording_nest(model):
    with torch.no_grad(), record_scores(model) as outer:
        with record_scores(model, "pre") as inner:
            model(tiny.some_ids())
        model(tiny.some_ids(1))
    assert inner.scores["a"].shape == (3, 9)
    assert inner.scores["a"].min() < 0
    assert outer.scores["a"].shape == (1, 9)
    assert outer.scores["a"].min() >= 0


def test_nothing_is_recorded_while_adapters_are_disabled(model):
    with model.disable_adapter(), record_scores(model) as record:
        model(tiny.some_ids())
    with pytest.raises(RuntimeError, match="no scores are recorded"):
        _ = record.scores


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_once(reentrant, passes):
    base = tiny.built()
    model = tiny.adapted(base, layers=[0, 1], site="mlp")
    model.set_steering("a", 1.0, rule="set")
    batches = [tiny.some_ids(seed=seed) for seed in range(passes)]
    expected = reread(model, batches[-1])
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    model.train()
    with record_scores(model) as record:
        loss = sum(model(ids, labels=ids).loss for ids in batches)
        loss.backward()
    assert record.ends == [9] * passes
    assert torch.equal(record.scores["a"], expected["a"])
    assert not record.scores["a"].requires_grad


def test_scores_in_half_precision_are_close(model):
    expected = reread(model, tiny.some_ids())
    half = tiny.adapted(tiny.built().to(torch.bfloat16))
    found = reread(half, tiny.some_ids())
    assert found["a"].dtype == torch.float32
    torch.testing.assert_close(found["a"], expected["a"], rtol=0.1, atol=0.1)


def test_words_of_a_tfree_model_are_steered_and_scored_as_they_are_made():
    base, tokenizer = tiny_tfree(hidden_size=32, num_hidden_layers=3)
    model = tiny.adapted(base)
    inputs = tokenizer(["the house is", "Haus"], return_tensors="pt", padding=True, padding_side="left")
    strengths = [3.0, -3.0]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "rule": "add"}
    output = model.generate(**inputs, **settings, steering={"a": strengths}, return_concept_scores=True)
    mask = torch.ones_like(output.sequences)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    arguments = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with steering(model, a=strengths, rule="add"):
        assert_belongs_to(output.concept_scores, model, output.sequences, **arguments)
    assert output.concept_scores.is_scored.tolist() == [[True] * 6 + [False], [False] * 2 + [True] * 4 + [False]]
