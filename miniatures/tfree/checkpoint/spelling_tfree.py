"""Words spelled in bytes: which ids of a sequence form one word, and how a spelled word is copied from the context.

A word outside the dictionary is the ids of its bytes: b - 1 "inside" ids, then one "last" id. It is ONE position of the
model, at its last id; inside ids are invisible there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dictionary_tfree import FactoredDictionary, build_factored_dictionary
from .patterns_tfree import HashSpec


@dataclass(frozen=True)
class WordsInIds:
    """The words of a batch of id sequences, as positions of a list of distinct words."""

    dictionary: FactoredDictionary
    """N distinct words of the batch; the last one is the empty word."""

    numbers: Tensor
    """int64 [N]: ids of the distinct words; from the number of ids on, spelled words; the empty word comes last."""

    word: Tensor
    """int64 [B, L]: word that position l stands for; at an inside id, the last finished word (or the empty one)."""

    is_final: Tensor
    """bool [B, L]: position l ends a word. False for the inside ids of spelled words."""

    spelled: tuple["SpelledWord", ...]
    """Occurrences of spelled words, in reading order."""


@dataclass(frozen=True)
class SpelledWord:
    """One occurrence of a spelled word."""

    row: int
    last: int
    """Position of its last byte."""

    data: bytes


def final_positions(input_ids: Tensor, first_byte_id: int | None) -> Tensor:
    """Mark the ids that end a word: bool [B, L], False for bytes inside a spelled word."""
    if first_byte_id is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return (input_ids < first_byte_id) | (input_ids >= first_byte_id + 256)


@torch.compiler.disable  # runs on the host, and how many words there are is data
def find_words(
    input_ids: Tensor, dictionary: FactoredDictionary, spec: HashSpec, first_byte_id: int | None
) -> WordsInIds:
    """Resolve ids to words.

    Args:
        input_ids: int64 [B, L], each in `[0, len(dictionary))`.
        dictionary: one entry per id.
        spec: hash of the words that the dictionary does not hold.
        first_byte_id: id of byte 0 inside a word, or None.

    Raises:
        TypeError: `input_ids` is not an integer tensor.
        IndexError: an id is out of range.
    """
    _check_ids(input_ids, len(dictionary))
    is_final = final_positions(input_ids, first_byte_id)
    spelled = _spelled_words(input_ids, first_byte_id) if first_byte_id is not None else ()

    number_of = {data: i for i, data in enumerate(dict.fromkeys(word.data for word in spelled))}
    word = input_ids.clone()
    if spelled:
        where = torch.tensor([(s.row, s.last, number_of[s.data]) for s in spelled], device=input_ids.device)
        word[where[:, 0], where[:, 1]] = len(dictionary) + where[:, 2]
    empty = len(dictionary) + len(number_of)
    if not bool(is_final.all()):
        last_final = _last_final(is_final)
        word = torch.where(last_final < 0, empty, word.gather(1, last_final.clamp(min=0)))

    used, index = torch.unique(word, return_inverse=True)
    from_dictionary = used[used < len(dictionary)]
    extra = [*map(_as_word, number_of), None]  # every spelled word ends a position, so all of them are used
    special = [i for i, extra_word in enumerate(extra) if isinstance(extra_word, str)]
    new_words = build_factored_dictionary(extra, spec, special).to(input_ids.device)
    found = dictionary.select(from_dictionary).join(new_words)
    new_numbers = torch.arange(len(dictionary), len(dictionary) + len(extra), device=input_ids.device)
    numbers = torch.cat([from_dictionary, new_numbers])
    return WordsInIds(found, numbers, index, is_final, spelled)


def word_positions(is_counted: Tensor, starts: Tensor | None = None) -> Tensor:
    """Number the words of each row from 0, at an inside id repeating the last number: int64 [B, L].

    Args:
        is_counted: bool [B, L], positions that end a word and are attended to.
        starts: bool [B, L], positions where a packed document begins and numbering restarts.
    """
    return (words_before(is_counted, starts) + is_counted.long() - 1).clamp(min=0)


def words_before(is_counted: Tensor, starts: Tensor | None = None) -> Tensor:
    """Count the words of its document before each position: int64 [B, L]; arguments as for `word_positions`."""
    count = is_counted.long().cumsum(1) - is_counted.long()
    if starts is not None:
        count = count - (count * starts).cummax(1).values
    return count


def seen_spelled_words(words: WordsInIds, document: Tensor, is_target: Tensor) -> Tensor:
    """Find the spelled words that could be copied where each target is predicted.

    Args:
        words: T targets among other words, J distinct words of them spelled.
        document: int64 [B, L], the packed document that each id belongs to.
        is_target: bool [B, L - 1], whether id l + 1 is a target.

    Returns:
        bool [T, J]: word j stands in the target's document, before the target.
    """
    number_of = {data: i for i, data in enumerate(dict.fromkeys(word.data for word in words.spelled))}
    row, before = is_target.nonzero(as_tuple=True)
    if not number_of:
        return is_target.new_zeros(row.shape[0], 0)
    where = torch.tensor([(s.row, s.last, number_of[s.data]) for s in words.spelled], device=document.device)
    documents = int(document.max()) + 1
    first = document.new_full((document.shape[0] * documents, len(number_of)), document.shape[1])
    place = (where[:, 0] * documents + document[where[:, 0], where[:, 1]]) * len(number_of) + where[:, 2]
    first.view(-1).scatter_reduce_(0, place, where[:, 1], "amin")  # where each document has the word first
    return first[row * documents + document[row, before + 1]] <= before[:, None]


@torch.compiler.disable
def copy_logits(
    logits: Tensor,
    scores: Tensor,
    words: WordsInIds,
    context_ids: Tensor,
    first_byte_id: int,
    floor: float,
    starts: Tensor | None = None,
) -> Tensor:
    """Spread the scores of the context's spelled words over the ids of their bytes, in place.

    The next id is a word of the dictionary or the first byte of a candidate, whose logit is the logsumexp of the scores
    of the candidates that begin with it. Inside a spelled word only bytes that continue a candidate are possible. By
    the chain rule the product over a word's bytes is its softmax weight.

    Args:
        logits: float [B, K, ids], the last K positions of the context; dictionary words filled in, byte ids at `floor`.
        scores: float [B, K, J], scores of the J distinct spelled words, in order of first appearance.
        words: the words of `context_ids`.
        context_ids: int64 [B, L], L >= K.
        first_byte_id: id of byte 0 inside a word.
        floor: stands for minus infinity.
        starts: bool [B, L], positions where a packed document begins; its words are no candidates of others.

    Returns:
        `logits`.
    """
    first_kept = context_ids.shape[1] - logits.shape[1]
    number_of = {data: i for i, data in enumerate(dict.fromkeys(word.data for word in words.spelled))}
    for row, begin, end in _documents(context_ids, starts):
        available: dict[bytes, int] = {}
        for word in words.spelled:
            if word.row == row and begin <= word.last < end:
                available.setdefault(word.data, word.last)
        if not available or end <= first_kept:
            continue
        first = max(begin, first_kept)
        kept = slice(first - first_kept, end - first_kept)
        ids = context_ids[row, begin:end]
        _copy_first_bytes(logits[row, kept], scores[row, kept], available, number_of, first, first_byte_id, floor)
        _copy_next_bytes(
            logits[row, kept], scores[row, kept], available, number_of, ids, begin, first, first_byte_id, floor
        )
    return logits


def _as_word(data: bytes) -> str | bytes:
    """Text instead of bytes for a control token without an id: it is spelled, but hashed from its whole string."""
    try:
        return data.decode("utf-8", "surrogatepass") if b"<|" in data else data
    except UnicodeDecodeError:
        return data


def byte_ids(data: bytes, first_byte_id: int) -> list[int]:
    """Spell a word: its inside ids and its last id."""
    return [first_byte_id + byte for byte in data[:-1]] + [first_byte_id + 256 + data[-1]]


def _copy_first_bytes(
    logits: Tensor,
    scores: Tensor,
    available: dict[bytes, int],
    number_of: dict[bytes, int],
    first_kept: int,
    first_byte_id: int,
    floor: float,
) -> None:
    position = torch.arange(logits.shape[0], device=logits.device) + first_kept  # [K]
    groups: dict[int, list[bytes]] = {}
    for data in available:
        groups.setdefault(byte_ids(data, first_byte_id)[0], []).append(data)
    for token, members in groups.items():
        seen_at = torch.tensor([available[data] for data in members], device=logits.device)
        member_scores = scores[:, [number_of[data] for data in members]].masked_fill(position[:, None] < seen_at, floor)
        logits[:, token] = member_scores.logsumexp(1).clamp(min=floor)


def _copy_next_bytes(
    logits: Tensor,
    scores: Tensor,
    available: dict[bytes, int],
    number_of: dict[bytes, int],
    document_ids: Tensor,
    begin: int,
    first_kept: int,
    first_byte_id: int,
    floor: float,
) -> None:
    prefix = b""
    for position, token in enumerate(document_ids.tolist(), begin):
        byte = token - first_byte_id
        prefix = prefix + bytes([byte]) if 0 <= byte < 256 else b""
        if position < first_kept or not prefix:
            continue
        groups: dict[int, list[int]] = {}
        for data, seen_at in available.items():
            if seen_at <= position and data.startswith(prefix) and len(data) > len(prefix):
                token_id = byte_ids(data, first_byte_id)[len(prefix)]
                groups.setdefault(token_id, []).append(number_of[data])
        if groups:  # a fragment that no candidate continues is treated as padding
            k = position - first_kept
            logits[k] = floor
            for token_id, members in groups.items():
                logits[k, token_id] = scores[k, members].logsumexp(0)


def _documents(context_ids: Tensor, starts: Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Row, first position and end of every document."""
    B, L = context_ids.shape
    for row in range(B):
        inner = [] if starts is None else starts[row, 1:].nonzero().squeeze(1).add(1).tolist()
        yield from ((row, begin, end) for begin, end in zip([0, *inner], [*inner, L], strict=True))


def _last_final(is_final: Tensor) -> Tensor:
    """Position of the last final position at or before each position, -1 before the first: int64 [B, L]."""
    position = torch.arange(is_final.shape[1], device=is_final.device)
    return torch.where(is_final, position, -1).cummax(1).values


def _spelled_words(input_ids: Tensor, first_byte_id: int) -> tuple[SpelledWord, ...]:
    is_last = (input_ids >= first_byte_id + 256) & (input_ids < first_byte_id + 512)
    where = is_last.nonzero().tolist()
    if not where:
        return ()
    rows = {row: input_ids[row].tolist() for row in {row for row, _ in where}}
    return tuple(SpelledWord(row, last, _collect_bytes(rows[row], last, first_byte_id)) for row, last in where)


def _collect_bytes(ids: Sequence[int], last: int, first_byte_id: int) -> bytes:
    start = last
    while start > 0 and 0 <= ids[start - 1] - first_byte_id < 256:
        start -= 1
    return bytes([token - first_byte_id for token in ids[start:last]] + [ids[last] - first_byte_id - 256])


def _check_ids(input_ids: Tensor, num_ids: int) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be an int64 or int32 tensor, got {input_ids.dtype}.")
    if input_ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        if low < 0 or high >= num_ids:
            raise IndexError(
                f"input_ids must lie in [0, {num_ids}) (the tokenizer's ids), got values from {low} to {high}."
            )
