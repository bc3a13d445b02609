"""Pages to documents: what is kept, what is dropped, and that nothing leaks into the held-out side."""

import gzip
import shutil
import struct

import pytest

from miniatures.data import text as text_module
from miniatures.data.html_blocks import Block
from miniatures.data.packages import PackageError
from miniatures.data.sources import (
    BIBLE_MAGIC,
    RawPage,
    bible_chapters,
    bible_text,
    debian_reference_sections,
    office_help_blocks,
)
from miniatures.data.text import TextDocument, clean_pages, load_split, paragraph_key, split_documents, text_sizes

OFFICE_PAGE = """<html><head><title>Öffnen</title></head><body><header>Hilfe</header>
<div id="DisplayArea"><h1 id="hd_1"><a name="open"></a>Dokument
 öffnen</h1>
<p id="par_1">Drücken Sie <span class="switchinline"><span hidden="true" id="MACtext">Befehl</span><span hidden="true"
 id="defaulttext">Strg</span></span>+O &amp; warten Sie.</p>
<div class="noteicon"><img alt="Notizsymbol">Notiz</div>
<pre>Print "x"
  y</pre>
<ul><li><p id="par_2">Erster Punkt</p></li><li>Zweiter<br>Punkt</li></ul>
<table><tr><td>MB_OK</td><td>0</td></tr></table>
<p class="embedded"><a href="x">Verwandtes</a></p></div><footer>Ende</footer></body></html>"""

REFERENCE = """<html><body><div class="navheader">weiter</div><div class="chapter"><h1><a id="_c"/>Chapter 3. Boot</h1>
<div class="toc"><p>Contents</p></div><p>Introduction.</p><div class="section"><h2><a id="_x"/>3.1. Stages</h2>
<p>There are four stages.</p><h3>3.1.1. First</h3><p>The <code>BIOS</code> runs.</p></div>
<div class="section"><h2>3.2. Systemd</h2><p>It starts units.</p></div></div><div class="navfooter">next</div>
</body></html>"""


def document(page, text, language="en", source="libreoffice-help"):
    return TextDocument(language=language, source=source, register="manual", page=page, text=text)


def page(name, *lines):
    return RawPage(name, [line if isinstance(line, Block) else Block("text", line, None) for line in lines])


def test_an_office_page_gives_its_own_text_in_order_with_entities_decoded():
    assert [(block.kind, block.text) for block in office_help_blocks(OFFICE_PAGE)] == [
        ("heading", "Dokument öffnen"),
        ("text", "Drücken Sie Strg+O & warten Sie."),
        ("code", 'Print "x"\n  y'),
        ("text", "Erster Punkt"),
        ("text", "Zweiter Punkt"),
        ("text", "MB_OK"),
        ("text", "0"),
    ]


def test_anchors_are_those_that_translations_share():
    blocks = office_help_blocks(OFFICE_PAGE)
    assert [block.anchor for block in blocks[:2]] == ["open", "defaulttext"]
    assert blocks[3].anchor == "par_2"


def test_a_reference_chapter_is_cut_at_its_second_level():
    pages = debian_reference_sections(REFERENCE, "ch03")
    assert [(name, [block.text for block in blocks]) for name, blocks in pages] == [
        ("ch03/0", ["Chapter 3. Boot", "Introduction."]),
        ("ch03/1", ["3.1. Stages", "There are four stages.", "3.1.1. First", "The BIOS runs."]),
        ("ch03/2", ["3.2. Systemd", "It starts units."]),
    ]


def test_bible_lines_are_grouped_by_chapter_without_numbers():
    pages = bible_chapters("Holy Bible\nGe1:1 In the beginning\nGe1:2 And the earth\n1Sa2:3 Talk no more\n")
    assert [(name, [block.text for block in blocks]) for name, blocks in pages] == [
        ("Ge/1", ["In the beginning", "And the earth"]),
        ("1Sa/2", ["Talk no more"]),
    ]


@pytest.mark.skipif(shutil.which("gzip") is None, reason="unpacking the Bible's data file uses gzip")
def test_bible_data_of_another_format_is_refused(tmp_path):
    path = tmp_path / "bible.data"
    path.write_bytes(gzip.compress(b"text"))
    with pytest.raises(PackageError, match="must start with"):
        bible_text(path)
    header = BIBLE_MAGIC.ljust(0x58, b"\0") + struct.pack(">3I", 1, 0x70, 0x80)
    path.write_bytes(header.ljust(0x70, b"\0") + b"\xff" * 16)
    with pytest.raises(PackageError, match="gzip could not unpack a section"):
        bible_text(path)


def test_code_cells_and_repetitions_are_dropped_and_headings_set_off():
    pages = [
        page("a", Block("heading", "Opening files", None), "You can open any file.", Block("code", "x = 1 + y", None)),
        page("b", "MB_OK", "123", "You can OPEN any file!", "Only this one is new here."),
        page("c", "You can open any file."),
    ]
    assert list(clean_pages(pages)) == [
        ("a", ["", "Opening files", "You can open any file."]),
        ("b", ["Only this one is new here."]),
    ]


def test_short_lines_that_stand_on_very_many_pages_are_dropped():
    def pages(count):
        return [page(str(i), "Syntax:", f"This page is about {'x' * (i + 1)} alone.") for i in range(count)]

    assert [lines[0] for _, lines in clean_pages(pages(20))] == ["Syntax:"] * 20
    assert all(len(lines) == 1 for _, lines in clean_pages(pages(21)))


def test_untranslated_paragraphs_are_dropped():
    english = frozenset([paragraph_key("This was never translated.")])
    pages = [page("a", "This was never translated.", "Das hier sehr wohl, ja.")]
    assert list(clean_pages(pages, drop_keys=english)) == [("a", ["Das hier sehr wohl, ja."])]


def test_a_page_is_held_out_in_every_language_or_in_none():
    documents = [document(str(i), f"Text {'z' * i} of a page.", lang) for i in range(300) for lang in ("en", "de")]
    split = split_documents(documents, held_out_share=0.2, seed=3)
    train, held_out = ({(d.page, d.language) for d in side} for side in (split.train, split.held_out))
    assert 30 < len(split.held_out) / 2 < 90
    assert all((number, "de") in side for side in (train, held_out) for number, _ in side)
    assert not train & held_out
    assert split == split_documents(documents, held_out_share=0.2, seed=3)
    assert split != split_documents(documents, held_out_share=0.2, seed=4)


def test_held_out_pages_lose_lines_that_training_pages_nearly_repeat(monkeypatch):
    monkeypatch.setattr(text_module, "_page_fraction", lambda document, seed: float(document.page == "train"))
    line = "Click the button in the toolbar to open the dialog for printing documents at once."
    split = split_documents(
        [
            document("train", f"{line}\nSome other line of text."),
            document("held out", f"{line.replace('at once', 'now')}\nNothing like it was in training before."),
        ],
        held_out_share=0.5,
        seed=0,
    )
    assert [one.text for one in split.held_out] == ["Nothing like it was in training before."]


def test_sizes_count_documents_bytes_and_words():
    sizes = text_sizes([document("a", "Für alle"), document("b", "x"), document("a", "y z", language="de")])
    assert sizes["libreoffice-help", "en"] == {"documents": 2, "bytes": 10, "words": 3}
    assert sizes["libreoffice-help", "de"]["words"] == 2


def test_an_unknown_source_or_share_is_refused():
    with pytest.raises(ValueError, match=r"sources must be among \[.*\], got \['wiki'\]"):
        load_split(sources=["wiki"])
    with pytest.raises(ValueError, match=r"held_out_share must lie in \(0, 1\), got 1.0"):
        load_split(held_out_share=1.0)


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_packages_give_parallel_prose_in_five_languages(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIATURES_CACHE", str(tmp_path))
    split = load_split()
    sizes = text_sizes(split.train)
    assert all(sizes["libreoffice-help", language]["bytes"] > 2.5e6 for language in ("en", "de", "fr", "es", "it"))
    assert sizes["bible-kjv", "en"]["documents"] + text_sizes(split.held_out)["bible-kjv", "en"]["documents"] > 1150
    assert not {(d.source, d.page) for d in split.train} & {(d.source, d.page) for d in split.held_out}
    assert load_split() == split
