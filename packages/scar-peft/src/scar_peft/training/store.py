"""Activations on disk: safetensors shards of token rows and an index that says what they are."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .activations import ActivationRows

INDEX_NAME = "index.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StoreOrigin:
    """What determines the content of a store. Stores of equal origin hold the same rows."""

    model: str
    """Name or path of the language model."""
    revision: str
    """Commit of the model on the Hub, if known."""
    weights: str
    """Hash of a sample of the model's weights."""
    tokenizer: str
    """Hash of the tokenizer."""
    dataset: str
    """Hash of the texts and labels."""
    layers: list[int]
    """Layers whose outputs are kept."""
    site: str
    """Which output of a layer."""
    dtype: str
    """Dtype of the language model."""
    hidden_size: int
    """Width d of the activations."""
    concepts: list[str]
    """Names of the label columns C of the store."""
    label_level: str
    """How labels were given."""
    label_threshold: float
    """From where a float was positive."""
    soft_labels: bool
    """Whether labels between 0 and 1 were kept."""
    max_length: int
    """Where texts were cut."""
    drop_sink_tokens: bool
    """Whether special and first tokens were left out."""

    def check_equal(self, other: Mapping[str, Any], folder: Path) -> None:
        """Raise a ValueError that names the first field in which a store in `folder` differs."""
        for name, mine in asdict(self).items():
            if other.get(name) != mine:
                raise ValueError(
                    f"{name} of the activation store must be {mine!r}, got {other.get(name)!r} in {folder}; "
                    "give another store_dir, or delete that folder to harvest again."
                )


@dataclass(kw_only=True)
class StoreProgress:
    """The shards that one process has written so far."""

    texts_done: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    """`{"file": name, "rows": N}` of each."""
    positives: list[int] = field(default_factory=list)
    """Per concept, the tokens with a label of at least one half."""
    negatives: list[int] = field(default_factory=list)
    """Per concept, the tokens with a label below."""

    def count(self, labels: Tensor) -> None:
        """Add the labels `[N, C]` of one more shard."""
        positives, negatives = (labels >= 0.5).sum(0).tolist(), ((labels >= 0) & (labels < 0.5)).sum(0).tolist()
        self.positives = [a + b for a, b in zip(self.positives or [0] * len(positives), positives, strict=True)]
        self.negatives = [a + b for a, b in zip(self.negatives or [0] * len(negatives), negatives, strict=True)]


class StoreWriter:
    """Writes the shards of one process; what it has written survives a kill."""

    def __init__(self, folder: Path, origin: StoreOrigin, *, rank: int = 0, processes: int = 1) -> None:
        """Begin, or go on where an earlier writer of the same origin stopped.

        Raises:
            ValueError: the folder holds part of another store; the message names the field that differs.
        """
        self.folder, self.origin, self.rank, self.processes = folder, origin, rank, processes
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"progress-{rank:05d}.json"
        self.progress = self._read_progress()

    def write(self, rows: ActivationRows, texts_done: int) -> None:
        """Write one shard; `texts_done` of this process's texts are then on disk."""
        number = self.rank + self.processes * len(self.progress.shards)
        name = f"acts-{number:05d}.safetensors"
        tensors = {f"acts.{layer}": values.contiguous() for layer, values in rows.acts.items()}
        tensors |= {"labels": rows.labels, "seq_id": rows.seq_id, "pos": rows.pos}
        save_tensors(tensors, self.folder / name)
        self.progress.count(rows.labels)
        self.progress.texts_done = texts_done
        self.progress.shards.append({"file": name, "rows": len(rows.seq_id)})
        header = {"format_version": FORMAT_VERSION, "processes": self.processes, "origin": asdict(self.origin)}
        write_json(header | {"progress": asdict(self.progress)}, self._path)

    def _read_progress(self) -> StoreProgress:
        if not self._path.exists():
            return StoreProgress()
        saved = read_json(self._path)
        self.origin.check_equal(saved.get("origin", {}), self.folder)
        if saved["processes"] != self.processes:
            raise ValueError(
                f"processes of the interrupted harvest in {self.folder} was {saved['processes']}, got "
                f"{self.processes}; go on with as many, or delete that folder."
            )
        return StoreProgress(**saved["progress"])


def finish_store(folder: Path, origin: StoreOrigin, processes: int = 1) -> None:
    """Turn the shards of all processes into a complete store. Called once, after all have written."""
    paths = [folder / f"progress-{rank:05d}.json" for rank in range(processes)]
    parts = [StoreProgress(**read_json(path)["progress"]) for path in paths if path.exists()]
    if not parts:
        raise ValueError("dataset must hold at least one token that is not left out, got none.")
    shards = sorted((shard for part in parts for shard in part.shards), key=lambda shard: shard["file"])
    index = {
        "format_version": FORMAT_VERSION,
        "origin": asdict(origin),
        "texts": sum(part.texts_done for part in parts),
        "tokens": sum(shard["rows"] for shard in shards),
        "positives": [sum(counts) for counts in zip(*(part.positives for part in parts), strict=True)],
        "negatives": [sum(counts) for counts in zip(*(part.negatives for part in parts), strict=True)],
        "shards": shards,
    }
    write_json(index, folder / INDEX_NAME)
    for path in paths:
        path.unlink(missing_ok=True)


class ActivationStore:
    """A complete store, read through memory maps."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open a store.

        Raises:
            ValueError: the folder holds no complete store, or a shard is missing or of another size.
        """
        self.folder = Path(folder)
        path = self.folder / INDEX_NAME
        if not path.exists():
            raise ValueError(
                f"store_dir must hold a complete activation store, got {self.folder} without {INDEX_NAME}."
            )
        index = read_json(path)
        if index.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format_version of the activation store must be {FORMAT_VERSION}, got {index.get('format_version')!r}."
            )
        known = {f.name for f in fields(StoreOrigin)}
        self.origin = StoreOrigin(**{name: value for name, value in index["origin"].items() if name in known})
        self.texts: int = index["texts"]
        self.tokens: int = index["tokens"]
        self.positives: list[int] = index["positives"]
        self.negatives: list[int] = index["negatives"]
        self.shard_rows: list[int] = [shard["rows"] for shard in index["shards"]]
        self._paths = [self.folder / Path(shard["file"]).name for shard in index["shards"]]
        for shard_path in self._paths:
            if not shard_path.exists():
                raise ValueError(f"store_dir must hold {shard_path.name}, which its {INDEX_NAME} lists; {self.folder}.")

    def __len__(self) -> int:
        """Number of token rows."""
        return self.tokens

    def read(self, shard: int, start: int = 0, stop: int | None = None) -> ActivationRows:
        """Rows `start` to `stop` of one shard, as copies in memory."""
        with safe_open(self._paths[shard], framework="pt") as file:
            stop = self.shard_rows[shard] if stop is None else stop
            acts = {layer: file.get_slice(f"acts.{layer}")[start:stop] for layer in self.origin.layers}
            labels, seq_id, pos = (file.get_slice(name)[start:stop] for name in ("labels", "seq_id", "pos"))
        return ActivationRows(acts, labels, seq_id, pos)

    def seq_ids(self, shard: int) -> np.ndarray:
        """Number of the text of each row of one shard: `[N]` int32."""
        with safe_open(self._paths[shard], framework="pt") as file:
            return np.asarray(file.get_tensor("seq_id").numpy())


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file in one step: after a failure the previous file is still there, whole."""
    temporary = path.with_name(f".{path.name}.part")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file in one step."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        json.dump(value, file, indent=1)
    os.replace(file.name, path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON: {error}.") from error


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
