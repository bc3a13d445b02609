"""The tokenizer: text to ids of whole words, and back without loss."""

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from .lookup_tfree import WordLookup
from .patterns_tfree import fingerprint_words
from .wordlist_tfree import WORDS_FILE, check_word_types, check_words, read_words, write_words
from .words_tfree import (
    Ruleset,
    SpecialFinder,
    SpecialSyntax,
    check_max_word_bytes,
    check_ruleset,
    expects_space,
    spacing_of_markers,
    structural_words,
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


class TFreeTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": WORDS_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        words: Sequence[str] | None = None,
        vocab_file: str | os.PathLike[str] | None = None,
        ruleset: Ruleset = "v1",
        max_word_bytes: int | str | None = "default",
        special_syntax: SpecialSyntax = "registered",
        base_special_tokens: Sequence[str] | None = None,
        eos_token: str | AddedToken | None = END_OF_TEXT,
        pad_token: str | AddedToken | None = END_OF_TEXT,
        chat_template: str | None = CHAT_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        check_ruleset(ruleset)
        if max_word_bytes == "default":
            max_word_bytes = None if ruleset == "v1" else 256
        check_max_word_bytes(max_word_bytes)
        if base_special_tokens is None:
            base_special_tokens = list(dict.fromkeys([str(eos_token or END_OF_TEXT), *CHAT_TOKENS]))
        source = "words"
        if words is None:
            if vocab_file is None:
                raise ValueError(f"words must be given, or vocab_file, the path of a {WORDS_FILE}.")
            source = os.fspath(vocab_file)
            words = read_words(source)
        else:
            words = list(words)
            check_word_types(words, source)
        check_words(words, source, ruleset, base_special_tokens)
        self._words: list[str] = words
        self.ruleset, self.max_word_bytes, self.special_syntax = ruleset, max_word_bytes, special_syntax
        self.base_special_tokens = list(base_special_tokens)
        self._structural = structural_words(ruleset)
        self._added_tokens_decoder = {
            index: AddedToken(token, special=True, normalized=False) for index, token in enumerate(base_special_tokens)
        }
        self._lookup_cache = None
        named = {str(kwargs[k]) for k in self.SPECIAL_TOKENS_ATTRIBUTES if kwargs.get(k)} | {str(eos_token), str(pad_token)}
        extra = [t for t in base_special_tokens if t not in named]
        extra += [t for t in kwargs.pop("extra_special_tokens", None) or () if str(t) not in extra]
        super().__init__(
            ruleset=ruleset, max_word_bytes=max_word_bytes, special_syntax=special_syntax,
            base_special_tokens=list(base_special_tokens), eos_token=eos_token, pad_token=pad_token,
            extra_special_tokens=extra, chat_template=chat_template, **kwargs,
        )

    @property
    def first_structural_id(self) -> int:
        return len(self.base_special_tokens)

    @property
    def first_byte_id(self) -> int:
        return self.first_structural_id + len(self._structural)

    @property
    def first_word_id(self) -> int:
        return self.first_byte_id + 512

    @property
    def vocab_size(self) -> int:
        return self.first_word_id + len(self._words)

    @property
    def dictionary_words(self) -> list[str]:
        return self._words

    def words_by_id(self) -> list[str | None]:
        words: list[str | None] = [*self.base_special_tokens, *self._structural, *[None] * 512, *self._words]
        later = sorted((index, token.content) for index, token in self._added_tokens_decoder.items() if index >= len(words))
        return words + [content for _, content in later]

    def special_word_ids(self) -> frozenset[int]:
        return frozenset(range(self.first_byte_id)) | frozenset(i for i in self._added_tokens_decoder if i >= self.vocab_size)

    @property
    def dictionary_fingerprint(self) -> str:
        return fingerprint_words(self.words_by_id())

    def get_vocab(self) -> dict[str, int]:
        if self.__dict__.get("_vocab") is None:
            tokens = [*self.base_special_tokens, *self._structural]
            tokens += [f"<0x{b:02X}|inside>" for b in range(256)] + [f"<0x{b:02X}|last>" for b in range(256)]
            self._vocab = {t: i for i, t in enumerate([*tokens, *self._words])}
        return self._vocab | self._added_tokens_encoder

    def _lookup(self) -> WordLookup:
        if self._lookup_cache is None:
            self._lookup_cache = WordLookup(
                self._words, first_structural_id=self.first_structural_id, ruleset=self.ruleset,
                max_word_bytes=self.max_word_bytes,
            )
        return self._lookup_cache

    def _text_ids(self, text: str, split_special_tokens: bool = False) -> list[int]:
        lookup = self._lookup()
        if split_special_tokens:
            return lookup.encode_short(text)
        ids: list[int] = []
        for piece, is_special in SpecialFinder(self._added_tokens_encoder, self.special_syntax).pieces(text):
            if not is_special:
                ids += lookup.encode_short(piece)
            elif piece in self._added_tokens_encoder:
                ids.append(self._added_tokens_encoder[piece])
            else:
                ids += lookup.spell(piece)
        return ids

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._convert_id_to_token(i) for i in self._lookup().encode_short(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if self.first_byte_id <= index < self.first_word_id:
            byte = index - self.first_byte_id
            return f"<0x{byte:02X}|inside>" if byte < 256 else f"<0x{byte - 256:02X}|last>"
        return self.words_by_id()[index]

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        split = kwargs.get("split_special_tokens", self.split_special_tokens)
        if isinstance(text, str) and text and text_pair is None and not kwargs.get("sanitize_control_tokens"):
            text = self._text_ids(text, bool(split))
        return super()._encode_plus(text, text_pair, **kwargs)

    def _decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        words = self.words_by_id()
        spacing = spacing_of_markers(self.ruleset)
        out, left, data = [], "", b""
        for index in ids:
            if self.first_byte_id <= index < self.first_word_id:
                byte = index - self.first_byte_id
                data += bytes([byte % 256])
                if byte < 256:
                    continue
                try:
                    word = data.decode("utf-8", "surrogatepass")
                except UnicodeDecodeError:
                    word = data.decode("utf-8", "replace")
                data = b""
            else:
                if data:
                    out.append(data.decode("utf-8", "replace"))
                    data, left = b"", ""
                word = words[index]
                if index < self.first_byte_id or index in self._added_tokens_decoder:
                    left = ""
                    if index not in skipped:
                        out.append(spacing.get(word, word) if index < self.first_byte_id else word)
                    continue
            if expects_space(left, word, self.ruleset):
                out.append(" ")
            out.append(word)
            left = word
        if data:
            shown = data.decode("utf-8", "replace")
            if expects_space(left, shown, self.ruleset):
                out.append(" ")
            out.append(shown)
        return "".join(out)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + WORDS_FILE)
        write_words(self._words, path)
        return (path,)


TFreeTokenizer.register_for_auto_class("AutoTokenizer")
