"""Explanations of encoder-decoder models against the method's definition, run row by row and unit by unit."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from atman_explain import AtMan, UnsupportedModelError, explain
from tests.support.atman import padded
from tests.support.atman_columns import similar_factors, spread, suppressed, unit_factors
from tests.support.atman_tokenizers import word_level

SOURCE = (7, 31, 12, 40, 7, 3)
TARGET = (5, 21, 14)
VOCAB = 48
EXACT = {"rtol": 0.0, "atol": 1e-10}
SITES = {"encoder": ("encoder",), "cross": ("cross",), "both": ("encoder", "cross")}

_T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "dropout_rate": 0.1}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 12,
    "vocab_size": VOCAB,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "nllb-moe": ("NllbMoeForConditionalGeneration", _BART),
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    name, settings = _FAMILIES[family]
    model_class = getattr(transformers, name)
    model = spread(model_class(model_class.config_class(**settings | _IDS | changes)))
    if family == "t5":
        for part in model.modules():
            if hasattr(part, "relative_attention_bias"):
                part.relative_attention_bias.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: build(family) for family in ("t5", "bart")}


@pytest.fixture(autouse=True)
def restored(models: dict[str, PreTrainedModel]) -> Iterator[None]:
    yield
    for model in models.values():
        assert not model.training
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        assert {part.config._attn_implementation for part in parts} == {"sdpa"}


def is_site(model: PreTrainedModel, sites: Sequence[str], layers: Sequence[int] | None = None) -> Any:
    def chosen(name: str) -> bool:
        kind = "cross" if "EncDecAttention" in name or "encoder_attn" in name else "encoder"
        in_site = kind in sites and ("decoder." not in name or kind == "cross")
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        return in_site and (layers is None or layer in layers)

    return chosen


def plain(model: PreTrainedModel, target: Sequence[int] = TARGET, source: Sequence[int] = SOURCE) -> Tensor:
    """Log-probabilities [M] of a target, as the model shifts it in training."""
    decoder_ids = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([target]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder_ids, use_cache=False).logits[0]
    return logits.log_softmax(-1)[range(len(target)), list(target)]


def reference(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    sites: Sequence[str] = ("encoder", "cross"),
    mode: str = "shift_min",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Scores [M, U] for factors of each unit."""
    scores = []
    for factors in [None, *rows]:
        with suppressed(model, is_site(model, sites, layers), factors, mode, heads):
            scores.append(plain(model))
    return torch.stack([scores[0] - each for each in scores[1:]], 1)


def token_rows(factor: float = 0.1) -> list[Tensor]:
    return [unit_factors([column], len(SOURCE), factor) for column in range(len(SOURCE))]


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_scores_are_those_of_the_definition(models: dict[str, PreTrainedModel], family: str, sites: str) -> None:
    model = models[family]
    found = explain(model, None, SOURCE, target=TARGET, sites=None if sites == "both" else sites)
    assert found.scores.abs().max() > 1e-2
    torch.testing.assert_close(found.scores, reference(model, token_rows(), SITES[sites]), **EXACT)
    torch.testing.assert_close(found.baseline_logprobs, plain(model), **EXACT)


@pytest.mark.parametrize("mode", ["log_additive", "multiply"])
def test_modes_act_after_position_bias(models: dict[str, PreTrainedModel], mode: str) -> None:
    found = explain(models["t5"], None, SOURCE, target=TARGET, mode=mode, factor=0.2)
    torch.testing.assert_close(found.scores, reference(models["t5"], token_rows(0.2), mode=mode), **EXACT)


def test_layers_and_heads_are_counted_in_every_site(models: dict[str, PreTrainedModel]) -> None:
    for family, model in models.items():
        found = explain(model, None, SOURCE, target=TARGET, layers=[1], heads=[0, 3])
        expected = reference(model, token_rows(), layers=[1], heads=[0, 3])
        torch.testing.assert_close(found.scores, expected, **EXACT, msg=lambda text, f=family: f"{f}: {text}")


def test_units_of_several_tokens_and_similar_ones(models: dict[str, PreTrainedModel]) -> None:
    model = models["bart"]
    embeds = model.get_input_embeddings()(torch.tensor(SOURCE)).detach()
    chunks = [[0], [1, 2, 5]]
    rows = [similar_factors(embeds, chunk, 0.1, 0.05) for chunk in chunks]
    assert rows[0][4] == pytest.approx(0.1)  # the same token once more
    found = explain(model, None, SOURCE, target=TARGET, chunks=chunks, kappa=0.05)
    torch.testing.assert_close(found.scores, reference(model, rows), **EXACT)


def test_factor_one_changes_nothing(models: dict[str, PreTrainedModel]) -> None:
    for model in models.values():
        assert explain(model, None, SOURCE, target=TARGET, factor=1.0).scores.eq(0.0).all()


def test_batches_do_not_change_scores(models: dict[str, PreTrainedModel]) -> None:
    expected = explain(models["bart"], None, SOURCE, target=TARGET).scores
    for limits in ({"batch_size": 1}, {"max_tokens_per_batch": 20}, {"max_tokens_per_batch": 1}):
        found = explain(models["bart"], None, SOURCE, target=TARGET, **limits).scores
        torch.testing.assert_close(found, expected, **EXACT)


def test_cross_attention_alone_runs_the_encoder_once_per_prompt(models: dict[str, PreTrainedModel]) -> None:
    atman = AtMan(models["t5"], None, sites="cross", batch_size=2)
    atman.explain(SOURCE, target=TARGET)  # finds the modules
    calls: list[int] = []
    handle = models["t5"].get_encoder().register_forward_hook(lambda *_: calls.append(1))
    try:
        atman.explain(SOURCE, target=TARGET)
    finally:
        handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("lengths", [(1, 1), (1, 2), (3, 3), (2, 1)])
def test_lengths_of_source_and_target_may_agree(models: dict[str, PreTrainedModel], lengths: tuple[int, int]) -> None:
    source, target = SOURCE[: lengths[0]], TARGET[: lengths[1]]
    for model in models.values():
        found = explain(model, None, source, target=target)
        assert list(found.scores.shape) == [lengths[1], lengths[0]]
        torch.testing.assert_close(found.baseline_logprobs, plain(model, target, source), **EXACT)


def test_several_padded_prompts_are_explained_as_single_ones(models: dict[str, PreTrainedModel]) -> None:
    sources, targets = [SOURCE, SOURCE[2:4]], [TARGET[:1], TARGET]
    found = explain(models["bart"], None, padded(*sources, side="right"), target=targets)
    for each, source, target in zip(found, sources, targets, strict=True):
        torch.testing.assert_close(each.scores, explain(models["bart"], None, source, target=target).scores, **EXACT)


def test_decoder_may_have_other_layers_than_the_encoder() -> None:
    model = build("t5", num_decoder_layers=3)
    found = explain(model, None, SOURCE, target=TARGET)
    torch.testing.assert_close(found.scores, reference(model, token_rows()), **EXACT)
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 2\) of site 'encoder', got 2\."):
        explain(model, None, SOURCE, target=TARGET, layers=[2])
    assert explain(model, None, SOURCE, target=TARGET, layers=[2], sites="cross").scores.abs().max() > 0


def test_decoders_that_do_not_say_that_they_are_causal_are_run_causally() -> None:
    model = build("nllb-moe")
    assert not model.model.decoder.layers[0].self_attn.is_causal
    found = explain(model, None, SOURCE, target=TARGET)
    inputs = {"input_ids": torch.tensor([SOURCE]), "decoder_input_ids": torch.tensor([[2, *TARGET[:-1]]])}
    with torch.no_grad():
        logprobs = model(**inputs).logits[0].log_softmax(-1)[range(3), list(TARGET)]
    torch.testing.assert_close(found.baseline_logprobs, logprobs, rtol=0.0, atol=1e-6)


def test_two_models_joined_by_cross_attention() -> None:
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        *(transformers.BertConfig(**_BERT) for _ in range(2))
    )
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    model = spread(transformers.EncoderDecoderModel(config))
    found = explain(model, None, SOURCE, target=TARGET)
    torch.testing.assert_close(found.baseline_logprobs, plain(model), **EXACT)
    assert found.scores.abs().max() > 0.01
    assert found.scores.ne(explain(model, None, SOURCE, target=TARGET, sites="cross").scores).any()


def test_forced_first_token_stands_before_the_target() -> None:
    model = build("bart")
    model.generation_config.forced_bos_token_id = 1
    found = explain(model, None, SOURCE, target=TARGET)
    torch.testing.assert_close(found.baseline_logprobs, plain(model, (1, *TARGET))[1:], **EXACT)
    whole = explain(model, None, SOURCE, target=(1, *TARGET))
    torch.testing.assert_close(whole.baseline_logprobs, plain(model, (1, *TARGET)), **EXACT)
    torch.testing.assert_close(whole.scores[1:], found.scores, **EXACT)


@pytest.mark.parametrize("forced", [None, 1])
def test_target_is_generated_without_start_and_end(forced: int | None) -> None:
    model = build("bart")
    model.generation_config.forced_bos_token_id = forced
    assert model.generation_config.forced_eos_token_id == 2
    longest = model.generate(torch.tensor([SOURCE]), do_sample=False, max_new_tokens=8)[0].tolist()
    start = 1 if forced is None else 2
    for count in (1, 3):
        found = explain(model, None, SOURCE, max_new_tokens=count)
        assert [target.id for target in found.targets] == longest[start : start + count]


def test_generation_stops_at_the_end_token() -> None:
    model = build("t5")
    first, second = (target.id for target in explain(model, None, SOURCE, max_new_tokens=2).targets)
    model.generation_config.eos_token_id = second
    expected = [first]  # the end token is left out, unless it is all there is
    assert [target.id for target in explain(model, None, SOURCE, max_new_tokens=6).targets] == expected


def test_text_is_read_in_two_places() -> None:
    words = ("</s>", "translate", "the", "house", "das", "Haus")
    tokenizer = word_level(*words, eos_token="</s>")
    model = build("t5", eos_token_id=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no seam between a source and its target
        found = explain(model, tokenizer, "translate the house </s>", target="das Haus")
    assert [unit.text for unit in found.units] == ["translate", "the", "house"]
    assert [target.text for target in found.targets] == ["das", "Haus"]
    assert found.special == (False, False, False, True)
    whole = explain(model, tokenizer, "translate the house </s>", target="das Haus", include_special=True)
    torch.testing.assert_close(whole.scores[:, :3], found.scores, **EXACT)
    assert len(whole.units) == 4


def test_training_mode_and_gradients_are_left_as_they_were(models: dict[str, PreTrainedModel]) -> None:
    model = build("t5")
    model.train()
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(
        explain(model, None, SOURCE, target=TARGET).scores,
        explain(models["t5"], None, SOURCE, target=TARGET).scores,
        **EXACT,
    )
    assert [module.training for module in model.modules()] == modes
    assert {part.config._attn_implementation for part in (model, model.encoder, model.decoder)} == {"sdpa"}


def test_state_is_restored_after_an_error() -> None:
    model = build("bart")
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(model, None, SOURCE, target=TARGET)
    handle.remove()
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {"sdpa"}
    torch.testing.assert_close(explain(model, None, SOURCE, target=TARGET).baseline_logprobs, plain(model), **EXACT)


def test_nan_names_the_unit() -> None:
    model = build("bart")
    passes = 0

    def spoil(_module: Any, _args: Any, output: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return output * torch.nan if passes > 2 else output

    handle = model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(ValueError, match="logits are NaN when the unit '<7>' is suppressed"):
            explain(model, None, SOURCE, target=TARGET)
    finally:
        handle.remove()


@pytest.mark.parametrize("site", ["decoder", "vision"])
def test_sites_that_hold_no_source_tokens_are_refused(models: dict[str, PreTrainedModel], site: Any) -> None:
    message = rf"sites must be among \('encoder', 'cross'\) for an encoder-decoder model, got '{site}'"
    with pytest.raises(ValueError, match=message):
        explain(models["t5"], None, SOURCE, target=TARGET, sites=site)


def test_target_tokens_are_no_units(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match="attribute_target must be False for an encoder-decoder model, got True"):
        explain(models["t5"], None, SOURCE, target=TARGET, attribute_target=True)


def test_sites_of_encoder_decoders_need_one() -> None:
    config = transformers.LlamaConfig(**_BERT)
    with pytest.raises(ValueError, match="sites must not have 'cross' for LlamaForCausalLM, which is no encoder-dec"):
        explain(transformers.LlamaForCausalLM(config), None, SOURCE, target=TARGET, sites=("cross",))


def test_lengths_are_checked_for_encoder_and_decoder(models: dict[str, PreTrainedModel]) -> None:
    long = list(range(3, 16))
    with pytest.raises(ValueError, match=r"prompt needs 13 positions, but the model has 12 for it; shorten it\."):
        explain(models["bart"], None, long, target=TARGET)
    with pytest.raises(ValueError, match=r"target needs 13 positions, but the model has 12 for it; shorten it\."):
        explain(models["bart"], None, SOURCE, target=long)
    assert list(explain(models["bart"], None, long[:-1], target=long[:-1]).scores.shape) == [12, 12]
    assert len(explain(models["t5"], None, long, target=long).units) == 13  # relative positions have no end


def test_decoder_start_must_be_known() -> None:
    model = build("t5")
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match=r"set model\.generation_config\.decoder_start_token_id"):
        explain(model, None, SOURCE, target=TARGET)
    model.generation_config.decoder_start_token_id = 2
    torch.testing.assert_close(
        explain(model, None, SOURCE, target=TARGET).baseline_logprobs, plain(build("t5")), **EXACT
    )


def test_decoder_ids_in_the_prompt_are_refused(models: dict[str, PreTrainedModel]) -> None:
    prompt = {"input_ids": torch.tensor([SOURCE]), "decoder_input_ids": torch.tensor([[2, 5]])}
    with pytest.raises(ValueError, match="prompt must not hold 'decoder_input_ids'; pass the target as target="):
        explain(models["t5"], None, prompt, target=TARGET)


def test_models_that_do_not_turn_tokens_into_tokens_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="T5ForSequenceClassification reads 'input_ids' and does not gen"):
        explain(transformers.T5ForSequenceClassification(transformers.T5Config(**_T5)), None, SOURCE, target=TARGET)
    audio = transformers.WhisperConfig(**_BART | {"num_mel_bins": 4, "max_source_positions": 8} | _IDS)
    with pytest.raises(UnsupportedModelError, match="WhisperForConditionalGeneration reads 'input_features'"):
        explain(transformers.WhisperForConditionalGeneration(audio), None, SOURCE, target=TARGET)


def test_encoders_with_attention_of_their_own_are_refused() -> None:
    config = transformers.LongT5Config(**_T5 | _IDS, local_radius=4)
    model = transformers.LongT5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"LongT5.* no attention with one key per source token in its enc"):
        explain(model, None, SOURCE, target=TARGET)
