import numpy as np
import torch

from benchmarks.peers import (
    OriginalEncoder,
    bag_embedding,
    csr_scores,
    dense_scores,
    flat_patterns,
    md5_rows,
    mix32,
    multi_hot,
    original_embedding,
    original_scores,
    score_matrix,
)

WORDS = ["hello", "aaaa", "a", "Größe", "hello"]


def trigram(text):
    return int.from_bytes(text.encode(), "little")


def test_mix32_gives_the_published_rows():
    assert mix32(np.array([trigram(" He")]), 8000, 10).tolist() == [
        [374, 1189, 2203, 2430, 3717, 4503, 5367, 5876, 6807, 7224]
    ]


def test_md5_rows_are_distinct_and_ascending():
    rows = md5_rows([trigram(" He"), trigram("llo")], 64, 8)
    assert all(row == sorted(set(row)) for row in rows.tolist())


def test_flat_patterns_count_distinct_trigrams_of_bytes():
    assert flat_patterns(WORDS, 80, 8).trigrams.tolist() == [5, 3, 1, 7, 5]


def test_flat_patterns_list_what_the_word_loop_lists():
    flat, loop = flat_patterns(["hello", "Größe"], 80, 8), OriginalEncoder(80, 8)
    for number, word in enumerate(["hello", "Größe"]):
        assert sorted(flat.rows[flat.word_of_row == number].tolist()) == sorted(loop.rows_of(word))


def test_all_embeddings_agree():
    flat, table = flat_patterns(WORDS, 80, 8), torch.randn(80, 6)
    want = bag_embedding(flat, table)
    torch.testing.assert_close(original_embedding(flat, table), want)
    torch.testing.assert_close(multi_hot(flat, table.dtype) @ table, want)


def test_all_scores_agree():
    flat, z = flat_patterns(WORDS, 80, 8), torch.randn(3, 80)
    matrix = score_matrix(flat, 0.8, z.dtype)
    want = original_scores(z, flat, 0.8)
    torch.testing.assert_close(csr_scores(z, matrix, flat), want)
    torch.testing.assert_close(dense_scores(z, matrix.to_dense(), flat), want)
