"""A model is left as it was found, whatever happens; and an "atman" model outside an explanation is a plain model."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from atman_explain import AtMan, Explanation, ExplanationInterrupted, UnsupportedModelError, explain
from atman_explain.remote.hook_atman import active_interventions
from tests.support.atman import FAMILIES, MODES, PROMPT, TARGET, padded, plain_logprobs, reference_scores, tiny_model

MANY = 8  # prompts of the tests with several threads


def explained(model: Any, **settings: Any) -> Explanation:
    return explain(model, None, list(PROMPT), target=list(TARGET), **settings)


def close(one: Tensor, other: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=atol)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All state of a model that an explanation might touch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "implementations": [each._attn_implementation for each in configurations(model)],
        "configurations": [each.to_json_string(use_diff=False) for each in configurations(model)],
        "training": [module.training for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in hooks] for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [type(module).forward for module in model.modules()],
        "gradients": [(each.requires_grad, each.grad is None) for each in model.parameters()],
        "weights": [each._version for each in model.parameters()],
        "interventions": active_interventions(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def configurations(model: nn.Module) -> list[PreTrainedConfig]:
    found = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in found:
        found += [part for name in config.sub_configs if (part := getattr(config, name)) not in found]
    return found


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def trained() -> PreTrainedModel:
    """A model in the middle of training: dropout, some modules frozen in eval mode, gradient checkpointing."""
    model = tiny_model("llama", attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].eval()
    return model


@pytest.fixture
def unchanged(request: pytest.FixtureRequest) -> Iterator[Callable[[nn.Module], None]]:
    """Compares models at the end of the test with what they were when they were handed over."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    yield lambda model: before.append((model, fingerprint(model)))
    for model, state in before:
        assert fingerprint(model) == state


# Restored.


@pytest.mark.parametrize("mode", ["shift_min", "shift_min_all"])
def test_success_leaves_no_trace(trained: PreTrainedModel, unchanged: Callable[[nn.Module], None], mode: str) -> None:
    unchanged(trained)
    plain = tiny_model("llama")
    close(explained(trained, mode=mode).scores, reference_scores(plain, PROMPT, TARGET, mode=mode))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "sdpa"), ("llama", "eager"), ("llama", "atman"), ("gemma2", "eager"), ("gpt-oss", "atman")],
)
def test_any_implementation_is_switched_and_restored(
    name: str, implementation: str, unchanged: Callable[[nn.Module], None]
) -> None:
    model = tiny_model(name)
    expected = reference_scores(model, PROMPT, TARGET)
    model.set_attn_implementation(implementation)
    unchanged(model)
    close(explained(model).scores, expected)


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=tiny_model("llama").config))
    return model.double().eval()


def test_parts_of_a_configuration_get_their_own_implementations_back(unchanged: Callable[[nn.Module], None]) -> None:
    model = llava()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa", "": "eager"})
    names = [each._attn_implementation for each in configurations(model)]
    assert {"eager", "sdpa"} == set(names)
    unchanged(model)
    assert explained(model).scores.isfinite().all()


class _Trap:
    """A forward hook that raises at one of its calls."""

    def __init__(self, module: nn.Module, call: int, error: BaseException) -> None:
        self.calls = 0
        self._call = call
        self._error = error
        module.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1
        if self.calls == self._call:
            raise self._error


@pytest.mark.parametrize(
    ("part", "call"),
    [("", 1), ("", 3), ("", 6), ("model.embed_tokens", 1), ("model.layers.1.self_attn", 4), ("lm_head", 2)],
)
def test_an_exception_leaves_no_trace(
    trained: PreTrainedModel, unchanged: Callable[[nn.Module], None], part: str, call: int
) -> None:
    _Trap(trained.get_submodule(part), call, RuntimeError("out of memory"))
    unchanged(trained)
    with pytest.raises(RuntimeError, match="out of memory"):
        explained(trained, batch_size=2)


def test_an_exception_while_switching_leaves_no_trace(
    llama: PreTrainedModel, unchanged: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        llama.config._attn_implementation_internal = "atman"
        raise RuntimeError("no switch")

    unchanged(llama)
    monkeypatch.setattr(type(llama), "set_attn_implementation", fail)
    with pytest.raises(RuntimeError, match="no switch"):
        explained(llama)
    monkeypatch.undo()
    close(explained(llama).scores, reference_scores(llama, PROMPT, TARGET))


def test_bad_input_leaves_no_trace(trained: PreTrainedModel, unchanged: Callable[[nn.Module], None]) -> None:
    unchanged(trained)
    for bad in ({"target": [[1], [2]]}, {"target": [1], "layers": (7,)}, {"target": [1], "chunks": [[99]]}):
        with pytest.raises(ValueError):
            explain(trained, None, list(PROMPT), **bad)


def test_an_interruption_carries_what_was_computed(
    trained: PreTrainedModel, unchanged: Callable[[nn.Module], None]
) -> None:
    whole = explained(trained)
    _Trap(trained, 6, KeyboardInterrupt())  # after the plain run, its packed form, the probe, and two packed passes
    unchanged(trained)
    with pytest.raises(ExplanationInterrupted, match="partial") as caught:
        explained(trained, batch_size=2)
    (partial,) = caught.value.partial
    assert isinstance(caught.value, KeyboardInterrupt)
    assert partial.units == whole.units and partial.targets == whole.targets
    close(partial.baseline_logprobs, whole.baseline_logprobs)
    close(partial.scores[:, :4], whole.scores[:, :4])
    assert partial.scores[:, 4:].isnan().all()


def test_an_interruption_in_the_second_of_two_prompts(llama: PreTrainedModel) -> None:
    prompts, targets = [list(PROMPT), list(PROMPT[::-1])], [[3], [4]]
    whole = explain(llama, None, prompts, target=targets)
    _Trap(llama, 6, KeyboardInterrupt())  # three passes until the first prompt is known, one for its units, two more
    with pytest.raises(ExplanationInterrupted) as caught:
        explain(llama, None, prompts, target=targets, max_tokens_per_batch=12, batch_size=64)
    assert 1 <= len(caught.value.partial) <= 2
    first = caught.value.partial[0].scores
    known = first.isfinite()
    assert known.any()
    close(first[known], whole[0].scores[known])


def test_an_interruption_before_anything_was_computed(llama: PreTrainedModel) -> None:
    _Trap(llama, 1, KeyboardInterrupt())
    with pytest.raises(ExplanationInterrupted) as caught:
        explained(llama)
    assert caught.value.partial == []


def test_saving_after_an_explanation_has_no_trace(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "before")
    explained(llama)
    llama.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()


def test_the_implementation_is_not_saved(llama: PreTrainedModel, tmp_path: Path) -> None:
    llama.set_attn_implementation("atman")
    llama.save_pretrained(tmp_path)
    assert "atman" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="atman", dtype=torch.float64)
    close(explained(reloaded).scores, explained(llama).scores)


def test_gradients_and_training_work_afterwards(llama: PreTrainedModel) -> None:
    """Nothing that was made in an explanation, such as cached rotary tables, is an inference tensor."""
    explained(llama)
    llama.train()
    ids = torch.tensor([PROMPT])
    llama(input_ids=ids, labels=ids).loss.backward()
    assert all(each.grad is not None for each in llama.parameters())


def test_scores_need_no_gradient_and_can_be_changed(llama: PreTrainedModel) -> None:
    scores = explained(llama).scores
    assert not scores.requires_grad and not scores.is_inference()
    scores.mul_(2.0)


# Threads.


def _together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of tasks that are begun at the same time, each in a thread of its own."""
    barrier = threading.Barrier(len(tasks), timeout=60)

    def begin(task: Callable[[], Any]) -> Any:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(begin, task) for task in tasks]]


def test_threads_that_explain_different_models(unchanged: Callable[[nn.Module], None]) -> None:
    models = [tiny_model(name) for name in ("llama", "gpt2", "gemma2")]
    for model in models:
        unchanged(model)
    prompts = [[(7 * i + j) % 47 + 1 for j in range(9)] for i in range(MANY)]
    tasks = [lambda m=m: [explain(m, None, each, target=[3, 4]).scores for each in prompts] for m in models]
    for found, expected in zip(_together(tasks), [task() for task in tasks], strict=True):
        close(torch.stack(found), torch.stack(expected))


def test_threads_that_explain_one_model_differently(unchanged: Callable[[nn.Module], None]) -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    unchanged(model)
    settings: list[dict[str, Any]] = [{"mode": mode} for mode in MODES] + [{"factor": 3.0, "heads": (1,)}]
    tasks = [lambda s=s: [explained(model, **s).scores for _ in range(MANY // 2)] for s in settings]
    for found, expected in zip(_together(tasks), [task()[0] for task in tasks], strict=True):
        for each in found:
            close(each, expected)


def test_one_object_in_several_threads(llama: PreTrainedModel) -> None:
    atman = AtMan(llama)
    prompts = [[(7 * i + j) % 47 + 1 for j in range(9)] for i in range(4)]
    tasks = [lambda p=p: [atman.explain(p, target=[3, 4]).scores for _ in range(3)] for p in prompts]
    for found, expected in zip(_together(tasks), [task()[0] for task in tasks], strict=True):
        for each in found:
            close(each, expected)


def test_a_model_runs_plainly_in_other_threads_meanwhile(llama: PreTrainedModel) -> None:
    expected = plain_logprobs(llama, PROMPT, TARGET)
    seen: list[Tensor] = []

    def elsewhere(*_: Any) -> None:
        if len(seen) < 3 and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(plain_logprobs(llama, PROMPT, TARGET)))
            thread.start()
            thread.join()

    handle = llama.register_forward_pre_hook(elsewhere)
    explained(llama)
    handle.remove()
    assert len(seen) == 3
    for each in seen:
        close(each, expected)


class _Meeting:
    """Lets two threads enter a module at the same time."""

    def __init__(self, module: nn.Module) -> None:
        self._barrier = threading.Barrier(2)
        self._handle = module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        try:
            self._barrier.wait(timeout=5)
        except threading.BrokenBarrierError:
            self._handle.remove()


class OldStyle(LlamaForCausalLM):
    """A model of the time before `logits_to_keep`."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )


@pytest.fixture
def old_style() -> PreTrainedModel:
    model = OldStyle(copy.deepcopy(tiny_model("llama").config)).double().eval()
    model.load_state_dict(tiny_model("llama").state_dict())
    return model


def test_a_model_without_logits_to_keep(old_style: PreTrainedModel, unchanged: Callable[[nn.Module], None]) -> None:
    unchanged(old_style)
    close(explained(old_style).scores, reference_scores(old_style, PROMPT, TARGET))


def test_threads_that_meet_in_the_decoder(old_style: PreTrainedModel) -> None:
    prompts = [list(PROMPT), [4, 9, 6]]
    expected = [explain(old_style, None, each, target=list(TARGET)).scores for each in prompts]
    _Meeting(old_style.model)
    tasks = [lambda p=p: explain(old_style, None, p, target=list(TARGET)).scores for p in prompts]
    for found, each in zip(_together(tasks), expected, strict=True):
        close(found, each)


def test_threads_of_one_model_keep_it_in_eval_mode_as_long_as_they_need() -> None:
    """The second begins when the first has switched the model, and ends when the first has switched it back."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    expected = explained(model).scores
    inside = {"first": threading.Event(), "second": threading.Event()}
    leave = {"first": inside["second"], "second": threading.Event()}

    def wait(*_: Any) -> None:
        name = threading.current_thread().name
        inside[name].set()
        assert leave[name].wait(60)

    model.model.layers[0].register_forward_pre_hook(wait)
    found: dict[str, Tensor] = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: explained(model).scores}), name=name)
        for name in inside
    ]
    threads[0].start()
    assert inside["first"].wait(60)
    threads[1].start()
    threads[0].join()
    assert not any(module.training for module in model.modules())
    leave["second"].set()
    threads[1].join()
    for name in inside:
        close(found[name], expected)
    assert all(module.training for module in model.modules())


# Wrappers.


def test_lora_is_explained_like_the_merged_model(unchanged: Callable[[nn.Module], None]) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.3)
    model = peft.get_peft_model(tiny_model("llama"), config).double().train()
    unchanged(model)
    found = explained(model)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    close(found.scores, reference_scores(merged, PROMPT, TARGET))
    assert not torch.allclose(found.scores, explained(tiny_model("llama")).scores, atol=1e-3)


def test_virtual_prompt_tokens_are_refused() -> None:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match="PrefixTuningConfig, whose virtual tokens shift every position"):
        explained(model)


@pytest.mark.parametrize("way", ["wrapped", "in place", "forward"])
def test_compiled_models_are_run_uncompiled(way: str, unchanged: Callable[[nn.Module], None]) -> None:
    """Every layout of packed rows would be compiled anew."""
    model, graphs = tiny_model("llama"), []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend) if way == "wrapped" else model
    if way == "in place":
        model.compile(backend=backend)
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
    unchanged(model)
    found = explained(compiled).scores
    assert not graphs
    close(found, explained(tiny_model("llama")).scores)
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))  # compilers work again
    assert len(graphs) == 1


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model must be a transformers model, .* got Linear"):
        explain(nn.Linear(2, 2), None, [1, 2], target=[3])


# Precision.


@pytest.mark.filterwarnings("error:.*whole rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    """The head is computed in float32, so that read-outs do not jump in steps of bfloat16."""
    model = tiny_model(name).to(dtype)
    found = explained(model)
    assert found.scores.dtype == found.baseline_logprobs.dtype == torch.float32
    wide = reference_scores(copy.deepcopy(model).double(), PROMPT, TARGET)
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}[dtype]
    close(found.scores.double(), wide, atol=tolerance)
    assert dtype != torch.bfloat16 or not torch.equal(
        found.baseline_logprobs, found.baseline_logprobs.bfloat16().float()
    )


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_with_factor_one_scores_exactly_zero(mode: str) -> None:
    assert not explained(tiny_model("llama").bfloat16(), factor=1.0, mode=mode).scores.any()


@pytest.mark.filterwarnings("error:.*whole rows")
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    model = tiny_model("llama").float()
    expected = explained(model, mode=mode).scores
    with torch.autocast("cpu", torch.bfloat16):
        found = explained(model, mode=mode)
    assert found.scores.dtype == torch.float32
    close(found.scores, expected, atol=0.5)


def test_inference_mode(llama: PreTrainedModel) -> None:
    with torch.inference_mode():
        found = explained(llama, kappa=0.1)
    close(found.scores.clone(), reference_scores(llama, PROMPT, TARGET, kappa=0.1))


# An "atman" model outside an explanation.


def _pair(name: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel, float]:
    """A model, the same as "atman", and how closely they agree."""
    plain, ours = tiny_model(name, **changes), tiny_model(name, **changes)
    ours.set_attn_implementation("atman")
    if plain.config._attn_implementation == "eager":  # its softmax is in float32, and has NaN for padding in float64
        return plain.float(), ours.float(), 1e-4
    return plain, ours, 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_outside_of_an_explanation(name: str) -> None:
    plain, ours, tolerance = _pair(name)
    close(plain_logprobs(ours, PROMPT, TARGET), plain_logprobs(plain, PROMPT, TARGET), tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma2", "gpt-oss"])
@torch.no_grad()
def test_padding_outside_of_an_explanation(name: str, side: str) -> None:
    plain, ours, tolerance = _pair(name)
    batch = padded(PROMPT, PROMPT[:5], side=side)
    kept = batch["attention_mask"].bool()
    close(ours(**batch).logits[kept], plain(**batch).logits[kept], tolerance)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma2", "gpt-oss"])
def test_generation_outside_of_an_explanation(name: str, cache: str | None) -> None:
    plain, ours, _ = _pair(name)
    batch = padded(PROMPT, PROMPT[:7], side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    assert ours.generate(**batch, **options).tolist() == plain.generate(**batch, **options).tolist()


def test_beams_outside_of_an_explanation() -> None:
    plain, ours, _ = _pair("gemma2")
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    batch = padded(PROMPT, PROMPT[:7], side="left")
    assert ours.generate(**batch, **options).tolist() == plain.generate(**batch, **options).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_training_outside_of_an_explanation(name: str) -> None:
    plain, ours, tolerance = _pair(name)
    ids = torch.tensor([PROMPT])
    for model in (plain, ours):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        close(one.grad, other.grad, 10 * tolerance)


def test_dropout_outside_of_an_explanation() -> None:
    plain, ours, _ = _pair("llama", attention_dropout=0.5)
    found = []
    for model in (plain, ours):
        model.train()
        torch.manual_seed(1)
        found.append(plain_logprobs(model, PROMPT, TARGET))
    assert torch.equal(*found)


def test_dropout_with_soft_capping_is_refused() -> None:
    _, ours, _ = _pair("gemma2", attention_dropout=0.5)
    with pytest.raises(
        ValueError, match=r"dropout must be 0 where AtMan computes attention, got 0.5 in Gemma2Attention"
    ):
        ours.train()(input_ids=torch.tensor([PROMPT]))


def test_a_class_that_is_built_with_our_implementation() -> None:
    config = LlamaConfig(**FAMILIES["llama"].config, attn_implementation="atman")
    model = LlamaForCausalLM(config)
    assert model.config._attn_implementation == "atman"
    assert explained(model.double()).scores.any()
