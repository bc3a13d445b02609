"""Text to ids, beside a byte-level BPE of 16k entries trained in the same run on the same half of the text."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.corpus import Corpus, corpus
from benchmarks.harness import Case, Fact, Options, register
from benchmarks.peers import OriginalEncoder
from tfree_tokenizer import TFreeTokenizer, build_dictionary, structural_words
from tfree_tokenizer.remote.lookup_tfree import WordLookup

BPE_ENTRIES = 16_000
WORDS = 100_000
TOTAL = {False: 400_000, True: 12_000}  # characters measured, by `quick`
SHAPES = {"docs": 4_000, "batch": 4_000, "long": 100_000}  # characters per text; docs are given one by one
CORPORA = ("prose", "markup")


@lru_cache
def bpe_for(name: str, quick: bool, texts: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE trained on the training half."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600 if quick else BPE_ENTRIES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training(corpus(name, texts), quick), trainer)
    return tokenizer


@lru_cache
def tokenizer_for(name: str, quick: bool, texts: tuple[str, ...] = ()) -> TFreeTokenizer:
    """Our tokenizer with the words of the training half: what is new in the measured half is spelled in bytes."""
    words = build_dictionary(_training(corpus(name, texts), quick), max_words=WORDS, show_progress=False)
    return TFreeTokenizer(words=words)


def _training(text: Corpus, quick: bool) -> list[str]:
    half = text.training[:40_000] if quick else text.training
    return [half[i : i + 4000] for i in range(0, len(half), 4000)]


def _register_public(shape: str, name: str) -> None:
    full_name = f"tfree.text.{shape}.{name}"

    @register(full_name, devices=("cpu",))
    def build(options: Options) -> Case:
        documents, size = _documents(shape, name, options)
        ours, bpe = tokenizer_for(name, options.quick, options.texts), bpe_for(name, options.quick, options.texts)
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
        original = OriginalEncoder(8000, 10)
        one_call = shape != "docs"
        return Case(
            name=full_name,
            ours=(lambda: ours(documents)["input_ids"])
            if one_call
            else (lambda: [ours(document)["input_ids"] for document in documents]),
            peers={
                "HF BPE 16k": (lambda: fast(documents)["input_ids"])
                if one_call
                else (lambda: [fast(document)["input_ids"] for document in documents])
            },
            others={"original, word by word": lambda: [original(document) for document in documents]},
            views={
                "ours": lambda ids: [ours.decode(one) for one in ids],
                "HF BPE 16k": lambda ids: [fast.decode(one) for one in ids],
            },
            bytes=size,
            size={"texts": len(documents), "bytes": size},
            dtype="int64",
            note="tokenizer(...); the ids differ by design, so what is compared is the text that they decode to",
        )


def _register_inner(shape: str, name: str) -> None:
    full_name = f"tfree.text.inner.{shape}.{name}"

    @register(full_name, devices=("cpu",))
    def build(options: Options) -> Case:
        documents, size = _documents(shape, name, options)
        ours, bpe = tokenizer_for(name, options.quick, options.texts), bpe_for(name, options.quick, options.texts)
        lookup = WordLookup(
            ours.dictionary_words,
            first_structural_id=ours.first_byte_id - len(structural_words(ours.ruleset)),
            ruleset=ours.ruleset,
            max_word_bytes=ours.max_word_bytes,
        )
        known = {word: number for number, word in enumerate(ours.dictionary_words)}
        return Case(
            name=full_name,
            ours=lambda: [encoded.ids for encoded in lookup.encode(documents)],
            peers={
                "tokenizers encode_batch": lambda: [e.ids for e in bpe.encode_batch(documents)],
                "tokenizers encode_batch_fast": lambda: [e.ids for e in bpe.encode_batch_fast(documents)],
            },
            views={
                "ours": lambda ids: [ours.decode(one.tolist()) for one in ids],
                "tokenizers encode_batch": lambda ids: [bpe.decode(one) for one in ids],
                "tokenizers encode_batch_fast": lambda ids: [bpe.decode(one) for one in ids],
            },
            others={
                "one regex, one dict probe": lambda: [
                    list(map(known.get, OriginalEncoder.SPLIT.findall(document))) for document in documents
                ]
            },
            bytes=size,
            size={"texts": len(documents), "bytes": size},
            dtype="int64",
            note="all texts in one call, without the Hugging Face wrapper; encode_batch_fast gives no offsets, as ours",
        )


def _documents(shape: str, name: str, options: Options) -> tuple[list[str], int]:
    characters = min(SHAPES[shape], TOTAL[options.quick] // 2)
    documents = corpus(name, options.texts).documents(characters, TOTAL[options.quick])
    return documents, sum(len(document.encode("utf-8", "surrogatepass")) for document in documents)


@register("tfree.text.per_word", devices=("cpu",))
def ids_per_word(options: Options) -> list[Fact]:
    """Ids per word between spaces, ours and BPE's, on every corpus."""
    facts = []
    for name in CORPORA:
        documents, _ = _documents("docs", name, options)
        words = sum(len(document.split()) for document in documents)
        ours, bpe = tokenizer_for(name, options.quick, options.texts), bpe_for(name, options.quick, options.texts)
        ids = [i for one in ours(documents)["input_ids"] for i in one]
        counts = {
            "ours": len(ids),
            "ours, of which bytes": sum(ours.first_byte_id <= i < ours.first_word_id for i in ids),
            "ours, of which structural": sum(i < ours.first_byte_id for i in ids),
            "HF BPE 16k": sum(len(e.ids) for e in bpe.encode_batch(documents)),
        }
        for who, count in counts.items():
            facts.append(
                Fact(
                    name="tfree.text.per_word",
                    value=count / words,
                    unit="ids per word",
                    size={"corpus": name, "words": words},
                    note=f"{who}; text: {corpus(name, options.texts).source}",
                )
            )
    return facts


for _shape in SHAPES:
    for _name in CORPORA:
        _register_public(_shape, _name)
        if _shape != "docs":
            _register_inner(_shape, _name)
