"""Texts to a dictionary: the most frequent words of a corpus, counted by worker processes."""

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import partial

from tqdm.auto import tqdm

from .remote.patterns_tfree import word_bytes
from .remote.words_tfree import Ruleset, split_words, structural_words

_TEXTS_PER_TASK = 64
_CHARACTERS_PER_TASK = 1 << 20


def build_dictionary(
    texts: Iterable[str],
    *,
    max_words: int = 500_000,
    min_count: int = 1,
    ruleset: Ruleset = "v1",
    special_tokens: Collection[str] = (),
    max_word_bytes: int = 256,
    num_proc: int = 1,
    show_progress: bool = True,
) -> list[str]:
    """Collect the most frequent words of a corpus, for `TFreeTokenizer(words=...)`.

    Args:
        texts: the corpus; read once, in order, and never held as a whole.
        max_words: how many words to keep at most.
        min_count: leave out words that occur less often.
        ruleset: word-splitting rules of the tokenizer to be.
        special_tokens: strings that stand for themselves in the texts, such as "<|endoftext|>"; never words.
        max_word_bytes: leave out words of more UTF-8 bytes.
        num_proc: worker processes; 1 counts in this one. The result does not depend on it.
        show_progress: show a progress bar on standard error.

    Returns:
        Words by falling count, ties in code-point order.

    Raises:
        ValueError: an argument is out of range.
    """
    if max_words < 1:
        raise ValueError(f"max_words must be at least 1, got {max_words}.")
    counts = count_words(
        texts,
        ruleset=ruleset,
        special_tokens=special_tokens,
        max_word_bytes=max_word_bytes,
        num_proc=num_proc,
        show_progress=show_progress,
    )
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in ranked[:max_words] if count >= min_count]


def count_words(
    texts: Iterable[str],
    *,
    ruleset: Ruleset = "v1",
    special_tokens: Collection[str] = (),
    max_word_bytes: int = 256,
    num_proc: int = 1,
    show_progress: bool = True,
) -> Counter[str]:
    """Count the words of a corpus. Arguments as for `build_dictionary`.

    Raises:
        ValueError: `num_proc` is below 1.
        TypeError: `texts` is a single string.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got {num_proc}.")
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of strings, got one string; give [text].")
    count = partial(_count_texts, ruleset=ruleset, special_tokens=tuple(special_tokens), max_word_bytes=max_word_bytes)
    total: Counter[str] = Counter()
    with tqdm(unit=" texts", unit_scale=True, desc="Counting words", disable=not show_progress) as progress:
        for size, counts in _map(count, _tasks(texts), num_proc):
            total.update(counts)
            progress.update(size)
    return total


def _count_texts(
    texts: list[str], *, ruleset: Ruleset, special_tokens: tuple[str, ...], max_word_bytes: int
) -> tuple[int, Counter[str]]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text, ruleset, special_tokens=special_tokens))
    for word in (*structural_words(ruleset), *special_tokens):
        counts.pop(word, None)
    too_long = [word for word in counts if 4 * len(word) > max_word_bytes and len(word_bytes(word)) > max_word_bytes]
    for word in too_long:
        del counts[word]
    return len(texts), counts


def _tasks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts so that a task is worth sending to another process and small enough to wait for."""
    task: list[str] = []
    size = 0
    for text in texts:
        task.append(text)
        size += len(text)
        if len(task) == _TEXTS_PER_TASK or size >= _CHARACTERS_PER_TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def _map(count: partial, tasks: Iterator[list[str]], num_proc: int) -> Iterator[tuple[int, Counter[str]]]:
    if num_proc == 1:
        yield from map(count, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        # imap reads its input ahead without limit, so tasks are handed over in rounds
        while batch := list(itertools.islice(tasks, 4 * num_proc)):
            yield from pool.imap_unordered(count, batch)
