"""Fills an activation store from a dataset: once, in one pass for all layers, resumable after a kill."""

import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .activations import ActivationRows, activation_windows
from .labels import LabelReader, canonical_row, rows_of
from .store import INDEX_NAME, ActivationStore, StoreOrigin, StoreWriter, finish_store

logger = logging.getLogger(__name__)

_SAMPLED_TEXTS = 256
_NO_CUT = 1 << 30
_BYTES_PER_MARK = 8
"""seq_id and pos of a row, int32 each."""


class _Summary(NamedTuple):
    digest: str
    texts: int
    tokens: int
    """Estimated from the characters."""


def harvest(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    folder: str | Path,
    *,
    reader: LabelReader,
    targets: Mapping[int, nn.Module],
    site: str = "block",
    batch_size: int = 16,
    max_length: int = 512,
    drop_sink_tokens: bool = True,
    shard_tokens: int = 65536,
    rank: int = 0,
    processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress_bar: bool = False,
) -> ActivationStore:
    """Write the activations of a frozen language model on a labelled dataset to disk, or find that it was done before.

    Args:
        model: language model; only the part up to the last target runs.
        tokenizer: its tokenizer.
        dataset: rows with a text and labels: a `datasets.Dataset`, a list of dicts or an iterable of dicts.
        folder: of the store. A complete store of the same origin is used as it is; a part of one is continued.
        reader: which columns are read, and how.
        targets: layer -> module whose output is kept. All layers are kept in the same pass.
        site: what the targets are; recorded in the index.
        batch_size: texts per forward pass.
        max_length: longer texts are cut here.
        drop_sink_tokens: leave out the tokens that the tokenizer adds and the first token of each text.
        shard_tokens: rows per shard, and what a kill can lose.
        rank: which of the processes this is.
        processes: number of processes that share the work; all see the same folder.
        barrier: waits for the other processes.
        progress_bar: show progress and the estimated size of the store.

    Returns:
        The store, complete.

    Raises:
        ValueError: the folder holds a store of another origin (the message names the field), the disk has less space
            than needed, or the dataset does not fit `reader`.
    """
    folder, rows = Path(folder), rows_of(dataset)
    summary = _summarize(rows, reader, tokenizer, max_length)
    origin = _origin(model, tokenizer, summary, reader, targets, site, max_length, drop_sink_tokens)
    if (folder / INDEX_NAME).exists():
        store = ActivationStore(folder)
        origin.check_equal(vars(store.origin), folder)
        logger.info("Using the %d activations of %s.", len(store), folder)
        return store
    writer = StoreWriter(folder, origin, rank=rank, processes=processes)
    if rank == 0:
        _check_disk(folder, summary, origin, progress_bar)
    barrier()
    windows = activation_windows(
        model,
        tokenizer,
        rows,
        reader,
        targets,
        batch_size=batch_size,
        max_length=max_length,
        drop_sink_tokens=drop_sink_tokens,
        start=writer.progress.texts_done,
        rank=rank,
        processes=processes,
    )
    _write_shards(writer, windows, len(range(rank, summary.texts, processes)), shard_tokens, progress_bar)
    barrier()
    if rank == 0:
        finish_store(folder, origin, processes)
    barrier()
    return ActivationStore(folder)


def warn_of_single_class(store: ActivationStore) -> None:
    """Warn of concepts that all labelled tokens share, or none has: nothing can be learned about them."""
    counts = zip(store.origin.concepts, store.positives, store.negatives, strict=True)
    for concept, positives, negatives in counts:
        if not positives or not negatives:
            warnings.warn(
                f"all labelled tokens are of one class for the concept {concept!r} ({positives} positive, {negatives} "
                "negative); its latent cannot learn it. Check the label column, or add texts of the other class.",
                stacklevel=4,  # at the call of train()
            )


def _write_shards(
    writer: StoreWriter,
    windows: Iterable[tuple[int, ActivationRows]],
    texts: int,
    shard_tokens: int,
    progress_bar: bool,
) -> None:
    """Write what is left of this process's `texts` texts."""
    done, pending = writer.progress.texts_done, list[ActivationRows]()
    is_quiet = not progress_bar or writer.rank > 0
    with tqdm(total=texts, initial=done, desc="harvest", unit="text", disable=is_quiet) as bar:
        for texts_done, window in windows:
            pending.append(window)
            bar.update(texts_done - bar.n)
            if sum(len(part.seq_id) for part in pending) >= shard_tokens:
                writer.write(ActivationRows.cat(pending), texts_done)
                pending = []
    if pending:
        writer.write(ActivationRows.cat(pending), texts)


def _summarize(rows: Any, reader: LabelReader, tokenizer: Any, max_length: int) -> _Summary:
    """Read the dataset once, without the model: its hash, its size and, in passing, that every row can be read."""
    sample = list(islice(iter(rows), _SAMPLED_TEXTS))
    if not sample:
        raise ValueError("dataset must hold at least one row, got none.")
    encoded = reader.tokenize(sample, tokenizer, _NO_CUT)
    per_character = sum(len(text.input_ids) for text in encoded) / max(1, sum(_size(reader, row) for row in sample))
    digest, texts, tokens = hashlib.sha256(), 0, 0.0
    for number, row in enumerate(rows):
        try:
            digest.update(canonical_row(reader, row))
            if reader.level == "sequence":
                reader.sequence_labels(row)
        except ValueError as error:
            raise ValueError(f"{str(error).removesuffix('.')} (row {number} of the dataset).") from error
        texts += 1
        tokens += min(per_character * _size(reader, row), max_length)
    return _Summary(digest.hexdigest()[:32], texts, round(tokens))


def _size(reader: LabelReader, row: Mapping[str, Any]) -> int:
    text = reader.text_of(row)
    return len(text) if isinstance(text, str) else sum(len(word) + 1 for word in text)


def _origin(
    model: nn.Module,
    tokenizer: Any,
    summary: _Summary,
    reader: LabelReader,
    targets: Mapping[int, nn.Module],
    site: str,
    max_length: int,
    drop_sink_tokens: bool,
) -> StoreOrigin:
    from ..remote.sites_scar import hidden_size

    config = getattr(model, "config", None)
    return StoreOrigin(
        model=str(getattr(config, "name_or_path", "") or ""),
        revision=str(getattr(config, "_commit_hash", "") or ""),
        weights=_hash_of_weights(model),
        tokenizer=_hash_of_tokenizer(tokenizer),
        dataset=summary.digest,
        layers=sorted(targets),
        site=site,
        dtype=str(_dtype(model)).removeprefix("torch."),
        hidden_size=hidden_size(model),
        concepts=list(reader.concepts),
        label_level=reader.level,
        label_threshold=reader.threshold,
        soft_labels=reader.soft,
        max_length=max_length,
        drop_sink_tokens=drop_sink_tokens,
    )


def _dtype(model: nn.Module) -> torch.dtype:
    own = (p.dtype for name, p in model.named_parameters() if "scar_" not in name and p.is_floating_point())
    return next(own, torch.float32)


def _hash_of_weights(model: nn.Module) -> str:
    """Names, shapes and a few entries of all tensors: enough to tell a fine-tuned model from its base."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if "scar_" in name or not isinstance(value, Tensor):  # quantized modules keep other things there
            continue
        digest.update(f"{name.removeprefix('base_model.model.')} {tuple(value.shape)} {value.dtype}".encode())
        if value.numel() and not value.is_meta and not value.is_quantized:
            at = torch.linspace(0, value.numel() - 1, 16).long().unique()
            entries = value.detach()[torch.unravel_index(at.to(value.device), value.shape)] if value.ndim else value
            digest.update(entries.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _hash_of_tokenizer(tokenizer: Any) -> str:
    to_str = getattr(getattr(tokenizer, "backend_tokenizer", None), "to_str", None)
    parts: dict[str, Any] = json.loads(to_str()) if to_str else tokenizer.get_vocab()
    used = ("truncation", "padding") if to_str else ()  # where a tokenizer keeps the settings of its last call
    content = json.dumps({name: part for name, part in parts.items() if name not in used}, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _check_disk(folder: Path, summary: _Summary, origin: StoreOrigin, is_shown: bool) -> None:
    label_bytes = 4 if origin.soft_labels else 1
    act_bytes = len(origin.layers) * origin.hidden_size * torch.empty(0, dtype=getattr(torch, origin.dtype)).itemsize
    needed = summary.tokens * (act_bytes + label_bytes * len(origin.concepts) + _BYTES_PER_MARK)
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.glob("acts-*.safetensors"))
    message = (
        f"Activations of about {summary.tokens} tokens: {_gigabytes(needed)} in {folder} ({_gigabytes(free)} free)"
    )
    if needed > free:
        raise ValueError(
            f"store_dir must have room for the activations. {message}; give another store_dir, fewer texts, or "
            'store="stream".'
        )
    logger.info(message)
    if is_shown:
        tqdm.write(message, file=sys.stderr)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
