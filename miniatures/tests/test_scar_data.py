"""Labelled texts of the SCAR miniature: parts without common pages, labels, prompts; and the judge."""

import pytest

from miniatures.data.text import TextDocument, TextSplit
from miniatures.scar.data import as_rows, is_for_judge, load_material, prompts_of
from miniatures.scar.judge import Judge, features


def page(name, language="en", register="manual", lines=("one two three four five six",)):
    return TextDocument(language=language, source="s", register=register, page=name, text="\n".join(lines))


def pages(count, **fields):
    return [page(f"{i}", lines=[f"text {i} of {fields.get('language', 'en')}"], **fields) for i in range(count)]


@pytest.fixture(scope="module")
def material():
    documents = [
        *pages(40),
        *pages(40, language="de"),
        *pages(40, register="scripture"),
        *(one for language in ("fr", "es", "it") for one in pages(40, language=language)),
    ]
    split = TextSplit(documents, pages(3, register="scripture"))
    return load_material(split, train_bytes=10_000, test_bytes=10_000, judge_bytes=10_000)


def test_the_judge_reads_other_pages_than_the_adapters(material):
    ours = {one.text for one in material.train if one.group == "en"}
    assert ours and material.judge["en"] and not ours & set(material.judge["en"])
    assert len(ours) + len(material.judge["en"]) == 40


def test_a_page_is_on_the_same_side_in_every_language():
    assert all(is_for_judge(page(f"{i}")) == is_for_judge(page(f"{i}", "de")) for i in range(50))


def test_labels_follow_the_group(material):
    labels = {row["text"].split()[-1]: (row["scripture"], row["german"]) for row in as_rows(material.train)}
    assert labels["de"] == (0, 1)
    assert {row["scripture"] for row in as_rows(material.test)} == {1}


def test_a_part_stops_at_its_size():
    split = TextSplit(pages(400), [])
    texts = load_material(split, train_bytes=100, test_bytes=1, judge_bytes=1).train
    assert 100 <= sum(len(one.text.encode()) for one in texts) < 120


def test_prompts_are_beginnings_of_long_lines_in_words():
    long = "in the day that the king came to the city the people saw him and " * 3
    documents = [page("a", lines=[long, "1 " + long, "too short a line"])]
    assert prompts_of(documents, "en") == [" ".join(long.split()[:16])]
    assert prompts_of(documents, "de") == []


def test_the_judge_tells_languages_apart():
    judge = Judge({"en": ["the house and the tree"], "de": ["das Haus und der Baum"]})
    assert judge.group_of("the trees") == "en"
    assert judge.group_of("und das") == "de"
    assert judge.shares(["the tree", "der Baum", "das Haus", "12 !"]) == {"en": 0.25, "de": 0.5}


def test_features_are_words_and_runs_of_letters_with_borders():
    assert sorted(features("ab 1")) == sorted(["=ab", " ", "a", "b", " ", " a", "ab", "b ", " ab", "ab ", " ab "])
