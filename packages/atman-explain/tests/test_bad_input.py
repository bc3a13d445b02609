"""Bad input ends in a message that names the argument, says the rule and what arrived; never in a wrong result."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from atman_explain import AtMan, AtManConfig, UnsupportedModelError, explain
from atman_explain.remote.switching_atman import atman_implementation
from tests.support.atman import PROMPT, TARGET, padded, plain_logprobs, reference_scores, tiny_model

IDS = list(PROMPT)
BERT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": -0.1}, r"factor must be finite and not negative .*, got -0\.1\."),
        ({"factor": float("nan")}, "factor must be finite .*, got nan"),
        ({"factor": float("inf")}, "factor must be finite .*, got inf"),
        ({"kappa": 1.5}, r"kappa must lie in \[-1, 1\] .*, got 1\.5\."),
        ({"kappa": -1.01}, r"kappa must lie in \[-1, 1\]"),
        ({"kappa": float("nan")}, "kappa must lie in .* got nan"),
        ({"mode": "shift"}, r"mode must be one of \('shift_min', 'log_additive', 'multiply', 'shift_min_all'\)"),
        ({"granularity": "tokens"}, "granularity must be one of .*'sentence'.*, got 'tokens'"),
        ({"granularity": "delimiter"}, 'granularity="delimiter" needs a delimiter, got none'),
        ({"delimiter": ""}, "needs a delimiter"),
        ({"overlap": "half"}, "overlap must be one of .*'partial'.*, got 'half'"),
        ({"units": "words"}, "units must be one of .*'image'.*, got 'words'"),
        ({"tiles": (0, 3)}, r"tiles must be \(rows, columns\), each at least 1, got \(0, 3\)"),
        ({"tiles": (3,)}, r"tiles must be \(rows, columns\)"),
        ({"tiles": 3}, "tiles must be a list or tuple of integers, got 3"),
        ({"delta": "loss"}, "delta must be one of .*, got 'loss'"),
        ({"target_granularity": "word"}, "target_granularity must be one of .*'complete'.*, got 'word'"),
        ({"postprocess": "abs"}, "postprocess must be one of .*'absolute'.*, got 'abs'"),
        ({"temperature": 0.0}, r"temperature must be positive and finite, got 0\.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        ({"neighbourhood": -1}, "neighbourhood must not be negative, got -1"),
        ({"max_similar": 0}, "max_similar must be at least 1, got 0"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"layers": ()}, "layers must not be empty"),
        ({"layers": 1}, "layers must be a list or tuple of integers, got 1"),
        ({"layers": (0.5,)}, "layers must be a list or tuple of integers"),
        ({"layers": [True]}, "layers must be a list or tuple of integers"),
        ({"heads": []}, "heads must not be empty"),
        ({"heads": "0"}, "heads must be a list or tuple of integers, got '0'"),
        ({"exclude": 3}, "exclude must be a list or tuple of integers, got 3"),
        ({"sites": ()}, "sites must not be empty"),
        ({"sites": "attention"}, r"sites must be among \('decoder', .*\), got 'attention'"),
        ({"fraction": 0.1}, "AtManConfig has no field fraction; it has attribute_target, .*factor"),
    ],
    ids=str,
)
def test_settings(llama: PreTrainedModel, settings: dict[str, Any], message: str) -> None:
    if "fraction" not in settings:
        with pytest.raises(ValueError, match=message):
            AtManConfig(**settings)
    with pytest.raises(ValueError, match=message):
        AtManConfig.from_dict(settings)
    with pytest.raises(ValueError, match=message):
        AtMan(llama, **settings)
    with pytest.raises(ValueError, match=message):
        AtMan(llama).explain(IDS, target=[3], **settings)


def test_settings_survive_a_round_trip() -> None:
    config = AtManConfig(layers=[0, 1], heads=range(2), sites="decoder", tiles=[2, 3], exclude=[0], kappa=0.5)
    assert (config.layers, config.heads, config.sites, config.tiles) == ((0, 1), (0, 1), ("decoder",), (2, 3))
    assert AtManConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"layers": (2,)}, r"layers must lie in \[0, 2\), got 2\."),
        ({"layers": (0, -3)}, r"layers must lie in \[0, 2\), got -3\."),
        ({"heads": (4,)}, r"heads must lie in \[0, 4\), got 4\."),
        ({"heads": (0, -5)}, r"heads must lie in \[0, 4\), got -5\."),
        ({"sites": ("cross",)}, "sites must not have 'cross' for LlamaForCausalLM, which is no encoder-decoder"),
        ({"sites": ("vision",)}, "needs images"),
    ],
    ids=str,
)
def test_places_that_the_model_lacks(llama: PreTrainedModel, where: dict[str, Any], message: str, mode: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(llama, None, IDS, target=[3], mode=mode, **where)


# Prompts, targets and units.


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {"target": [1]}, "prompt must not be empty"),
        ("", {"target": [1]}, "prompt must not be empty"),
        ([IDS, []], {"target": [[1], [2]]}, r"prompt\[1\] must not be empty"),
        (IDS, {"target": []}, "target must not be empty"),
        ([IDS, IDS], {"target": [[1], []]}, r"target\[1\] must not be empty"),
        ([IDS, IDS], {"target": [[1]]}, "target has 1 entries but prompt has 2"),
        ([IDS, IDS], {"target": [[1], [2], [3]]}, "target has 3 entries but prompt has 2"),
        ([IDS, IDS], {"target": [1, 2]}, "target is a single one but prompt is a batch of 2"),
        (IDS, {"target": [[1], [2]]}, "target has 2 entries but prompt has 1"),
        ("text", {"target": [1]}, "prompt is text, which needs a tokenizer"),
        (IDS, {"target": "text"}, "target is text, which needs a tokenizer"),
        ([1, 48], {"target": [1]}, r"prompt must have ids in \[0, 48\), got 48"),
        ([1, 48], {}, r"prompt must have ids in \[0, 48\), got 48"),
        (IDS, {"target": [48]}, r"target must have ids in \[0, 48\), got 48"),
        (IDS, {"target": [99, 1]}, r"target must have ids in \[0, 48\), got 99"),
        ([1, -1], {"target": [1]}, r"prompt\[1\] must be a token id, an integer of at least 0, got -1"),
        ([0.5], {"target": [1]}, r"prompt\[0\] must be a token id"),
        (IDS, {"target": [1], "images": ["x"]}, "images need a processor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_and_targets(name: str, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(tiny_model(name), None, prompt, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_what_is_longer_than_the_model_is_refused_with_the_lengths(name: str) -> None:
    model = tiny_model(name)
    message = r"prompt and target need 65 positions \(60 of the prompt and 6 of the target, .*\), but the model has 64"
    with pytest.raises(ValueError, match=message):
        explain(model, None, [1] * 60, target=[2] * 6)
    with pytest.raises(ValueError, match=message):
        explain(model, None, [1] * 60, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"need 65 positions \(65 of the prompt and 1 of the target"):
        explain(model, None, [[1, 2], [1] * 65])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_what_just_fits_is_explained(name: str) -> None:
    model, prompt = tiny_model(name), [1 + each % 40 for each in range(60)]
    chunks, target = [[3], [40, 41]], [7, 8, 9, 10, 11]  # 64 positions: the last target token is not read
    found = explain(model, None, prompt, target=target, chunks=chunks)
    torch.testing.assert_close(found.scores, reference_scores(model, prompt, target, chunks), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunks": [[12]]}, r"chunks\[0\] must hold columns in \[-12, 11\], got 12"),
        ({"chunks": [[0], [-13]]}, r"chunks\[1\] must hold columns .* got -13"),
        ({"chunks": [[1, 2], [2, 3]]}, r"chunks must not overlap, got the tokens \[2\] in chunks\[1\]"),
        ({"chunks": [[1], []]}, r"chunks\[1\] must not be empty"),
        ({"chunks": []}, "chunks must be lists of columns"),
        ({"chunks": [1, 2]}, r"chunks must be lists of columns, such as .*, got \[1, 2\]"),
        ({"spans": [(0, 3)]}, r"spans needs to know where every token is .* pass chunks="),
        ({"spans": [(0, 3)], "chunks": [[1]]}, "only one of delimiter, spans and chunks can be given"),
        ({"granularity": "word"}, "granularity='word' needs to know where every token is"),
        ({"granularity": "sentence"}, "granularity='sentence' needs to know where every token is"),
        ({"delimiter": "x"}, "delimiter='x' needs a tokenizer"),
        ({"exclude": range(12)}, "leaves no unit .* see include_special and exclude"),
        ({"exclude": (50,)}, r"exclude must hold columns in \[-12, 11\], got 50"),
        ({"units": "image"}, "units='image' leaves no unit"),
    ],
    ids=str,
)
def test_units(llama: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(llama, None, IDS, target=[3], **options)


def test_chunks_must_fit_every_prompt(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"chunks\[0\] must hold columns in \[-3, 2\], got 5"):
        explain(llama, None, [IDS, IDS[:3]], target=[[1], [2]], chunks=[[5]])


def test_chunks_need_not_cover_the_prompt(llama: PreTrainedModel) -> None:
    assert explain(llama, None, IDS, target=[3], chunks=[[-1], [4]]).units[0].columns == (11,)


def test_padding_between_tokens_is_refused(llama: PreTrainedModel) -> None:
    batch = padded(IDS, side="left", length=14)
    batch["attention_mask"][0, 5] = 0
    with pytest.raises(ValueError, match="must be 0 at the start or the end only"):
        explain(llama, None, batch, target=[3])


# Values that are no numbers.


def test_logits_that_are_nan_from_the_start() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no talk of other ways to run the model
        with pytest.raises(ValueError, match=r"logits for the target \('<3>',\) are NaN before anything is suppressed"):
            explain(model, None, IDS, target=[3])


@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
def test_logits_that_become_nan_name_the_unit(mode: str) -> None:
    model = tiny_model("llama")

    def spoil(_: nn.Module, _args: tuple[Any, ...], logits: Tensor) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        if len(rows) == len(PROMPT):  # the pass in which every unit has its row
            rows[4] = torch.nan
        return logits

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="logits are NaN when the unit '<7>' is suppressed"):
        explain(model, None, IDS, target=[3], mode=mode)


def test_targets_of_probability_zero() -> None:
    model = tiny_model("opt")
    model.lm_head.bias = nn.Parameter(torch.zeros(48).double())
    model.lm_head.bias.data[3] = -torch.inf
    with pytest.raises(ValueError, match=r"target has a token of probability 0, .* \('<5>', '<3>'\)"):
        explain(model, None, IDS, target=[5, 3])
    assert explain(model, None, IDS, target=[4]).scores.isfinite().all()


@pytest.mark.parametrize("mode", ["shift_min", "log_additive", "multiply", "shift_min_all"])
def test_huge_factors_give_finite_scores(llama: PreTrainedModel, mode: str) -> None:
    found = explain(llama, None, IDS, target=list(TARGET), factor=1e30, mode=mode)
    assert found.scores.isfinite().all()


# Models.


def _build(model_class: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    built = getattr(transformers, model_class)
    return built(built.config_class(**config)).eval()


@pytest.mark.parametrize("model", ["gpt2", None, nn.Linear(2, 2)], ids=["name", "None", "module"])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"model must be a transformers model, .* got {type(model).__name__}"
    ):
        explain(model, None, IDS, target=[3])


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.LlamaModel(copy.deepcopy(tiny_model("llama").config)),
        lambda: transformers.LlamaForSequenceClassification(copy.deepcopy(tiny_model("llama").config)),
        lambda: _build("BertModel", **BERT),
        lambda: _build("BertForMaskedLM", **BERT),
        lambda: _build("ViTForImageClassification", **BERT, image_size=8, patch_size=4),
    ],
    ids=["base", "sequence classifier", "BERT", "masked LM", "image classifier"],
)
@pytest.mark.parametrize("target", [[3], None])
def test_models_without_a_text_to_continue(build: Callable[[], PreTrainedModel], target: Sequence[int] | None) -> None:
    model = build()
    message = f"{type(model).__name__} does not continue a text, .* AutoModelForCausalLM"
    with pytest.raises(UnsupportedModelError, match=message):
        explain(model, None, IDS, target=target)


def test_a_model_without_attention() -> None:
    model = _build("MambaForCausalLM", vocab_size=48, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM ran without calling attention"):
        explain(model, None, IDS, target=[3])


@pytest.mark.parametrize("name", ["RwkvForCausalLM", "XGLMForCausalLM"])
def test_a_model_outside_of_the_attention_interface(name: str) -> None:
    sizes = {"RwkvForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2}}
    sizes["XGLMForCausalLM"] = {"d_model": 32, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2}
    model = _build(name, vocab_size=48, **sizes[name])
    with pytest.raises(UnsupportedModelError, match=f"{name} does not compute attention through .*register_adapter"):
        explain(model, None, IDS, target=[3])


def test_attention_modules_that_go_their_own_way() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    with pytest.raises(UnsupportedModelError, match="ran without calling attention through transformers' interface"):
        explain(model, None, IDS, target=[3])


def test_hybrids_say_how_many_layers_are_changed() -> None:
    sizes = {"num_key_value_heads": 2, "initializer_range": 0.3, "block_multiple_of": 8}
    model = _build("Lfm2ForCausalLM", **BERT, **sizes, layer_types=["conv", "full_attention"]).double()
    atman = AtMan(model)
    with pytest.warns(UserWarning, match="has 2 layers but 1 attention modules"):
        found = atman.explain(IDS, target=list(TARGET))
    torch.testing.assert_close(found.scores, reference_scores(model, IDS, TARGET), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.baseline_logprobs, plain_logprobs(model, IDS, TARGET), rtol=0, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atman.explain(IDS, target=[1])


def test_attention_weights_are_not_silently_missing(llama: PreTrainedModel) -> None:
    ids = torch.tensor([IDS])
    with atman_implementation(llama):
        with pytest.raises(ValueError, match=r"output_attentions=True is not available .*set_attn_implementation"):
            llama(input_ids=ids, output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions=True is not available"):
            llama.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, output_attentions=True,
                return_dict_in_generate=True,
            )  # fmt: skip
    assert llama(input_ids=ids).logits.isfinite().all()


def test_settings_of_the_wrong_type_are_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"config must be an AtManConfig, got dict; see AtManConfig.from_dict"):
        AtMan(model, None, {"factor": 0.5})
    with pytest.raises(ValueError, match=r"factor must be finite and not negative .*got '0.1'"):
        AtMan(model, None, factor="0.1")
