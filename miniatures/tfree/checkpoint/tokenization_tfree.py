"""The tokenizer: text to ids of whole words, and back without loss.

ids = [specials][structural words][256 bytes inside a word][256 last bytes][dictionary][tokens added later]
"""

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from .alignment_tfree import Alignment, Tagged
from .joining_tfree import TextJoiner
from .lookup_tfree import Fixed, WordLookup
from .patterns_tfree import fingerprint_words
from .saving_tfree import staged_folder
from .vocabulary_tfree import Vocabulary
from .wordlist_tfree import WORDS_FILE, check_word_types, check_words, read_words, write_words
from .words_tfree import Ruleset, SpecialFinder, SpecialSyntax, check_max_word_bytes, check_ruleset

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|begin_of_text|><|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|endoftext|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|endoftext|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>' -}}{%- endif -%}"
)
"""Published chat format: every turn opens with <|begin_of_text|> and ends with <|endoftext|>."""

_DEFAULT = "default"
_NUMPY_FROM = {"v1": 4000, "v2": 1000}  # characters from which numpy is faster than a regular expression and a dict
_TAG = 1 << 40  # beyond every id: stands for "position i of sequence s" while transformers truncates and pads


class TFreeTokenizer(PreTrainedTokenizer):
    """Turns text into ids of whole words, and ids into exactly the text they came from.

    A word outside the dictionary is spelled in bytes: one id per UTF-8 byte, the last from a range of its own.

    Args:
        words: the dictionary, most frequent words first; see `build_dictionary`.
        vocab_file: a file to read the dictionary from instead.
        ruleset: "v1" as published, or "v2" for text with marks, emoji, tabs, long indents or scripts without spaces.
        max_word_bytes: longer words are cut. "default": never under v1, at 256 under v2.
        special_syntax: "any" keeps whatever looks like `<|...|>` whole, as the original does.
        base_special_tokens: the tokens with the first ids. None: the end of text, other named tokens, the chat tokens.
        eos_token: ends a text, and every turn of a chat.
        pad_token: fills up batches.
        chat_template: Jinja template. "default": the published chat format for a new tokenizer.
        **kwargs: as for every tokenizer of transformers.

    Raises:
        ValueError: the dictionary or a setting is unusable; names it and the first offending words.

    Example:
        >>> tokenizer = TFreeTokenizer(["Hello", "world", "!"])
        >>> tokenizer.tokenize("Hello world!")
        ['Hello', 'world', '!']
    """

    vocab_files_names = {"vocab_file": WORDS_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        words: Sequence[str] | None = None,
        vocab_file: str | os.PathLike[str] | None = None,
        ruleset: Ruleset = "v1",
        max_word_bytes: int | str | None = _DEFAULT,
        special_syntax: SpecialSyntax = "registered",
        base_special_tokens: Sequence[str] | None = None,
        eos_token: str | AddedToken | None = END_OF_TEXT,
        pad_token: str | AddedToken | None = END_OF_TEXT,
        chat_template: str | dict[str, str] | None = _DEFAULT,
        **kwargs: Any,
    ) -> None:
        check_ruleset(ruleset)
        if max_word_bytes == _DEFAULT:
            max_word_bytes = None if ruleset == "v1" else 256
        check_max_word_bytes(max_word_bytes)
        if chat_template == _DEFAULT:
            chat_template = None if words is None else CHAT_TEMPLATE
        kwargs |= {"eos_token": eos_token, "pad_token": pad_token}
        named = [str(kwargs[name]) for name in self.SPECIAL_TOKENS_ATTRIBUTES if kwargs.get(name) is not None]
        extra = kwargs.pop("extra_special_tokens", None) or []
        if isinstance(extra, dict):
            kwargs["model_specific_special_tokens"] = extra | kwargs.get("model_specific_special_tokens", {})
            extra = []
        if base_special_tokens is None:
            base_special_tokens = list(dict.fromkeys([*named, *CHAT_TOKENS, *map(str, extra)]))

        source, words = _dictionary(words, vocab_file, kwargs.get("name_or_path"))
        self._base = Vocabulary(base_special_tokens, ruleset, words)
        check_words(words, source, ruleset, max_word_bytes, base_special_tokens)
        self._base.check_added({index: str(token) for index, token in kwargs.get("added_tokens_decoder", {}).items()})
        self._added_tokens_decoder = {
            index: AddedToken(token, special=True, normalized=False) for index, token in enumerate(base_special_tokens)
        }
        known = {*named, *map(str, extra)}
        self._forget()
        super().__init__(
            ruleset=ruleset,
            max_word_bytes=max_word_bytes,
            special_syntax=special_syntax,
            base_special_tokens=list(base_special_tokens),
            extra_special_tokens=[*(token for token in base_special_tokens if token not in known), *extra],
            chat_template=chat_template,
            **kwargs,
        )
        self.ruleset, self.max_word_bytes, self.special_syntax = ruleset, max_word_bytes, special_syntax
        self.base_special_tokens = list(base_special_tokens)

    @property
    def first_byte_id(self) -> int:
        """Id of byte 0 inside a spelled word; its last bytes follow 256 ids later."""
        return self._base.first_byte_id

    @property
    def first_word_id(self) -> int:
        """Id of the first word of the dictionary."""
        return self._base.first_word_id

    @property
    def dictionary_words(self) -> list[str]:
        """The dictionary; word i has id `first_word_id + i`."""
        return list(self._base.words)

    @property
    def vocab_size(self) -> int:
        """Number of ids without the tokens added later."""
        return len(self._base)

    def words_by_id(self) -> list[str | None]:
        """Return the word of every id: specials and structural words by their names, None for bytes."""
        added = sorted(self._added_tokens_decoder.items())
        return [*self._base.words_by_id(), *(token.content for index, token in added if index >= len(self._base))]

    def special_word_ids(self) -> frozenset[int]:
        """Return the ids whose table rows come from the whole string: specials, structural words, tokens added later."""
        return frozenset(range(self.first_byte_id)) | frozenset(range(len(self._base), len(self)))

    @property
    def dictionary_fingerprint(self) -> str:
        """Names what every id stands for; model and tokenizer fit together if theirs are equal."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_words(self.words_by_id())
        return self._fingerprint

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every token, byte ids under names such as `<0x41|last>`. Leave the dict as it is."""
        if self._vocab is None:
            self._vocab = self._base.ids() | self._added_tokens_encoder
        return self._vocab

    def _update_total_vocab_size(self) -> None:
        """Called by transformers whenever tokens were added."""
        self._forget()
        self.total_vocab_size = len(self._base) + sum(index >= len(self._base) for index in self._added_tokens_decoder)

    def _forget(self) -> None:
        """Drop what is derived from the words and added tokens and built again when needed."""
        self._lookup: WordLookup | None = None
        self._finder: SpecialFinder | None = None
        self._vocab: dict[str, int] | None = None
        self._fingerprint: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out derived tables, so that copies are small and equal tokenizers pickle to equal bytes."""
        return self.__dict__ | dict.fromkeys(("_lookup", "_finder", "_vocab", "_fingerprint"))

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        if reserved := self._base.reserved.intersection(map(str, new_tokens)):
            raise ValueError(f"new_tokens must not be the names of spacing or bytes, got {sorted(reserved)}.")
        if new_tokens:
            return super()._add_tokens(new_tokens, special_tokens=special_tokens)
        self._update_trie()  # spares the copy of a large vocabulary that adding nothing would make
        self._update_total_vocab_size()
        return 0

    def _convert_token_to_id(self, token: str) -> int | None:
        index = self._base.ids().get(token)
        return self.unk_token_id if index is None and self.unk_token not in (None, token) else index

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._base):
            raise IndexError(f"ids must lie in [0, {len(self)}), got {index}.")
        return self._base.token(index)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Return the names of the ids of a text; a spelled word gives a name per byte."""
        if not self._takes_tokens_as_they_stand():
            return super().tokenize(text, **kwargs)
        split = kwargs.get("split_special_tokens", self.split_special_tokens)
        return self.convert_ids_to_tokens(self._text_encoder().encode([text], split_special_tokens=split)[0])

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.convert_ids_to_tokens(self._text_encoder().lookup.encode_short(text))

    def _takes_tokens_as_they_stand(self) -> bool:
        """False if an added token asks for more than to be found; transformers' own code knows what that means."""
        return not any(token.lstrip or token.rstrip or token.single_word for token in self._added_tokens_decoder.values())

    def _text_encoder(self) -> TextEncoder:
        if self._encoder is None:
            first, last = self.first_word_id, len(self._base)
            lookup = WordLookup(
                self._base.words,
                first_structural_id=self._base.first_structural_id,
                ruleset=self.ruleset,
                max_word_bytes=self.max_word_bytes,
                hidden=[index - first for index in self._added_tokens_decoder if first <= index < last],
            )
            self._encoder = TextEncoder(lookup, self._added_tokens_encoder, self.special_syntax)
        return self._encoder

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """Replace texts by their ids, all texts of the call in one pass; transformers does the rest."""
        wants_spans = kwargs.pop("return_offsets_mapping", False)
        if kwargs.get("sanitize_control_tokens"):  # such text carries marks that only transformers understands
            return super()._encode_plus(text, text_pair, **kwargs)
        split_input = kwargs.pop("is_split_into_words", False)
        batch = Batch.of(text, text_pair, split_input)
        split = kwargs.get("split_special_tokens", self.split_special_tokens)
        if wants_spans or split_input:
            return self._encode_located(batch, split, wants_spans, kwargs)

        ids = batch.replace_texts(lambda texts: self._ids_of(texts, split))
        if ids.is_batched and not ids.has_pairs and _is_simple(kwargs):
            return self._pad_only(ids.first, kwargs)
        return super()._encode_plus(*ids.arguments(), **kwargs)
