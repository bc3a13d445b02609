"""The command `tfree`: convert original checkpoints, build dictionaries, look at how text is split."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ._version import __version__

if TYPE_CHECKING:
    from .inspection import TextStatistics, Token
    from .remote.patterns_tfree import HashSpec
    from .remote.tokenization_tfree import TFreeTokenizer

PIECE_CHARACTERS = 1 << 20  # how much of a file is handed on at once
_DESCRIPTION = "T-FREE: language models that read and write whole words. See `tfree COMMAND --help` for examples."
_EXAMPLES = {
    "convert": """\
The original folder holds transformer/transformer.pt, transformer/transformer_config.yaml, tokenizer/tokenizer.pt and
tokenizer/tokenizer_config.yaml. Nothing in it is unpickled: where tokenizer.pt holds more than plain data, give
--dictionary, a JSON or tab-separated file of (word, count).

examples:
  tfree convert downloads/tfree-7b tfree-7b
  tfree convert downloads/tfree-7b tfree-7b --dictionary counts.json --max-words 600000 --dtype bfloat16
""",
    "build-dictionary": """\
Folders are searched for text; files in them that are hidden or not UTF-8 are skipped.

examples:
  tfree build-dictionary corpus/ --output words.json --max-words 500000 --num-proc 8
  zcat pages.txt.gz | tfree build-dictionary - --output words.json --counts counts.tsv
""",
    "tokenize": """\
Without a tokenizer or dictionary the text is split into words only, and no ids are shown. Markers such as <|no_ws|>
stand for spacing that does not go without saying.

examples:
  tfree tokenize "The house is small."
  tfree tokenize --tokenizer miniatures/tfree/checkpoint --rows "house houses"
  tfree tokenize --dictionary words.json --json < page.txt
""",
    "stats": """\
columns:
  words          stretches between white space
  tokens         words and spacing markers: positions of the model
  ids/token      more than 1 where words are spelled in bytes
  spelled        share of the tokens that the dictionary lacks
  markers        share of the tokens that only stand for spacing

examples:
  tfree stats --tokenizer miniatures/tfree/checkpoint README.md CHANGELOG.md
  tfree stats --dictionary words.json --ruleset v2 corpus/
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name. None: those of this process.

    Returns:
        0, or 2 after an error, of which one line was written to stderr.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write(f"tfree {arguments.command}: interrupted\n")
        return 130
    except (ValueError, OSError) as error:
        sys.stderr.write(f"tfree {arguments.command}: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tfree", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"tfree {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = _command(commands, "convert", _convert, "make an original T-FREE checkpoint loadable by transformers")
    convert.add_argument("source", help="folder of the original checkpoint")
    convert.add_argument("target", help="folder to write; appears when it is complete")
    convert.add_argument("--dictionary", metavar="FILE", help="words to decode with: JSON or tab-separated counts")
    convert.add_argument("--max-words", type=int, metavar="N", help="keep only the N most frequent words")
    convert.add_argument("--dtype", help="type of the written weights, such as bfloat16 (default: as stored)")
    convert.add_argument("--num-attention-heads", type=int, metavar="N", help="if the configuration does not say it")
    convert.add_argument("--overwrite", action="store_true", help="replace the target folder and all it holds")

    build = _command(commands, "build-dictionary", _build_dictionary, "count words and keep the frequent ones")
    _add_paths(build)
    build.add_argument("--output", "-o", required=True, metavar="FILE", help="JSON list of words, most frequent first")
    build.add_argument("--counts", metavar="FILE", help="also write the words with their counts, tab-separated")
    build.add_argument("--max-words", type=int, default=500_000, metavar="N", help="default: 500000")
    build.add_argument("--min-count", type=int, default=1, metavar="N", help="leave out words that occur less often")
    build.add_argument("--num-proc", type=int, default=1, metavar="N", help="processes that count (default: 1)")
    _add_ruleset(build)
    build.add_argument("--quiet", action="store_true", help="no progress bar")

    tokenize = _command(commands, "tokenize", _tokenize, "show the words, ids and table rows of a text")
    tokenize.add_argument("text", nargs="?", help="the text (default: read it from standard input)")
    _add_tokenizer(tokenize)
    tokenize.add_argument("--rows", action="store_true", help="show the table rows that the words switch on")
    tokenize.add_argument("--hash-vocab-size", type=int, metavar="V", help="rows of the table (default: the model's)")
    tokenize.add_argument("--num-hashes", type=int, metavar="M", help="rows per trigram (default: the model's)")
    tokenize.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")

    stats = _command(commands, "stats", _stats, "measure how well a tokenizer fits files")
    _add_paths(stats)
    _add_tokenizer(stats)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: object, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="text file or folder; - is standard input")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokenizer", metavar="PATH", help="folder or Hub repository of a T-FREE tokenizer")
    source.add_argument("--dictionary", metavar="FILE", help="word list, as `tfree build-dictionary` writes it")
    parser.add_argument("--revision", metavar="REV", help="commit, branch or tag of the Hub repository")
    _add_ruleset(parser)


def _add_ruleset(parser: argparse.ArgumentParser) -> None:
    choices = ("v1", "v2")
    parser.add_argument("--ruleset", choices=choices, default="v1", help="how text is split into words (default: v1)")


def _convert(arguments: argparse.Namespace) -> None:
    from .conversion import convert_original_checkpoint

    report = convert_original_checkpoint(
        arguments.source,
        arguments.target,
        dictionary=arguments.dictionary,
        max_words=arguments.max_words,
        dtype=arguments.dtype,
        num_attention_heads=arguments.num_attention_heads,
        overwrite=arguments.overwrite,
    )
    print(report)


def _build_dictionary(arguments: argparse.Namespace) -> None:
    from .dictionary_building import count_words
    from .json_files import write_text

    if arguments.max_words < 1:
        raise ValueError(f"--max-words must be at least 1, got {arguments.max_words}.")
    for option in ("output", "counts"):
        path = getattr(arguments, option)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{option}: the folder of {path} does not exist.")
    pieces = (piece for path in _files(arguments.paths) for piece in _pieces(path, arguments.paths))
    counts = count_words(
        pieces, ruleset=arguments.ruleset, num_proc=arguments.num_proc, show_progress=not arguments.quiet
    )
    frequent = [item for item in counts.items() if item[1] >= arguments.min_count]
    words = [word for word, _ in sorted(frequent, key=lambda item: (-item[1], item[0]))[: arguments.max_words]]
    if not words:
        raise ValueError(f"no word in {', '.join(arguments.paths)}.")
    write_text(arguments.output, json.dumps(words, ensure_ascii=True, indent=0) + "\n")
    if arguments.counts is not None:
        write_text(arguments.counts, "".join(f"{word}\t{counts[word]}\n" for word in words))
    share = sum(counts[word] for word in words) / max(1, sum(counts.values()))
    print(f"{arguments.output}: {len(words):,} of {len(counts):,} words, {share:.1%} of all occurrences")


def _tokenize(arguments: argparse.Namespace) -> None:
    from .inspection import list_tokens, list_words

    text = "".join(_pieces("-", ())) if arguments.text is None else arguments.text
    tokenizer = _load_tokenizer(arguments)
    tokens = list_words(text, arguments.ruleset) if tokenizer is None else list_tokens(text, tokenizer)
    spec = _hash_spec(arguments) if arguments.rows else None
    if arguments.json:
        for token in tokens:
            _write(json.dumps(_token_fields(token, spec)))
        return
    table = [["word", "ids", "rows"]]
    for token in tokens:
        fields = _token_fields(token, spec)
        table.append([_printable(token.text), _joined(fields["ids"]), _joined(fields.get("rows", ()))])
    shown = [0, *([1] if tokenizer is not None else []), *([2] if spec is not None else [])]
    _write_table([[row[column] for column in shown] for row in table])


def _token_fields(token: "Token", spec: "HashSpec | None") -> dict[str, object]:
    fields: dict[str, object] = {"word": token.text, "kind": token.kind, "ids": list(token.ids)}
    return fields if spec is None else fields | {"rows": token.rows(spec)}


def _hash_spec(arguments: argparse.Namespace) -> "HashSpec":
    from dataclasses import replace

    from .loading import find_config
    from .remote.configuration_tfree import TFreeConfig

    config = find_config(arguments.tokenizer, revision=arguments.revision) if arguments.tokenizer else None
    spec = TFreeConfig().hash_spec if config is None else config.hash_spec
    given = {"hash_vocab_size": arguments.hash_vocab_size, "num_hashes": arguments.num_hashes}
    return replace(spec, **{name: value for name, value in given.items() if value is not None})


def _stats(arguments: argparse.Namespace) -> None:
    from .inspection import TextStatistics, measure_text

    tokenizer = _load_tokenizer(arguments)
    total, rows = TextStatistics(), []
    for path in _files(arguments.paths):
        measured = measure_text("".join(_pieces(path, arguments.paths)), tokenizer, arguments.ruleset)
        if measured.num_bytes:
            rows.append(_statistics_row(path, measured, tokenizer is not None))
            total += measured
    if not rows:
        raise ValueError(f"no text in {', '.join(arguments.paths)}.")
    head = ["file", "bytes", "words", "tokens", "tokens/word", "bytes/token", "ids/token", "spelled", "markers"]
    if len(rows) > 1:
        rows.append(_statistics_row("total", total, tokenizer is not None))
    _write_table([head, *rows], right_from=1)


def _statistics_row(name: str, counts: "TextStatistics", has_dictionary: bool) -> list[str]:
    tokens = max(1, counts.num_tokens)
    return [
        _printable(name),
        f"{counts.num_bytes:,}",
        f"{counts.num_words:,}",
        f"{counts.num_tokens:,}",
        f"{counts.num_tokens / max(1, counts.num_words):.3f}",
        f"{counts.num_bytes / tokens:.3f}",
        f"{counts.num_ids / tokens:.3f}" if has_dictionary else "-",
        f"{counts.num_spelled / tokens:.2%}" if has_dictionary else "-",
        f"{counts.num_markers / tokens:.2%}",
    ]


def _load_tokenizer(arguments: argparse.Namespace) -> "TFreeTokenizer | None":
    if arguments.tokenizer is not None:
        from .loading import load_tokenizer

        return load_tokenizer(arguments.tokenizer, revision=arguments.revision)
    if arguments.dictionary is not None:
        from .original_files import read_dictionary
        from .remote.tokenization_tfree import TFreeTokenizer

        words = read_dictionary(Path(arguments.dictionary))
        try:
            return TFreeTokenizer(words=words, ruleset=arguments.ruleset)
        except ValueError as error:
            raise ValueError(f"{arguments.dictionary}: {error}") from error
    return None


def _files(paths: Iterable[str]) -> Iterator[str]:
    """Expand folders to their files in a fixed order, without hidden ones."""
    for path in paths:
        if path == "-" or not os.path.isdir(path):
            yield path
            continue
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _pieces(path: str, named: Sequence[str]) -> Iterator[str]:
    """Read a file in pieces that end after a line, or after a space where lines are very long.

    A file that is not text is an error if the user named it, and skipped with a note if a folder merely holds it.
    """
    try:
        with _open(path) as file:
            rest = ""
            while block := file.read(PIECE_CHARACTERS):
                block = rest + block
                end = block.rfind("\n") + 1 or block.rfind(" ") + 1
                if not end and len(block) >= 16 * PIECE_CHARACTERS:  # no prose: bound the memory
                    end = len(block)
                if end:
                    yield block[:end]
                rest = block[end:]
            if rest:
                yield rest
    except UnicodeDecodeError as error:
        if path in named or path == "-":
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start} of a block).") from error
        sys.stderr.write(f"skipped {path}: not UTF-8 text\n")


def _open(path: str) -> TextIO:
    if path == "-":
        return open(sys.stdin.fileno(), encoding="utf-8", newline="", closefd=False)
    return open(path, encoding="utf-8", newline="")


def _joined(numbers: object) -> str:
    return " ".join(map(str, numbers)) if isinstance(numbers, (list, tuple)) else ""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _write_table(rows: Sequence[Sequence[str]], right_from: int | None = None) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        aligned = [
            cell.rjust(width) if right_from is not None and i >= right_from else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _write("  ".join(aligned).rstrip())


def _write(line: str) -> None:
    """Print a line; characters that the terminal cannot show are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
