"""The command `atman-explain`: what a model's continuation of a prompt rests on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._version import __version__

_EXAMPLES = """\
The model is a folder or a Hub repository. Without --target the model continues the prompt greedily. The prompt "-" is
read from standard input.

examples:
  atman-explain MODEL --prompt "Oslo is the capital of" --target " Norway"
  atman-explain MODEL --prompt - --granularity sentence --max-new-tokens 5 --json scores.json < letter.txt
  atman-explain MODEL --prompt "<image> what is this ?" --image photo.png --plot map.png
"""
_SETTINGS = ("factor", "mode", "granularity", "delimiter", "kappa", "postprocess", "max_new_tokens", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name. None: those of this process.

    Returns:
        0; 2 after an error, of which one line was written to stderr; 130 after an interruption.
    """
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except KeyboardInterrupt as stop:
        for partial in getattr(stop, "partial", []):
            _write(partial, arguments)
        sys.stderr.write("atman-explain: interrupted\n")
        return 130
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        sys.stderr.write(f"atman-explain: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atman-explain",
        description="Score how much every part of a prompt supports a continuation, by suppressing attention to it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"atman-explain {__version__}")
    add("model", metavar="MODEL", help="folder or Hub repository of a causal or vision-language model")
    add("--prompt", required=True, help='text that the model reads; "-": standard input')
    add("--target", help="continuation to explain; default: the model's own")
    add("--image", type=Path, action="append", help="a picture of the prompt; may be repeated")
    add("--factor", type=float, help="what remains of the attention (default: 0.1; 0.01 for log_additive)")
    add("--mode", help="shift_min (default), log_additive, multiply or shift_min_all")
    add("--granularity", help="token (default), word, sentence, paragraph or auto")
    add("--delimiter", help="units end with this text")
    add("--kappa", type=float, help="cosine similarity from which other tokens are suppressed, too")
    add("--postprocess", help="none (default), absolute or square")
    add("--max-new-tokens", type=int, help="length of the model's own continuation (default: 1)")
    add("--batch-size", type=int, help="most units in one forward pass")
    add("--revision", help="branch, tag or commit of the repository")
    add("--device", default="cpu", help="where the model runs (default: cpu)")
    add("--dtype", default="auto", help="of the model's weights (default: as saved)")
    add("--trust-remote-code", action="store_true", help="run the code of the model's repository")
    add("--json", type=Path, metavar="FILE", help="write the explanation")
    add("--html", type=Path, metavar="FILE", help="write a heat map of the prompt")
    add("--plot", type=Path, metavar="FILE", help="write a picture of the prompt")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from . import explain

    given = {name: getattr(arguments, name) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    images = None
    if arguments.image:
        from PIL import Image

        images = [Image.open(path).convert("RGB") for path in arguments.image]
    model, processor = _load(arguments)
    _write(explain(model, processor, prompt, target=arguments.target, images=images, **settings), arguments)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoProcessor,
        AutoTokenizer,
    )

    source = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    config = AutoConfig.from_pretrained(arguments.model, **source)
    if arguments.image:
        model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
    elif config.is_encoder_decoder:
        model_class, processor_class = AutoModelForSeq2SeqLM, AutoTokenizer
    else:
        model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
    model = model_class.from_pretrained(arguments.model, dtype=arguments.dtype, use_safetensors=True, **source)
    return model.to(arguments.device).eval(), processor_class.from_pretrained(arguments.model, **source)


def _write(explanation: Any, arguments: argparse.Namespace) -> None:
    if sys.stdout.isatty():
        print(explanation.to_ansi())
    print(explanation)
    if arguments.json is not None:
        explanation.save(arguments.json)
    if arguments.html is not None:
        page = f'<!doctype html><meta charset="utf-8"><title>atman-explain</title>{explanation._repr_html_()}'
        arguments.html.write_text(page, encoding="utf-8")
    if arguments.plot is not None:
        explanation.plot().savefig(arguments.plot, bbox_inches="tight")
