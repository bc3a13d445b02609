"""Converting an original checkpoint: the same logits and words, and nothing unsafe or unfitting gets through."""

import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.audit import no_unpickling
from tests.support.original_tfree import WORDS, OriginalModel

TEXTS = [
    "The house is small, the House is small. 11",
    "das Haus\n\n\n    is  é Zwetschge Zwetschge",
    "<|startoftext|>the house <|unheard-of|> is<|endoftext|>",
]


@pytest.fixture(scope="module")
def original() -> OriginalModel:
    return OriginalModel()


@pytest.fixture(scope="module")
def complete(original: OriginalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the original's tokenizer.pt. Leave it as it is."""
    return original.save(tmp_path_factory.mktemp("complete") / "original")


@pytest.fixture
def source(original: OriginalModel, tmp_path: Path) -> Path:
    """Without tokenizer.pt, to be damaged."""
    return original.save(tmp_path / "original", with_tokenizer=False)


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., Any]:
    """`convert(source, **options)` writes to `tmp_path / "out"`."""
    from tfree_tokenizer import convert_original_checkpoint

    return lambda source, **options: convert_original_checkpoint(source, tmp_path / "out", **options)


@pytest.fixture(scope="module")
def converted(complete: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from tfree_tokenizer import convert_original_checkpoint
    from tfree_tokenizer.loading import load_pretrained

    folder = tmp_path_factory.mktemp("converted") / "out"
    with no_unpickling():
        convert_original_checkpoint(complete, folder)
    return load_pretrained(folder)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", TEXTS)
def test_the_converted_model_predicts_the_originals_rows_and_words(original, converted, text):
    from tfree_tokenizer import split_words

    tokenizer, model = converted
    assert model.config.decode_mode == "contrast"
    words = split_words(text, special_syntax="any")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(ids, output_hash_logits=True)
    is_final = (ids[0] < tokenizer.first_byte_id) | (ids[0] >= tokenizer.first_byte_id + 256)
    expected = original.forward(words)
    torch.testing.assert_close(output["hash_logits"][0, is_final], expected, rtol=0, atol=2e-5)

    word_of_id = {i: word for i, word in enumerate(tokenizer.words_by_id()) if word is not None}
    known = list(word_of_id)
    chosen = output.logits[0, is_final][:, known].argmax(1)
    scores = original.contrast(expected, list(word_of_id.values()), edge_weight=0.8)
    assert [word_of_id[known[i]] for i in chosen] == [list(word_of_id.values())[i] for i in scores.argmax(1)]


def test_the_forward_pass_depends_on_every_detail_that_is_converted(original, converted):
    """The comparison above would notice: weights of queries left interleaved change the logits visibly."""
    from tfree_tokenizer.conversion import rotate_half_order

    weight = original.weights["transformer.layers.0.attention.query.weight"]
    stored = converted[1].model.layers[0].self_attn.q_proj.weight
    assert torch.equal(rotate_half_order(weight, original.heads), stored)
    assert not torch.allclose(weight, stored, atol=0.1)


def test_rotary_pairs_move_to_the_two_halves_of_their_head():
    from tfree_tokenizer.conversion import rotate_half_order

    assert rotate_half_order(torch.arange(8.0)[:, None], 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_result_carries_the_code_that_the_stock_classes_ask_for_and_no_other_kind_of_file(
    complete, convert, tmp_path
):
    convert(complete)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_tfree.TFreeForCausalLM"
    assert (tmp_path / "out" / "modeling_tfree.py").is_file()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".jinja", ".py", ".safetensors"}


def test_the_report_counts_what_was_kept_and_left_out(complete, convert):
    report = convert(complete)
    assert report.num_words == len([word for word in WORDS if "<|" not in word])
    assert report.rows_verified > 20
    assert "<|startoftext|>" in report.special_words
    assert report.special_words[0] == "<|endoftext|>"
    assert sorted(report.dropped_words.values()) == [4, 7]
    assert "7 spacing words" in str(report)
    assert "4 spacing packs that the splitting rules never produce" in str(report)


def test_words_that_no_text_contains_are_left_out(source, convert):
    words = ["house", "two words", "", "<|half", "a<|b", "1", "12", "house", "x" * 5000, "<|user|>", "<|>"]
    report = convert(source, dictionary=words)
    assert report.num_words == 2
    assert "<|user|>" in report.special_words
    assert report.dropped_words["repeated entries"] == 1
    assert sum(report.dropped_words.values()) == 8


def test_settings_are_taken_from_the_configuration_files(converted):
    tokenizer, model = converted
    config = model.config
    assert (config.hash_scheme, config.hash_vocab_size, config.num_hashes, config.num_lowercase) == ("md5", 96, 5, 2)
    assert (config.rms_norm_eps, config.decode_edge_weight, config.max_position_embeddings) == (1e-5, 0.8, 64)
    assert config.objective == "bce"
    assert config.rope_parameters["rope_theta"] == 10_000
    assert (tokenizer.ruleset, tokenizer.special_syntax, tokenizer.max_word_bytes) == ("v1", "any", None)
    assert tokenizer.eos_token == "<|endoftext|>"


def test_another_rope_base_is_respected(tmp_path, convert):
    from tfree_tokenizer.loading import load_pretrained

    original = OriginalModel(theta=500.0)
    convert(original.save(tmp_path / "original", with_tokenizer=False), dictionary=["the", "house"])
    tokenizer, model = load_pretrained(tmp_path / "out")
    ids = tokenizer("the house the house the", return_tensors="pt")["input_ids"]
    logits = model(ids, output_hash_logits=True)["hash_logits"][0]
    torch.testing.assert_close(logits, original.forward(["the", "house"] * 2 + ["the"]), rtol=0, atol=2e-5)


def test_weights_can_be_written_in_another_type_and_in_shards(source, convert, tmp_path):
    from tfree_tokenizer.loading import load_pretrained

    convert(source, dictionary=["the"], dtype="bfloat16", max_shard_size="8KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = load_pretrained(tmp_path / "out")[1]
    assert model.dtype == torch.bfloat16
    weights = torch.load(source / "transformer" / "transformer.pt", weights_only=True)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].bfloat16())


def test_only_the_first_words_are_kept(source, convert, tmp_path):
    (tmp_path / "counts.json").write_text('{"small": 1, "house": 7, "<|ws|>": 99, "the": 8}')
    report = convert(source, dictionary=tmp_path / "counts.json", max_words=2)
    assert json.loads((tmp_path / "out" / "tfree_words.json").read_text()) == ["the", "house"]
    assert report.dropped_words["words beyond max_words"] == 1
    assert report.rows_verified == 0
    assert "not verified" in str(report)


class Bomb:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["transformer/transformer.pt", "tokenizer/tokenizer.pt"])
def test_a_pickle_that_would_run_a_program_is_refused_and_does_not_run(source, convert, tmp_path, name, protocol):
    trace = tmp_path / "trace"
    torch.save({"lm_head.weight": Bomb(trace), "words": ["a"]}, source / name, pickle_protocol=protocol)
    options = {"dictionary": ["the"]} if name.startswith("transformer") else {}
    with no_unpickling(), pytest.raises(ValueError, match=rf"{name}: holds pickled objects.*never unpickled"):
        convert(source, **options)
    (source / name).write_bytes(pickle.dumps(Bomb(trace), protocol))
    with no_unpickling(), pytest.raises(ValueError, match=name):
        convert(source, **options)
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_file_with_other_objects_needs_a_dictionary_and_says_so(source, convert):
    torch.save({"words": ["the"], "word_counter_full": Fraction(1, 2)}, source / "tokenizer" / "tokenizer.pt")
    with (
        no_unpickling(),
        pytest.raises(ValueError, match=r"tokenizer\.pt: .*Fraction.* Give dictionary: a JSON"),
    ):
        convert(source)
    report = convert(source, dictionary=["the"])
    assert "not used" in report.notes[0]


def test_a_counter_beside_the_word_list_is_data_or_refused(source, convert):
    state = {"words": WORDS, "word_counter_full": Counter(WORDS)}
    torch.save(state, source / "tokenizer" / "tokenizer.pt")
    try:
        outcome = str(convert(source).num_words)
    except ValueError as error:  # torch releases differ
        outcome = str(error)
    assert outcome == "10" or "collections.Counter" in outcome


@pytest.fixture
def with_table(source: Path) -> Callable[..., Path]:
    """`with_table(m, spoiled)`: a tokenizer.pt whose table ends after the trigrams that end in a space."""

    def write(m: int = 5, spoiled: bool = False) -> Path:
        original = OriginalModel(m=m)
        state = original.tokenizer_state(rows=1 << 22)
        if spoiled:
            number = ord("s") + 256 * ord("e") + 65536 * ord(" ")
            state["trigram_to_vocab"][number, 0] ^= 1
        torch.save(state, source / "tokenizer" / "tokenizer.pt")
        return source

    return write


def test_a_table_that_follows_the_hash_rule_is_verified(with_table, convert):
    assert convert(with_table()).rows_verified > 5


def test_a_table_that_breaks_the_hash_rule_names_the_trigram(with_table, convert):
    with pytest.raises(ValueError, match=r"tokenizer\.pt: trigram_to_vocab\[\d+\] \(trigram b'se '\) must be \["):
        convert(with_table(spoiled=True))


def test_a_table_of_another_width_is_refused(with_table, convert):
    with pytest.raises(ValueError, match=r"trigram_to_vocab has 6 rows per trigram, vocab_population is 5"):
        convert(with_table(m=6))


TRANSFORMER, TOKENIZER = "transformer/transformer_config.yaml", "tokenizer/tokenizer_config.yaml"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (TRANSFORMER, "num_attention_heads", 7),
        (TRANSFORMER, "num_layers", 3),
        (TRANSFORMER, "hidden_size", 25),
        (TOKENIZER, "vocab_size", 97),
    ],
)
def test_a_setting_that_does_not_fit_the_tensors_is_named(source, convert, file, key, value):
    edit(source / file, **{key: value})
    with pytest.raises(ValueError, match=rf"{key}.*{value}|{value}.*{key}"):
        convert(source, dictionary=["the"])


def test_the_number_of_heads_can_be_given(source, convert):
    edit(source / TRANSFORMER, num_attention_heads=None)
    assert convert(source, dictionary=["the"], num_attention_heads=3).num_words == 1


LAYER = "transformer.layers.1"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{LAYER}.attention.value.weight", None, "is missing"),
        ("lm_head.weight", None, "is missing"),
        ("transformer.embeddings.embedding.weight", None, "is missing"),
        ("lm_head.weight", torch.zeros(96, 23), r"must have shape \(96, 24\), got \(96, 23\)"),
        ("transformer.norm.weight", torch.full((24,), torch.nan), "must be finite"),
        ("transformer.norm.weight", torch.ones(24, dtype=torch.int64), "must be dense floating point"),
        ("transformer.norm.weight", torch.ones(1).expand(24), "larger than what the file stores"),
        ("transformer.norm.weight", "weights", "is str"),
        (f"{LAYER}.mlp.dense_in.bias", torch.zeros(40), "bias_terms are not supported"),
        ("transformer.extra.weight", torch.zeros(4), "have no place"),
        ("transformer.layers.7.input_layernorm.weight", torch.zeros(24), r"got layers \[0, 1, 7\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(source, convert, name, tensor, message):
    path = source / "transformer" / "transformer.pt"
    weights = torch.load(path, weights_only=True)
    weights |= {name: tensor} if tensor is not None else {}
    if tensor is None:
        del weights[name]
    torch.save(weights, path)
    with pytest.raises(ValueError, match=rf"transformer\.pt: .*{message}") as raised:
        convert(source, dictionary=["the"])
    assert name in str(raised.value) or "layers" in message


def test_tables_that_are_computed_anyway_are_ignored(source, convert):
    path = source / "transformer" / "transformer.pt"
    torch.save(torch.load(path, weights_only=True) | {f"{LAYER}.attention.rotary.inv_freq": torch.zeros(4)}, path)
    assert convert(source, dictionary=["the"]).num_words == 1


@pytest.mark.parametrize("kept", [0, 100, 5000, -1])
def test_a_truncated_file_of_weights_is_named(source, convert, kept):
    path = source / "transformer" / "transformer.pt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"transformer\.pt: is truncated or damaged"):
        convert(source, dictionary=["the"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "key words is missing"),
        ({"words": ["a", 3]}, "key words must be a list of strings"),
        ({"words": ["a"], "trigram_to_vocab": torch.zeros(3)}, "key trigram_to_vocab must be"),
        ([], "must hold a dict"),
    ],
)
def test_a_tokenizer_file_that_lacks_what_is_needed_names_the_key(source, convert, state, message):
    torch.save(state, source / "tokenizer" / "tokenizer.pt")
    with pytest.raises(ValueError, match=rf"tokenizer\.pt: {message}"):
        convert(source)


def test_without_any_word_list_the_missing_file_is_named(source, convert):
    with pytest.raises(ValueError, match=r"tokenizer\.pt: is missing"):
        convert(source)


@pytest.mark.parametrize(
    "options", [{"max_words": 0}, {"num_attention_heads": True}, {"dtype": "int8"}, {"dtype": "x"}]
)
def test_an_impossible_argument_is_named(source, convert, options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        convert(source, dictionary=["the"], **options)


def test_a_folder_that_is_not_empty_is_only_overwritten_on_demand(source, convert, tmp_path):
    convert(source, dictionary=["the"])
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(source, dictionary=["house"])
    assert (tmp_path / "out" / "notes").is_file()
    convert(source, dictionary=["house"], overwrite=True)
    assert json.loads((tmp_path / "out" / "tfree_words.json").read_text()) == ["house"]
    assert not (tmp_path / "out" / "notes").exists()


@pytest.mark.parametrize("failing", ["save_pretrained", "rename"])
def test_a_failed_conversion_leaves_the_previous_one_intact_and_no_rubbish(
    source, convert, tmp_path, monkeypatch, failing
):
    from tfree_tokenizer import TFreeTokenizer

    convert(source, dictionary=["the"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    siblings = sorted(path.name for path in tmp_path.iterdir())

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    def rename(path: Path, target: Path) -> Path:
        return fail() if path.name == "new" else Path(shutil.move(path, target))

    if failing == "rename":
        monkeypatch.setattr(Path, "rename", rename)
    else:
        monkeypatch.setattr(TFreeTokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, dictionary=["house"], overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == siblings


def test_the_source_cannot_be_overwritten(source):
    from tfree_tokenizer import convert_original_checkpoint

    for target in (source, source.parent):
        with pytest.raises(ValueError, match="target must not be the source"):
            convert_original_checkpoint(source, target, dictionary=["the"], overwrite=True)


def test_a_source_that_is_no_folder_is_named(convert, tmp_path):
    with pytest.raises(ValueError, match=r"source must be the folder of an original checkpoint, but .*nowhere is none"):
        convert(tmp_path / "nowhere")
