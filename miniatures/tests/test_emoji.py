"""Names, categories and split of emoji; their pictures where the network is at hand."""

import pytest

from miniatures.data.emoji import (
    Emoji,
    base_sequence,
    load_emoji,
    parse_annotations,
    parse_labels,
    render_emoji,
    split_emoji,
)

ANNOTATIONS = """<?xml version="1.0" encoding="UTF-8" ?><ldml><annotations>
<annotation cp="🐕">Haustier | Hund</annotation><annotation cp="🐕" type="tts">Hund</annotation>
<annotation cp="👩‍🚀" type="tts">Astronautin</annotation><annotation cp="x">ohne Namen</annotation>
</annotations></ldml>"""


def emoji(text):
    return Emoji(text=text, names={"en": text}, keywords={"en": ()}, category="", subcategory="")


def test_annotations_give_names_and_search_terms():
    assert parse_annotations(ANNOTATIONS) == {"🐕": ("Hund", ("Haustier", "Hund")), "👩‍🚀": ("Astronautin", ())}


def test_labels_read_characters_ranges_and_sequences():
    labels = parse_labels("# [a] ; X ; y\n[🐕🐀-🐂{🏴‍☠️}] ; Animals ; mammal\n[🐀] ; Other ; later\n")
    assert labels["🐕"] == labels["🐁"] == labels["🏴‍☠"] == ("Animals", "mammal")
    assert labels["🐀"] == ("Animals", "mammal")
    assert len(labels) == 5


@pytest.mark.parametrize(
    ("text", "base"),
    [("👍🏽", "👍"), ("🕵🏿‍♀️", "🕵"), ("❤️", "❤"), ("👩‍🚀", "👩‍🚀"), ("🏻", "🏻")],
)
def test_variants_share_a_base(text, base):
    assert base_sequence(text) == base


def test_the_split_keeps_variants_together_and_depends_on_the_seed():
    everything = [emoji(chr(0x1F400 + i) + tone) for i in range(60) for tone in ("", "\U0001f3fb", "\U0001f3ff")]
    train, test = split_emoji(everything, test_share=0.3, seed=1)
    assert not {one.base for one in train} & {one.base for one in test}
    assert 20 < len(test) < 90
    assert len(train) + len(test) == len(everything)
    assert split_emoji(everything, test_share=0.3, seed=2)[1] != test


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"test_share must lie in \(0, 1\), got 0"):
        split_emoji([], test_share=0)


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_font_draws_thousands_of_named_emoji_in_color():
    found = {one.text: one for one in load_emoji()}
    assert len(found) > 3500
    assert found["🐕"].names == {"en": "dog", "de": "Hund", "fr": "chien", "es": "perro", "it": "cane"}
    assert found["🐕"].category == "Animals & Nature"
    picture = render_emoji("🍎", 64)
    red, green, _, alpha = (band.resize((1, 1)).getpixel((0, 0)) for band in picture.split())
    assert picture.size == (64, 64)
    assert red > 1.5 * green
    assert 60 < alpha < 255
    with pytest.raises(ValueError, match="text must be one emoji of the font, got '🐕🐕'"):
        render_emoji("🐕🐕")
