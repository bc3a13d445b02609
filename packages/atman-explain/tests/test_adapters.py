"""Models that compute attention on their own, through adapters; and those that cannot be explained."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import BloomConfig, FalconConfig, GPTJConfig, PreTrainedModel

from atman_explain import AtMan, Explanation, UnsupportedModelError, explain, register_adapter, steer
from atman_explain.remote import adapters_atman
from atman_explain.remote.decoder_atman import DecoderPasses
from atman_explain.remote.hook_atman import AttentionCall, Intervention, active, dispatch
from atman_explain.remote.switching_atman import atman_implementation
from tests.support.atman import (
    MODES,
    PROMPT,
    TARGET,
    VOCAB,
    manipulate,
    padded,
    plain_logprobs,
    reference_factors,
    reference_scores,
)

P = len(PROMPT)
T = P + len(TARGET) - 1
ENDLESS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

_FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB} | ENDLESS
_FALCON |= {"max_position_embeddings": 64, "initializer_range": 0.3}
FAMILIES: dict[str, tuple[type, dict[str, Any], float]] = {  # the tolerance is that of float32 inside the plain model
    "gptj": (
        GPTJConfig,
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, "rotary_dim": 8, "n_positions": 64}
        | {"initializer_range": 0.3}
        | ENDLESS,
        1e-5,
    ),
    "falcon": (FalconConfig, _FALCON | {"multi_query": True}, 1e-10),
    "falcon-own-keys": (FalconConfig, _FALCON | {"multi_query": False, "parallel_attn": False}, 1e-10),
    "falcon-grouped-keys": (FalconConfig, _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, 1e-10),
    "falcon-alibi": (FalconConfig, _FALCON | {"alibi": True, "multi_query": False}, 1e-10),
    "bloom": (
        BloomConfig,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "initializer_range": 0.3} | ENDLESS,
        1e-5,
    ),
}
PACKED = ("gptj", "falcon", "falcon-own-keys", "falcon-grouped-keys")


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    config_class, settings, _ = FAMILIES[name]
    config = config_class(**settings)
    torch.manual_seed(0)
    model_class = getattr(transformers, config_class.__name__.replace("Config", "ForCausalLM"))
    model = model_class._from_config(config, **{"attn_implementation": "eager"} | changes).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases start at 0, the weights of norms at 1
            parameter.data += torch.randn_like(parameter) / 5
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    return tiny_model(name)


@pytest.fixture(scope="module")
def gptj() -> PreTrainedModel:
    return tiny_model("gptj")


def explained(model: PreTrainedModel, **settings: Any) -> Explanation:
    return explain(model, None, list(PROMPT), target=list(TARGET), **settings)


def close(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance, check_dtype=False)


@contextlib.contextmanager
def by_definition(
    factors: Tensor, mode: str, layers: Sequence[int] | None = None, shape: tuple[int, int] | None = None
) -> Iterator[None]:
    """Manipulate the scores that a plain, eager model hands to its softmax: factors [B, T].

    Only softmaxes over scores [..., *shape] are layers.
    """
    softmax, calls = F.softmax, 0

    def manipulated(scores: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        nonlocal calls
        if scores.shape[-2:] != (shape or scores.shape[-2:]):
            return softmax(scores, dim=dim, dtype=dtype)
        visible = scores > torch.finfo(torch.float32).min / 2
        if layers is None or calls in layers:
            changed = manipulate(scores.double(), factors.double()[:, None, None], mode, visible)
            scores = changed.masked_fill(~visible, -torch.inf)
        calls += 1
        return softmax(scores.double(), dim=-1)

    F.softmax = manipulated
    try:
        yield
        assert calls, "the model did not come by"
    finally:
        F.softmax = softmax


def scores_by_definition(model: PreTrainedModel, rows: Tensor, mode: str, layers: Any = None) -> Tensor:
    """Scores [M, U] for factors [U, T], one row per unit."""
    rows = torch.cat([torch.ones(1, T, dtype=torch.float64), rows])
    ids = torch.tensor([[*PROMPT, *TARGET[:-1]]] * len(rows))
    with by_definition(rows, mode, layers), torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    read = logits[:, P - 1 :].log_softmax(-1)
    read = torch.stack([read[:, t, target] for t, target in enumerate(TARGET)], 1)  # [1 + U, M]
    return (read[0] - read[1:]).T


def single_columns(count: int, factor: float = 0.1) -> Tensor:
    return 1.0 - (1.0 - factor) * torch.eye(count, T, dtype=torch.float64)


# Explanations.


def test_baseline_is_that_of_the_untouched_model(model, name):
    close(explained(model).baseline_logprobs, plain_logprobs(model, PROMPT, TARGET), FAMILIES[name][2])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_falcon_is_the_untouched_model_whatever_its_implementation(alibi, implementation):
    """With ALiBi the two differ in transformers itself: eager attention adds the bias twice."""
    model = tiny_model("falcon-alibi" if alibi else "falcon", attn_implementation=implementation)
    close(explained(model).baseline_logprobs, plain_logprobs(model, PROMPT, TARGET), 1e-10)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("mode", ["shift_min", "log_additive", "multiply"])  # masked scores do not reach the softmax
def test_scores_follow_the_definition(model, name, mode):
    expected = scores_by_definition(model, single_columns(T - 1), mode)
    assert expected.abs().max() > 0.1
    found = explained(model, mode=mode, factor=0.1, attribute_target=True)
    assert found.scores.shape == (len(TARGET), P + len(TARGET) - 1)
    close(found.scores[:, : T - 1], expected, FAMILIES[name][2])
    assert found.scores[0, P:].tolist() == [0.0] * (len(TARGET) - 1), "a target token does not see later ones"


def test_single_layers(model, name):
    expected = scores_by_definition(model, single_columns(P), "shift_min", layers=(1,))
    close(explained(model, layers=(1,)).scores, expected, FAMILIES[name][2])
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 2\), got 2"):
        explained(model, layers=(2,))


def test_conceptual_suppression(model, name):
    ids = torch.tensor([*PROMPT, *TARGET[:-1]])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    rows = torch.stack([reference_factors(embeds, [column], 0.1, kappa=0.1) for column in range(P)])
    assert (rows != 1).sum() > P
    close(explained(model, kappa=0.1).scores, scores_by_definition(model, rows, "shift_min"), FAMILIES[name][2])


def test_rotary_models_run_packed_suffixes_and_biased_ones_whole_rows(model, name, monkeypatch):
    opened = []
    probe = DecoderPasses.probe
    monkeypatch.setattr(DecoderPasses, "probe", lambda self, *args: opened.append(self) or probe(self, *args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(model)
    assert bool(opened) == (name in PACKED)


def test_bfloat16(name):
    exact = tiny_model(name)
    baseline = explained(exact.bfloat16()).baseline_logprobs
    close(baseline, plain_logprobs(exact, PROMPT, TARGET).float(), 0.1)


def test_target_is_generated(model):
    found = explain(model, None, list(PROMPT), max_new_tokens=3)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=3, do_sample=False, attention_mask=torch.ones(1, P).long()
        )
    assert [target.id for target in found.targets] == expected[0, P:].tolist()


# Steering in generate.


def generated(model: PreTrainedModel, rows: Sequence[Sequence[int]], factors: Any, **options: Any) -> Tensor:
    """Scores of new tokens, [B, N, V], under steering."""
    with steer(model, None, [list(row) for row in rows], factors=factors):
        out = model.generate(
            **padded(*rows, side="left"),
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(out.logits, 1)


def test_cache_beams_and_padding(name):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    model = model if name != "bloom" else model.float()  # whose plain float64 attention is NaN in rows of padding
    rows = [PROMPT, PROMPT[4:]]
    factors = [[0.1, 1.0, 1.0, 3.0] + [1.0] * 8, [1.0, 0.0] + [1.0] * 10]
    together = generated(model, rows, factors)
    close(generated(model, rows, factors, use_cache=False), together, 1e-4)
    alone = torch.cat([generated(model, [row], [f[: len(row)]]) for row, f in zip(rows, factors, strict=True)])
    close(alone, together, 1e-4)
    plain = torch.cat([generated(model, [row], [[1.0] * len(row)]) for row in rows])
    assert (plain[:, 0] - together[:, 0]).abs().amax(-1).min() > 0.01
    beams = [generated(model, rows, factors, num_beams=3, use_cache=cached)[:2, 0] for cached in (True, False)]
    close(beams[0], beams[1], 1e-4)


@pytest.mark.parametrize("name", [*PACKED, "bloom"])  # transformers' Falcon with ALiBi has none
def test_static_cache(name):
    model = tiny_model(name)
    model.generation_config.eos_token_id = None
    factors = [[0.1] + [1.0] * (P - 1)]
    static = generated(model, [PROMPT], factors, cache_implementation="static")
    close(static, generated(model, [PROMPT], factors, use_cache=False), 1e-4)
    with atman_implementation(model):
        inside = model.generate(torch.tensor([PROMPT]), max_new_tokens=3, cache_implementation="static")
    assert inside.tolist() == model.generate(torch.tensor([PROMPT]), max_new_tokens=3).tolist()


# State.


def attention(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


def test_models_are_left_as_they_were(model):
    before = model.config._attn_implementation
    with contextlib.suppress(RuntimeError), atman_implementation(model):
        with atman_implementation(model):
            assert all("forward" in vars(module) for module in attention(model))
        assert all("forward" in vars(module) for module in attention(model))
        raise RuntimeError
    assert not any("forward" in vars(module) for module in attention(model))
    assert model.config._attn_implementation == before


def test_a_forward_that_somebody_else_has_patched_comes_back(gptj):
    module = attention(gptj)[0]
    mine = module.forward
    module.forward = mine
    try:
        with atman_implementation(gptj):
            assert module.forward is not mine
        assert module.forward is mine
    finally:
        del module.forward


def test_attention_dropout_is_refused(name):
    model = tiny_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model.train()
    ids = torch.tensor([PROMPT])
    if name in PACKED and name != "gptj":  # Falcon has dropout of weights with ALiBi only
        with atman_implementation(model):
            model(ids)
    else:
        with atman_implementation(model), pytest.raises(ValueError, match=r"Attention dropout must be 0.*got 0\.1 in"):
            model(ids)


def test_bloom_in_slices_is_refused():
    model = tiny_model("bloom")
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM has slow_but_exact=True"):
        explained(model)


# The registry.


@contextlib.contextmanager
def registered(model_type: str, adapter: Any) -> Iterator[None]:
    register_adapter(model_type, adapter)
    try:
        yield
    finally:
        adapters_atman._ADAPTERS.pop(model_type)


def tiny_mpt() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=2)
    return transformers.MptForCausalLM(config).double().eval()


def test_an_adapter_of_ones_own():
    model = tiny_mpt()

    @contextlib.contextmanager
    def adapt(model: PreTrainedModel) -> Iterator[None]:
        modules = [module for module in model.modules() if type(module).__name__ == "MptAttention"]
        with adapters_atman.patched_forward(modules, forward):
            yield

    def forward(self: Any, hidden: Tensor, position_bias: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        parts = self.Wqkv(hidden).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = position_bias[None, :, :, -hidden.shape[1] :]
        call = AttentionCall(self, *parts, visible=~attention_mask, bias=bias, scale=self.softmax_scale)
        return self.out_proj(dispatch(call).transpose(1, 2).flatten(2)), None

    with registered("mpt", adapt):
        found = explained(model)
    close(found.baseline_logprobs, plain_logprobs(model, PROMPT, TARGET), 1e-6)
    assert found.scores.abs().max() > 0


def test_an_adapter_that_calls_no_attention_is_found_out():
    with (
        registered("mpt", lambda _: contextlib.nullcontext()),
        pytest.raises(UnsupportedModelError, match="MptForCausalLM ran without calling attention"),
    ):
        explained(tiny_mpt())


def test_a_registered_adapter_goes_before_ours(gptj):
    with (
        registered("gptj", lambda _: contextlib.nullcontext()),
        pytest.raises(UnsupportedModelError, match="GPTJForCausalLM ran without calling attention"),
    ):
        explained(gptj)


def test_ours_are_for_classes_that_need_them():
    needs = SimpleNamespace(config=SimpleNamespace(model_type="gptj"), _can_set_attn_implementation=lambda: False)
    can = SimpleNamespace(config=SimpleNamespace(model_type="gptj"), _can_set_attn_implementation=lambda: True)
    assert adapters_atman.find_adapter(needs).__name__ == "adapt_gptj"
    assert adapters_atman.find_adapter(can) is None


# Models that cannot be explained, and those that can in part.

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("RwkvForCausalLM", _SMALL),
        ("XLMWithLMHeadModel", {"n_words": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 2}),
        ("MptForCausalLM", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 2}),
    ],
)
def test_other_attention_is_refused(name, config):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    with pytest.raises(UnsupportedModelError, match=f"{name} does not compute attention through.*register_adapter"):
        explained(model)
    with pytest.raises(UnsupportedModelError, match=name), steer(model, None, list(PROMPT), factors=[1.0] * P):
        pass


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MambaForCausalLM", _SMALL | {"state_size": 4}),
        ("Mamba2ForCausalLM", _SMALL | {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}),
    ],
)
def test_models_without_attention_are_refused(name, config):
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    with pytest.raises(UnsupportedModelError, match=f"{name} ran without calling attention"):
        explained(model)


_HYBRID = {
    **_SMALL,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **ENDLESS,
}
_HYBRIDS = {
    "JambaForCausalLM": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
        | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        2,
    ),
    "Qwen3NextForCausalLM": (
        {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
        1,
    ),
    "BambaForCausalLM": (
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
        | {"mamba_chunk_size": 8},
        1,
    ),
    "Lfm2ForCausalLM": (
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_multiple_of": 8},
        2,
    ),
}


@pytest.mark.parametrize("name", _HYBRIDS)
def test_hybrids_run_whole_rows_and_say_how_many_layers_are_manipulated(name):
    settings, count = _HYBRIDS[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**_HYBRID | settings)).double().eval()
    if "num_experts" in settings:
        model.set_experts_implementation("eager")  # the default one has no float64
    with pytest.warns(UserWarning, match=f"{name} has 4 layers but {count} attention modules") as caught:
        found = explained(model)
    assert len(caught) == 1
    close(found.baseline_logprobs, plain_logprobs(model, PROMPT, TARGET), 1e-6)
    close(found.scores, reference_scores(model, PROMPT, TARGET), 1e-6)
    assert found.scores.abs().max() > 1e-3


def test_a_hybrid_is_reported_once_per_object():
    name = "Lfm2ForCausalLM"
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**_HYBRID | _HYBRIDS[name][0])).eval()
    atman = AtMan(model)
    with pytest.warns(UserWarning, match="Lfm2ForCausalLM has 4 layers"):
        atman.explain(list(PROMPT), target=list(TARGET))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atman.explain(list(PROMPT), target=list(TARGET), mode="shift_min_all")


# BLIP.

ANSWER = [30, 31, 2]
_TEXT = {"vocab_size": 60, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48, "is_decoder": True}
_TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40, "initializer_range": 0.3}
_TEXT |= {"bos_token_id": 3, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0, "projection_dim": 16}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
WRITERS = ("BlipForConditionalGeneration", "BlipForQuestionAnswering")


def tiny_blip(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=_TEXT, vision_config=_VISION, image_text_hidden_size=16)
    model = getattr(transformers, name)(config).double().eval()
    for module in model.vision_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 3  # patches that differ: attention makes a difference
    return model


@pytest.fixture(scope="module", params=WRITERS)
def blip(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_blip(request.param)


def picture() -> dict[str, Tensor]:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return {"input_ids": torch.tensor([[1, 20, 21, 2]]), "pixel_values": pixels.double()}


@torch.no_grad()
def answer_logprobs(model: PreTrainedModel, rows: int = 1) -> Tensor:
    """Log-probabilities [rows, M] of the answer, through the model's public parts."""
    inputs = picture()
    source = model.vision_model(inputs["pixel_values"].expand(rows, -1, -1, -1)).last_hidden_state
    ids = [3, 20, 21, *ANSWER]
    if hasattr(model, "text_encoder"):
        source = model.text_encoder(inputs["input_ids"].expand(rows, -1), encoder_hidden_states=source)[0]
        ids = [3, *ANSWER]
    given = torch.tensor([ids[:-1]] * rows)
    logprobs = model.text_decoder(given, encoder_hidden_states=source).logits.log_softmax(-1)
    return logprobs[:, -len(ANSWER) :].gather(2, torch.tensor(ANSWER).expand(rows, -1)[..., None])[..., 0]


def test_blip_baseline_is_the_models_own(blip):
    found = explain(blip, None, picture(), target=ANSWER)
    close(found.baseline_logprobs, answer_logprobs(blip)[0], 1e-10)
    if hasattr(blip, "text_encoder"):
        out = blip(**picture(), labels=torch.tensor([[3, *ANSWER]]), attention_mask=torch.ones(1, 4).long())
        assert -found.baseline_logprobs.mean().item() == pytest.approx(out.loss.item(), abs=1e-6)
    else:
        out = blip(input_ids=torch.tensor([[3, 20, 21, *ANSWER[:-1]]]), pixel_values=picture()["pixel_values"])
        expected = out.logits[0, -3:].log_softmax(-1)[torch.arange(3), ANSWER]
        close(found.baseline_logprobs, expected.detach(), 1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [None, (1,)], ids=["all-layers", "one-layer"])
def test_blip_scores_follow_the_definition(blip, mode, layers):
    rows = torch.ones(17, 17, dtype=torch.float64)
    rows[range(1, 17), range(1, 17)] = 0.1  # column 0 is the class token's, which is never suppressed
    with by_definition(rows, mode, layers, shape=(17, 17)):
        read = answer_logprobs(blip, rows=17)
    found = explain(blip, None, picture(), target=ANSWER, mode=mode, layers=layers, factor=0.1, kappa=1.0)
    assert found.scores.shape == (3, 16)
    assert found.scores.abs().max() > 1e-3
    close(found.scores, (read[0] - read[1:]).T, 1e-8)
    assert found.image_map(0).shape == (4, 4)
    assert {unit.kind for unit in found.units} == {"image"}


def test_blip_groups_patches(blip):
    assert len(explain(blip, None, picture(), target=ANSWER, tiles=(2, 1)).units) == 2
    everything = explain(blip, None, picture(), target=ANSWER, tiles=(1, 1), kappa=1.0, factor=0.0)
    assert everything.scores.abs().max() > 1e-3
    similar = explain(blip, None, picture(), target=ANSWER, kappa=0.1).scores
    assert not torch.allclose(similar, explain(blip, None, picture(), target=ANSWER, kappa=1.0).scores)


def test_blip_generates_its_target(blip):
    found = explain(blip, None, picture(), max_new_tokens=3)
    expected = blip.generate(**picture(), max_new_tokens=3, do_sample=False)[0].tolist()
    expected = expected[1 if hasattr(blip, "text_encoder") else 3 :]
    assert [target.id for target in found.targets] == (
        expected[:-1] if len(expected) > 1 and expected[-1] == 2 else expected
    )


def test_blip_takes_several_prompts(blip):
    both = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in picture().items()}
    first, second = explain(blip, None, both, target=[ANSWER, [5]])
    close(first.scores, explain(blip, None, picture(), target=ANSWER).scores, 1e-10)
    assert second.scores.shape == (1, 16)


def test_blip_is_left_as_it_was(blip):
    modules = [module for module in blip.modules() if type(module).__name__ == "BlipAttention"]
    with atman_implementation(blip):
        assert all("forward" in vars(module) for module in modules)
    assert not any("forward" in vars(module) for module in modules)


def test_blip_refuses_what_it_does_not_have(blip):
    name = type(blip).__name__
    with pytest.raises(ValueError, match=rf"sites must be None or \(\"vision\",\) for {name}, got \('decoder',\)"):
        explain(blip, None, picture(), target=ANSWER, sites=("decoder",))
    with pytest.raises(ValueError, match=f"images must be one image per prompt for {name}, got 0"):
        explain(blip, None, [1, 20, 2], target=ANSWER)
    with pytest.raises(ValueError, match="units='text' is about text"):
        explain(blip, None, picture(), target=ANSWER, units="text")
    with (
        pytest.raises(UnsupportedModelError, match=f"{name} cannot be steered"),
        steer(blip, None, [1, 20, 2], factors=[1.0, 0.1, 1.0]),
    ):
        pass


def test_blip_that_writes_nothing_is_refused():
    model = tiny_blip("BlipForImageTextRetrieval")
    with pytest.raises(UnsupportedModelError, match="BlipForImageTextRetrieval writes no text"):
        explain(model, None, picture(), target=ANSWER)


def test_blip_with_its_processor():
    from PIL import Image

    words = ["[PAD]", "[CLS]", "[SEP]", "[DEC]", "[UNK]", "[MASK]", "what", "is", "it", "a", "cat"]
    tokenizer = transformers.BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    size = {"height": 16, "width": 16}
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tokenizer)
    image = Image.new("RGB", (20, 30), (200, 30, 60))
    found = explain(tiny_blip("BlipForQuestionAnswering"), processor, "what is it", images=[image], target="a cat")
    assert [target.text for target in found.targets] == ["a", "cat"]
    assert found.prompt_ids == (1, 6, 7, 8, 2)
    assert found.image_map(0).shape == (4, 4)
    assert found.overlay(image).size == (20, 30)


def test_attention_calls_of_blip_see_every_patch(blip):
    seen: list[AttentionCall] = []

    class Look(Intervention):
        modules = None

        def attend(self, call: AttentionCall) -> Tensor:
            seen.append(call)
            return call.attend()

    with atman_implementation(blip), active(Look()):
        blip.vision_model(picture()["pixel_values"])
    assert [call.key.shape[2] for call in seen] == [17, 17]
    assert all(call.visible is None and not call.is_causal for call in seen)
