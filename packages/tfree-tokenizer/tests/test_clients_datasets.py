"""`datasets.map` with worker processes: ids depend on the tokenizer alone, not on the process."""

import pickle

import pytest

datasets = pytest.importorskip("datasets")

TEXTS = [f"the house number {i} is\n\tDonaudampfschiff Żółć \U0001f600 {'x' * i}" for i in range(12)] + [
    "",
    "\ud800"[:0],
]


@pytest.mark.parametrize("batched", [True, False])
def test_two_worker_processes_give_the_ids_of_this_process(build, batched, tmp_path):
    tokenizer = build().tokenizer
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    mapped = dataset.map(
        lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]},
        batched=batched,
        batch_size=3,
        num_proc=2,
        remove_columns=["text"],
        cache_file_name=str(tmp_path / "ids.arrow"),
    )
    assert mapped["input_ids"][:] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_the_stored_ids_decode_to_the_texts(build, tmp_path):
    tokenizer = build().tokenizer
    dataset = datasets.Dataset.from_dict({"text": TEXTS}).map(lambda row: tokenizer(row["text"]))
    dataset.save_to_disk(tmp_path)
    loaded = datasets.load_from_disk(tmp_path)
    assert [tokenizer.decode(ids) for ids in loaded["input_ids"]] == TEXTS


def test_a_pickled_tokenizer_gives_the_same_ids_and_fingerprint(build):
    tokenizer = build().tokenizer
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    used = pickle.loads(pickle.dumps(tokenizer))
    assert used(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert used.dictionary_fingerprint == tokenizer.dictionary_fingerprint
    assert used("<|extra|>")["input_ids"] == tokenizer("<|extra|>")["input_ids"]


def test_map_recognizes_an_equal_tokenizer_and_reuses_its_cache(build):
    first, second = build().tokenizer, build().tokenizer
    fingerprints = {datasets.fingerprint.Hasher.hash(tokenizer) for tokenizer in (first, second)}
    assert len(fingerprints) == 1
