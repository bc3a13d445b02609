"""The T-FREE part of the demo: a language model of whole words, trained in this repository."""

from pathlib import Path
from threading import Thread
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TextIteratorStreamer

from examples.page import Section
from tfree_tokenizer import HashSpec, split_words, structural_words, word_pattern

MINIATURE = Path(__file__).parents[1] / "miniatures" / "tfree"
PROMPTS = {
    "English": "To change the size of the",
    "Deutsch": "Wählen Sie",
    "Français": "Cliquez sur",
}
SENTENCE = "Die Tabellendokumente werden automatisch gespeichert, auch in LibreOffice 7.4!"
RELATED = ("document", "documents", "Dokument", "Tabelle")
SAMPLES = {  # written for this demo: the same paragraph in five languages
    "en": """Open the file again and check whether all the settings have been kept. If the window stays empty, close
the program, wait a moment and try once more with another document.""",
    "de": """Öffnen Sie die Datei erneut und prüfen Sie, ob alle Einstellungen erhalten geblieben sind. Bleibt das
Fenster leer, schließen Sie das Programm, warten einen Augenblick und versuchen es mit einem anderen Dokument.""",
    "fr": """Ouvrez de nouveau le fichier et vérifiez que tous les paramètres ont été conservés. Si la fenêtre reste
vide, fermez le programme, attendez un instant et recommencez avec un autre document.""",
    "es": """Abra de nuevo el archivo y compruebe que se hayan conservado todos los ajustes. Si la ventana queda vacía,
cierre el programa, espere un momento e inténtelo otra vez con otro documento.""",
    "it": """Apra di nuovo il file e controlli che tutte le impostazioni siano state mantenute. Se la finestra resta
vuota, chiuda il programma, attenda un attimo e riprovi con un altro documento.""",
}


def tfree_section(out: Path) -> Section:
    """Load, write text, split, hash, count."""
    checkpoint = MINIATURE / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    section = Section("T-FREE: a language model without a trained vocabulary")
    table = model.get_input_embeddings().weight
    section.text(
        f"{model.num_parameters():,} parameters, of which {2 * table.numel():,} in embedding and head: "
        f"{table.shape[0]:,} rows serve {len(tokenizer.dictionary_words):,} words, and any other word can be read."
    )
    _show_continuations(section, tokenizer, model)
    _show_words(section, tokenizer)
    _show_rows(section, model.config.hash_spec, out)
    _show_fertility(section, tokenizer, out)
    return section


def _show_continuations(section: Section, tokenizer: Any, model: Any) -> None:
    torch.manual_seed(0)
    for language, prompt in PROMPTS.items():
        print(f"\n[{language}] ", end="", flush=True)
        streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        settings = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        writer = Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
        writer.start()
        written = ""
        for piece in streamer:
            print(piece, end="", flush=True)
            written += piece
        writer.join()
        section.continuation(prompt, written.removeprefix(prompt))
    print()


def _show_words(section: Section, tokenizer: Any) -> None:
    words = split_words(SENTENCE, tokenizer.ruleset)
    known, marks = set(tokenizer.dictionary_words), set(structural_words(tokenizer.ruleset))
    kinds = ["mark" if word in marks else "" if word in known else "spelled" for word in words]
    print(f"\n{SENTENCE}\n  -> {' | '.join(words)}")
    section.text(
        f"“{SENTENCE}” is {len(words)} words (gray: white-space marks, orange: not in the dictionary, spelled in bytes "
        f"but read as one position) and becomes {len(tokenizer.encode(SENTENCE))} ids."
    )
    section.chips(list(zip(words, kinds, strict=True)))


def _show_rows(section: Section, spec: HashSpec, out: Path) -> None:
    active = {word: word_pattern(word, spec).active for word in RELATED}
    first = RELATED[0]
    header = ["word", "rows", f"shared with “{first}”", "Jaccard"]
    rows = []
    for word in RELATED:
        shared, union = active[first] & active[word], active[first] | active[word]
        rows.append([word, str(len(active[word])), str(len(shared)), f"{len(shared) / len(union):.2f}"])
        print(f"  {word:<12} {len(active[word]):>3} rows, {len(shared):>3} shared with {first}")
    section.text("Related words switch on many of the same rows, so what is learned for one serves the other:")
    section.table(header, rows)
    section.figure(_pattern_figure(active, spec), out / "tfree-rows.png", "Rows of the table that four words switch on")


def _pattern_figure(active: dict[str, frozenset[int]], spec: HashSpec) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 1.9))
    first = next(iter(active.values()))
    for line, rows in enumerate(active.values()):
        shared = sorted(rows & first)
        axes.vlines(sorted(rows - first), line - 0.38, line + 0.38, color="#4c78a8", linewidth=1)
        axes.vlines(shared, line - 0.38, line + 0.38, color="#e45756", linewidth=1)
    axes.set_yticks(range(len(active)), list(active))
    axes.invert_yaxis()
    axes.set_xlim(0, spec.hash_vocab_size)
    axes.set_xlabel(f"row of the table (red: shared with “{next(iter(active))}”)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def _show_fertility(section: Section, tokenizer: Any, out: Path) -> None:
    baseline = PreTrainedTokenizerFast.from_pretrained(MINIATURE / "bpe_baseline")
    counts = {
        "T-FREE positions": lambda text: len(split_words(text, tokenizer.ruleset)),
        "T-FREE ids": lambda text: len(tokenizer.encode(text)),
        f"BPE {len(baseline):,}": lambda text: len(baseline.encode(text, add_special_tokens=False)),
    }
    per_word = {name: [count(text) / len(text.split()) for text in SAMPLES.values()] for name, count in counts.items()}
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in per_word.items()]
    section.text(
        "Tokens per white-space word of the same paragraph; the BPE was trained on the same text as T-FREE. Words that "
        "the dictionary lacks take one id per byte, but one position of the model:"
    )
    section.table(["", *SAMPLES], rows)
    for row in rows:
        print("  " + "  ".join(f"{cell:>16}" if i == 0 else f"{cell:>6}" for i, cell in enumerate(row)))
    section.figure(_bars(per_word), out / "tfree-tokens-per-word.png", "Tokens per word, T-FREE against BPE")


def _bars(per_word: dict[str, list[float]]) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 2.6))
    position, width = np.arange(len(SAMPLES)), 0.27
    for i, ((name, values), color) in enumerate(zip(per_word.items(), ("#4c78a8", "#a0cbe8", "#bbbbbb"), strict=True)):
        bars = axes.bar(position + (i - 1) * width, values, width, label=name, color=color)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.set_xticks(position, list(SAMPLES))
    axes.set_ylabel("tokens per word")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
