"""Shards and index of an activation store."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scar_peft.training.activations import ActivationRows
from scar_peft.training.store import ActivationStore, StoreOrigin, StoreWriter, finish_store, save_tensors, write_json

ORIGIN = StoreOrigin(
    model="m",
    revision="",
    weights="w",
    tokenizer="t",
    dataset="d",
    layers=[3],
    site="block",
    dtype="bfloat16",
    hidden_size=4,
    concepts=["a", "b"],
    label_level="sequence",
    label_threshold=0.5,
    soft_labels=False,
    max_length=8,
    drop_sink_tokens=True,
)


def rows(first: int, count: int) -> ActivationRows:
    """Rows whose numbers say which row they are."""
    numbers = torch.arange(first, first + count)
    acts = numbers[:, None].expand(-1, 4).to(torch.bfloat16)
    labels = torch.stack([numbers % 2, numbers % 3 - 1], 1).to(torch.int8)
    return ActivationRows({3: acts}, labels, (numbers // 5).int(), (numbers % 5).int())


def written(folder: Path, counts: tuple[int, ...] = (10, 7)) -> ActivationStore:
    writer, first = StoreWriter(folder, ORIGIN), 0
    for number, count in enumerate(counts):
        writer.write(rows(first, count), texts_done=number + 1)
        first += count
    finish_store(folder, ORIGIN)
    return ActivationStore(folder)


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    store = written(tmp_path)
    assert (len(store), store.shard_rows, store.texts) == (17, [10, 7], 2)
    whole = rows(0, 17)
    for shard, start, stop in [(0, 0, 10), (0, 3, 5), (1, 0, 7), (1, 6, 7), (1, 2, 2)]:
        offset = 10 * shard
        expected = whole.take(slice(offset + start, offset + stop))
        found = store.read(shard, start, stop)
        assert torch.equal(found.acts[3], expected.acts[3])
        assert all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
    assert store.seq_ids(1).tolist() == whole.seq_id[10:].tolist()


def test_layout_on_disk(tmp_path: Path) -> None:
    written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "acts-00000.safetensors",
        "acts-00001.safetensors",
        "index.json",
    ]
    shard = load_file(tmp_path / "acts-00000.safetensors")
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in shard.items()}
    assert shapes == {
        "acts.3": ([10, 4], torch.bfloat16),
        "labels": ([10, 2], torch.int8),
        "seq_id": ([10], torch.int32),
        "pos": ([10], torch.int32),
    }


def test_index_counts_classes_without_the_unlabelled(tmp_path: Path) -> None:
    store = written(tmp_path)
    labels = rows(0, 17).labels
    assert store.positives == (labels == 1).sum(0).tolist()
    assert store.negatives == (labels == 0).sum(0).tolist()


def test_writer_goes_on_behind_the_last_whole_shard(tmp_path: Path) -> None:
    StoreWriter(tmp_path, ORIGIN).write(rows(0, 10), texts_done=2)
    (tmp_path / "acts-00001.safetensors").write_bytes(b"half a shard")  # killed before its progress was noted
    writer = StoreWriter(tmp_path, ORIGIN)
    assert writer.progress.texts_done == 2
    writer.write(rows(10, 7), texts_done=3)
    finish_store(tmp_path, ORIGIN)
    assert ActivationStore(tmp_path).read(1).acts[3].float()[:, 0].tolist() == list(range(10, 17))


def test_failed_write_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scar_peft.training import store as module

    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.zeros(2)}, path)

    def dies(tensors: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"a": torch.ones(2)}, path)
    assert load_file(path)["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "index.json").unlink(),
            "must hold a complete activation store, got .* without index.json",
        ),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json: is not valid JSON"),
        (lambda folder: (folder / "acts-00001.safetensors").unlink(), "must hold acts-00001.safetensors"),
        (lambda folder: write_json({"format_version": 9}, folder / "index.json"), "format_version .* must be 1, got 9"),
    ],
)
def test_damaged_store_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    written(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        ActivationStore(tmp_path)


def test_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    written(tmp_path / "store")
    index = json.loads((tmp_path / "store" / "index.json").read_text())
    index["shards"][0]["file"] = "../outside.safetensors"
    write_json(index, tmp_path / "store" / "index.json")
    save_tensors({"acts.3": torch.zeros(1)}, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"must hold outside\.safetensors"):
        ActivationStore(tmp_path / "store")


def test_store_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset must hold at least one token that is not left out"):
        finish_store(tmp_path, ORIGIN)
