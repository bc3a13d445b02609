"""The tokenizer: text to ids of whole words, and back without loss.

ids = [specials][structural words][256 bytes inside a word][256 last bytes][dictionary][tokens added later]
"""

import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

from .alignment_tfree import join_located, restore, tagged
from .encoding_tfree import TextEncoder
from .inputs_tfree import Inputs, is_plain_call
from .joining_tfree import TextJoiner
from .lookup_tfree import WordLookup
from .padding_tfree import pad_rows
from .patterns_tfree import fingerprint_words
from .saving_tfree import staged_folder
from .vocabulary_tfree import Vocabulary
from .wordlist_tfree import WORDS_FILE, check_word_types, check_words, read_words, write_words
from .words_tfree import (
    Ruleset,
    SpecialSyntax,
    check_ruleset,
    check_special_syntax,
    checked_max_word_bytes,
    spacing_of_markers,
)

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
        **kwargs: as for every tokenizer of transformers. `chat_template` is the published chat format unless given.

    Raises:
        ValueError: the dictionary or a setting is unusable; names it and the first offending words.

    Example:
        >>> tokenizer = TFreeTokenizer(["Hello", "world", "!"])
        >>> tokenizer.tokenize("Hello world!")
        ['Hello', 'world', '!']
    """

    vocab_files_names = {"vocab_file": WORDS_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    add_prefix_space = False  # transformers' name for it: a space before the first word is text like any other
    # Derived from words and added tokens, built when needed, see `_forget`.
    _encoder: TextEncoder | None = None
    _vocab: dict[str, int] | None = None
    _fingerprint: str | None = None

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
        **kwargs: Any,
    ) -> None:
        check_ruleset(ruleset)
        check_special_syntax(special_syntax)
        by_ruleset = None if ruleset == "v1" else 256
        byte_limit = checked_max_word_bytes(by_ruleset if max_word_bytes == _DEFAULT else max_word_bytes)
        kwargs |= {"eos_token": eos_token, "pad_token": pad_token}
        kwargs.setdefault("chat_template", None if words is None else CHAT_TEMPLATE)
        named = [str(kwargs[name]) for name in self.SPECIAL_TOKENS_ATTRIBUTES if kwargs.get(name) is not None]
        extra = kwargs.pop("extra_special_tokens", None) or []
        if isinstance(extra, dict):
            kwargs["model_specific_special_tokens"] = extra | kwargs.get("model_specific_special_tokens", {})
            extra = []
        if base_special_tokens is None:
            base_special_tokens = list(dict.fromkeys([*named, *CHAT_TOKENS, *map(str, extra)]))

        source, words = _dictionary(words, vocab_file, kwargs.get("name_or_path"))
        self._base = Vocabulary(base_special_tokens, ruleset, words)
        check_words(words, source, ruleset, byte_limit, base_special_tokens)
        self._base.check_added({index: str(token) for index, token in kwargs.get("added_tokens_decoder", {}).items()})
        self._added_tokens_decoder = {
            index: AddedToken(token, special=True, normalized=False) for index, token in enumerate(base_special_tokens)
        }
        known = {*named, *map(str, extra)}
        super().__init__(
            ruleset=ruleset,
            max_word_bytes=byte_limit,
            special_syntax=special_syntax,
            base_special_tokens=list(base_special_tokens),
            extra_special_tokens=[*(token for token in base_special_tokens if token not in known), *extra],
            words=None,  # transformers expects to find every argument among the saved ones; the words have a file
            **kwargs,
        )
        self.ruleset, self.max_word_bytes, self.special_syntax = ruleset, byte_limit, special_syntax
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
        """Return the ids whose rows come from the whole string: specials, structural words, tokens added later."""
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
        self._encoder = self._vocab = self._fingerprint = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is derived, so that copies are small and equal tokenizers pickle to equal bytes."""
        derived = dict.fromkeys(("_encoder", "_vocab", "_fingerprint")) | {"tokens_trie": type(self.tokens_trie)()}
        return self.__dict__ | derived

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put back what `__getstate__` left out."""
        self.__dict__.update(state)
        self._update_trie()

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
        split = bool(kwargs.get("split_special_tokens", self.split_special_tokens))
        return self.convert_ids_to_tokens(self._text_encoder().encode([text], split_special_tokens=split)[0])

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.convert_ids_to_tokens(self._text_encoder().lookup.encode_short(text))

    def _takes_tokens_as_they_stand(self) -> bool:
        """False if an added token asks for more than to be found; transformers' own code knows what that means."""
        return not any(
            token.lstrip or token.rstrip or token.single_word for token in self._added_tokens_decoder.values()
        )

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
        is_split = kwargs.pop("is_split_into_words", False)
        split_special_tokens = kwargs.pop("split_special_tokens", self.split_special_tokens)
        inputs = Inputs.of(text, text_pair, is_split)
        if wants_spans or (is_split and inputs.is_text and self._takes_tokens_as_they_stand()):
            return self._encode_located(inputs, split_special_tokens, wants_spans, kwargs)
        ids = inputs.replace_texts(lambda texts: self._ids_of(texts, split_special_tokens), _concatenate)
        if ids.second is not None or not is_plain_call(kwargs, self.model_input_names):
            return super()._encode_plus(*ids.arguments(), **kwargs)
        return pad_rows(self, ids, **kwargs)

    def _ids_of(self, texts: Sequence[str], split_special_tokens: bool) -> list[list[int]]:
        if self._takes_tokens_as_they_stand():
            return self._text_encoder().encode(texts, split_special_tokens=split_special_tokens)
        tokens = (super(TFreeTokenizer, self).tokenize(t, split_special_tokens=split_special_tokens) for t in texts)
        return [self.convert_tokens_to_ids(names) for names in tokens]

    def _encode_located(
        self, inputs: Inputs, split_special_tokens: bool, wants_spans: bool, kwargs: dict[str, Any]
    ) -> BatchEncoding:
        if not inputs.is_text or not self._takes_tokens_as_they_stand():
            raise ValueError(
                "return_offsets_mapping needs text, and added tokens without lstrip, rstrip or single_word; "
                f"got {type(inputs.first[0]).__name__}."
            )
        return_tensors = kwargs.pop("return_tensors", None)
        encoder = self._text_encoder()
        located = inputs.replace_texts(
            lambda texts: encoder.locate(texts, split_special_tokens=split_special_tokens), join_located
        )
        encoded = super()._encode_plus(*located.map(tagged).arguments(), **kwargs)
        return restore(encoded, located, self.convert_ids_to_tokens, wants_spans, return_tensors)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As for every tokenizer; masks of the assistant's tokens need to know where characters went."""
        options = dict(kwargs.get("tokenizer_kwargs") or {})
        if not kwargs.get("return_assistant_tokens_mask") or options.get("return_offsets_mapping"):
            return super().apply_chat_template(conversation, *args, **kwargs)
        kwargs["tokenizer_kwargs"] = options | {"return_offsets_mapping": True}
        encoded = super().apply_chat_template(conversation, *args, **kwargs)
        if isinstance(encoded, BatchEncoding):
            encoded.pop("offset_mapping", None)
        return encoded

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        prev_id: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> str:
        """Join words to the text they came from.

        Args:
            token_ids: ids in `[0, len(self))`.
            skip_special_tokens: leave out specials (spacing is none).
            clean_up_tokenization_spaces: see transformers; not lossless.
            prev_id: the id, or ids, before these: the text then begins with the space that belongs between.

        Raises:
            IndexError: an id is out of range.
            TypeError: an id is not an integer.
        """
        joiner = TextJoiner(self.ruleset, self.special_syntax)
        skipped = frozenset(self.all_special_ids) if skip_special_tokens else frozenset()
        if prev_id is not None:
            self._join(joiner, self._checked_ids(prev_id, "prev_id"), skipped)
        before = len(joiner.pieces)
        self._join(joiner, self._checked_ids(token_ids, "token_ids"), skipped)
        text = joiner.text(before)
        clean_up = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean_up else text

    def _checked_ids(self, ids: int | Iterable[int], name: str) -> list[int]:
        try:
            checked = [operator.index(ids)] if not hasattr(ids, "__iter__") else list(map(operator.index, ids))
        except TypeError as error:
            raise TypeError(f"{name} must be integers: {error}.") from error
        if checked and not 0 <= min(checked) <= max(checked) < len(self):
            raise IndexError(f"{name} must lie in [0, {len(self)}), got values from {min(checked)} to {max(checked)}.")
        return checked

    def _join(self, joiner: TextJoiner, ids: Sequence[int], skipped: frozenset[int]) -> None:
        added, base, spacing = self._added_tokens_decoder, self._base, spacing_of_markers(self.ruleset)
        for index in ids:
            if index in added:
                joiner.add_verbatim("" if index in skipped else added[index].content)
            elif index >= base.first_word_id:
                joiner.add_word(base.words[index - base.first_word_id])
            elif index >= base.first_byte_id:
                is_last, byte = divmod(index - base.first_byte_id, 256)
                joiner.add_byte(byte, bool(is_last))
            else:
                joiner.add_verbatim(spacing[base.token(index)])

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join the names of ids to the text they stand for; other strings are taken for words."""
        joiner = TextJoiner(self.ruleset, self.special_syntax)
        for token in tokens:
            index = self.get_vocab().get(token)
            if index is None:
                joiner.add_word(token)
            else:
                self._join(joiner, [index], frozenset())
        return joiner.text()

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the dictionary, and return the path of its file."""
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + WORDS_FILE)
        write_words(self._base.words, path)
        return (path,)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Save as every tokenizer does, with the code that loads it; a failed save changes nothing."""
        if push_to_hub:  # the upload looks for changed files in the folder itself
            return super().save_pretrained(save_directory, *args, push_to_hub=True, **kwargs)
        with staged_folder(save_directory) as staged:
            files = super().save_pretrained(str(staged), *args, **kwargs)
        return tuple(os.path.join(save_directory, os.path.relpath(file, staged)) for file in files)


def _dictionary(
    words: Sequence[str] | None, vocab_file: str | os.PathLike[str] | None, folder: str | None
) -> tuple[str, list[str]]:
    """Return the words and what to call them in messages."""
    if words is not None:
        words = list(words) if isinstance(words, (list, tuple)) else words
        check_word_types(words, "words")
        return "words", cast("list[str]", words)
    if vocab_file is None:
        where = f"{folder} has no {WORDS_FILE}" if folder else "got neither"
        raise ValueError(f"words or vocab_file must be given; {where}.")
    return os.fspath(vocab_file), read_words(os.fspath(vocab_file))


def _concatenate(parts: Sequence[list[int]]) -> list[int]:
    return [index for part in parts for index in part]


TFreeTokenizer.register_for_auto_class("AutoTokenizer")
