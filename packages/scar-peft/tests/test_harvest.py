"""The activations of a frozen model reach the store exactly, once, and survive interruptions."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, OPTConfig, OPTForCausalLM

import scar_peft
from scar_peft.remote.sites_scar import target_names
from scar_peft.training import activations as activations_module
from scar_peft.training.activations import activation_windows, capture_activations
from scar_peft.training.harvest import harvest, warn_of_single_class
from scar_peft.training.labels import LabelReader
from scar_peft.training.store import ActivationStore
from tests.support.scar_texts import register_texts, tiny_llama, word_tokenizer
from tfree_tokenizer import TFreeConfig, TFreeForCausalLM, TFreeTokenizer

READER = LabelReader(concepts=("archaic",), columns=("archaic",))


def targets_of(model: nn.Module, layers: list[int], site: str = "block") -> dict[int, nn.Module]:
    return {layer: model.get_submodule(name) for layer, name in target_names(model, layers, site).items()}


def fill(
    folder: Path, model: Any = None, rows: Any = None, layers: tuple[int, ...] = (0,), **settings: Any
) -> ActivationStore:
    model = model or tiny_llama()
    rows = register_texts(20) if rows is None else rows
    arguments = {"reader": READER, "targets": targets_of(model, list(layers)), "batch_size": 2} | settings
    return harvest(model, word_tokenizer(), rows, folder, **arguments)


def rows_by_token(store: ActivationStore, layer: int = 0) -> dict[tuple[int, int], torch.Tensor]:
    shards = [store.read(shard) for shard in range(len(store.shard_rows))]
    return {
        (seq, pos): act
        for rows in shards
        for seq, pos, act in zip(rows.seq_id.tolist(), rows.pos.tolist(), rows.acts[layer], strict=True)
    }


@pytest.mark.parametrize("site", ["block", "mlp", "attn"])
def test_early_stop_gives_the_activations_of_the_full_forward_pass(site: str) -> None:
    model, ids = tiny_llama(layers=4), torch.arange(12).view(2, 6)
    targets = targets_of(model, [0, 2], site)
    whole: dict[int, torch.Tensor] = {}
    for layer, module in targets.items():
        module.register_forward_hook(
            lambda m, a, out, layer=layer: whole.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
    model(input_ids=ids)
    ran: list[int] = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    captured = capture_activations(model, targets, {"input_ids": ids})
    assert ran == [0, 1, 2]
    assert all(torch.equal(captured[layer], whole[layer]) for layer in targets)


def test_words_that_tfree_has_to_spell_have_an_activation_for_each_token() -> None:
    tokenizer = TFreeTokenizer(words=["the", "house", "is", "small"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = TFreeForCausalLM(TFreeConfig.for_tokenizer(tokenizer, **sizes)).eval()
    model.set_dictionary(tokenizer)
    inputs = dict(tokenizer("the unheard-of house", return_tensors="pt"))
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states[1]
    captured = capture_activations(model, targets_of(model, [0]), inputs)
    assert captured[0].shape[1] == inputs["input_ids"].shape[1] > 5
    torch.testing.assert_close(captured[0], want)


def test_tokens_that_a_family_lays_one_after_the_other_are_put_back_in_rows() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=32, word_embed_proj_dim=16, **sizes)).eval()
    ids = torch.arange(2, 14).view(2, 6)
    captured = capture_activations(model, targets_of(model, [0], "mlp"), {"input_ids": ids})
    assert captured[0].shape == (2, 6, 16)


def test_target_without_a_row_per_token_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=32, **sizes)).eval()
    with pytest.raises(ValueError, match=r"one row per token, got \(1, 16\) of layer 0 for 3 tokens"):
        capture_activations(model, {0: model.pooler}, {"input_ids": torch.arange(3)[None]})


def test_capture_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    model.model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    capture_activations(model, targets_of(model, [0]), {"input_ids": torch.arange(3)[None]})
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not model.model.layers[0]._forward_hooks


def test_target_that_does_not_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"targets must run in the forward pass of the model; layers \[7\] did not"):
        capture_activations(tiny_llama(), {7: nn.Linear(1, 1)}, {"input_ids": torch.arange(3)[None]})


def test_each_token_has_the_activation_of_its_own_text_whatever_the_padding(tmp_path: Path) -> None:
    model, tokenizer, rows = tiny_llama(), word_tokenizer(), register_texts(6)
    rows[2]["text"] = "thou hath"
    found = rows_by_token(fill(tmp_path, model, rows, batch_size=4), layer=0)
    for number, row in enumerate(rows):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        alone = capture_activations(model, targets_of(model, [0]), {"input_ids": ids})[0][0]
        assert {pos for seq, pos in found if seq == number} == set(range(1, len(alone)))  # without <s>
        mine = torch.stack([found[number, pos] for pos in range(1, len(alone))])
        torch.testing.assert_close(mine, alone[1:])


@pytest.mark.parametrize(("begins", "drop", "first"), [(True, True, 1), (False, True, 1), (True, False, 0)])
def test_sink_tokens_are_left_out_unless_asked_for(tmp_path: Path, begins: bool, drop: bool, first: int) -> None:
    model = tiny_llama()
    store = harvest(
        model,
        word_tokenizer(begins),
        register_texts(2),
        tmp_path,
        reader=READER,
        targets=targets_of(model, [0]),
        drop_sink_tokens=drop,
    )
    assert store.read(0).pos.min() == first


def test_several_layers_are_kept_in_one_pass(tmp_path: Path) -> None:
    model = tiny_llama(layers=3)
    calls: list[Any] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    store = fill(tmp_path, model, register_texts(4), layers=(0, 2), batch_size=4)
    assert len(calls) == 1
    rows = store.read(0)
    assert set(rows.acts) == {0, 2}
    assert not torch.equal(rows.acts[0], rows.acts[2])
    assert rows.labels.dtype == torch.int8 and rows.seq_id.dtype == rows.pos.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_keep_the_dtype_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    store = fill(tmp_path, tiny_llama().to(dtype), register_texts(2))
    assert store.read(0).acts[0].dtype == dtype
    assert store.origin.dtype == str(dtype).removeprefix("torch.")


def test_soft_labels_are_kept_as_floats(tmp_path: Path) -> None:
    reader = LabelReader(concepts=("archaic",), columns=("archaic",), soft=True)
    rows = [row | {"archaic": 0.25} for row in register_texts(2)]
    assert fill(tmp_path, rows=rows, reader=reader).read(0).labels.unique().tolist() == [0.25]


def test_quantized_base_is_harvested(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear}, dtype=torch.qint8)
    assert fill(tmp_path, model, register_texts(2)).read(0).acts[0].dtype == torch.float32


def test_matching_store_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fill(tmp_path)
    monkeypatch.setattr(activations_module, "capture_activations", lambda *_: pytest.fail("harvested again"))
    assert fill(tmp_path).tokens == first.tokens


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("dataset", {"rows": register_texts(20, seed=1)}),
        ("weights", {"model": tiny_llama(seed=1)}),
        ("dtype", {"model": tiny_llama().bfloat16()}),
        ("layers", {"layers": (1,)}),
        ("site", {"site": "mlp"}),
        ("max_length", {"max_length": 9}),
        ("drop_sink_tokens", {"drop_sink_tokens": False}),
        ("concepts", {"reader": LabelReader(concepts=("old",), columns=("archaic",))}),
        ("soft_labels", {"reader": LabelReader(concepts=("archaic",), columns=("archaic",), soft=True)}),
    ],
)
def test_store_of_another_origin_is_refused_by_field(tmp_path: Path, field: str, change: dict[str, Any]) -> None:
    fill(tmp_path)
    if field == "dtype":  # the weights differ as well: that is not what is asked here
        index = json.loads((tmp_path / "index.json").read_text())
        index["origin"]["dtype"], change = "float16", {}
        (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"^{field} of the activation store must be .*, got .*; give another store_dir"
    ):
        fill(tmp_path, **change)


def test_killed_harvest_goes_on_and_loses_only_the_open_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = register_texts(60)
    whole = fill(tmp_path / "whole", rows=rows, shard_tokens=1)
    real, calls = activations_module.capture_activations, []

    def dies(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:  # in the third window of eight batches
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(activations_module, "capture_activations", dies)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "killed", rows=rows, shard_tokens=1)
    with pytest.raises(ValueError, match="store_dir must hold a complete activation store"):
        ActivationStore(tmp_path / "killed")
    calls.clear()
    calls.extend([1] * 20)
    resumed = fill(tmp_path / "killed", rows=rows, shard_tokens=1)
    assert len(calls) - 20 == 30 - 16  # 30 batches in all, 16 of them in the two windows on disk
    assert resumed.shard_rows == whole.shard_rows
    for shard in range(len(whole.shard_rows)):
        assert torch.equal(resumed.read(shard).acts[0], whole.read(shard).acts[0])
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_part_of_another_harvest_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, rank=0, processes=1, shard_tokens=1)
    (tmp_path / "index.json").rename(tmp_path / "kept.json")
    index = json.loads((tmp_path / "kept.json").read_text())
    progress = {"texts_done": 16, "shards": [], "positives": [], "negatives": []}
    saved = {"processes": 2, "origin": index["origin"], "progress": progress}
    (tmp_path / "progress-00000.json").write_text(json.dumps(saved))
    with pytest.raises(
        ValueError, match=r"processes of the interrupted harvest in .* was 2, got 1; go on with as many"
    ):
        fill(tmp_path)
    with pytest.raises(ValueError, match=r"^max_length of the activation store"):
        fill(tmp_path, max_length=3)


def test_processes_share_the_texts(tmp_path: Path) -> None:
    rows, alone = register_texts(11), fill(tmp_path / "one", rows=register_texts(11))
    model = tiny_llama()
    for rank in (1, 0):  # the first finishes the store
        if rank:
            with pytest.raises(ValueError, match="complete activation store"):
                fill(tmp_path / "two", model, rows, rank=rank, processes=2)
        else:
            both = fill(tmp_path / "two", model, rows, rank=rank, processes=2)
    mine, expected = rows_by_token(both), rows_by_token(alone)
    assert mine.keys() == expected.keys()
    assert (both.positives, both.negatives, both.texts) == (alone.positives, alone.negatives, 11)
    torch.testing.assert_close([mine[key] for key in expected], list(expected.values()))


def test_disk_that_is_too_small_is_refused_before_the_harvest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(ValueError, match=r"store_dir must have room .* about \d+ tokens: 0.00 GB .*0.00 GB free\)"):
        fill(tmp_path)
    Usage.free = 10**9
    with caplog.at_level("INFO"):
        store = fill(tmp_path)
    estimate = int(caplog.text.partition("about ")[2].split()[0])
    assert store.tokens <= estimate <= 1.2 * store.tokens  # the estimate counts the tokens that are left out


def test_single_class_warns_by_concept(tmp_path: Path) -> None:
    rows = [row | {"archaic": 1} for row in register_texts(3)]
    store = fill(tmp_path, rows=rows)
    with pytest.warns(UserWarning, match=r"one class for the concept 'archaic' \(\d+ positive, 0 negative\)"):
        warn_of_single_class(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_single_class(fill(tmp_path / "both"))


@pytest.mark.parametrize("rows", [[], [{"text": "", "archaic": 1}]])
def test_dataset_without_tokens_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="dataset must hold at least one"):
        fill(tmp_path, rows=rows)


def test_wrong_label_is_found_before_the_harvest_and_placed(tmp_path: Path) -> None:
    rows = register_texts(400)
    rows[300]["archaic"] = 7
    with pytest.raises(ValueError, match=r"label column 'archaic' must hold .* got 7 \(row 300 of the dataset\)"):
        fill(tmp_path, rows=rows)
    assert not list(tmp_path.iterdir())


def test_long_texts_are_cut(tmp_path: Path) -> None:
    assert fill(tmp_path, max_length=5).read(0).pos.max() == 4


def test_windows_skip_unwanted_texts_and_count_them() -> None:
    model = tiny_llama()
    windows = activation_windows(
        model,
        word_tokenizer(),
        register_texts(20),
        READER,
        targets_of(model, [0]),
        batch_size=1,
        is_wanted=lambda text: text % 2 == 1,
    )
    done, rows = next(windows)
    assert done == 16 and sorted(set(rows.seq_id.tolist())) == [1, 3, 5, 7, 9, 11, 13, 15]


def test_steering_of_the_adapter_does_not_reach_the_activations(tmp_path: Path) -> None:
    base = tiny_llama()
    clean = fill(tmp_path / "clean", base).read(0).acts[0]
    model = get_peft_model(
        base, scar_peft.ScarConfig(layers=[0], site="block", concepts=["archaic"], mode="reconstruct")
    )
    layer = scar_peft.scar_layers(model)[0]
    flags = [p.requires_grad for p in model.parameters()]
    with scar_peft.steering(model, archaic=3.0):
        steered = fill(tmp_path / "steered", model, targets={0: layer.get_base_layer()}).read(0).acts[0]
    assert torch.equal(clean, steered)
    assert [p.requires_grad for p in model.parameters()] == flags and not layer.disable_adapters


def test_store_made_without_the_adapter_serves_the_model_with_it(tmp_path: Path) -> None:
    base = tiny_llama()
    first = fill(tmp_path, base)
    model = get_peft_model(base, scar_peft.ScarConfig(layers=[0], site="block", concepts=["archaic"]))
    layer = scar_peft.scar_layers(model)[0]
    assert fill(tmp_path, model, targets={0: layer.get_base_layer()}).origin == first.origin
