"""What a model of few words is given of a prompt: what it knows, by the names that it knows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starweave_image.tasks import reading
from starweave_image.tasks.reading import Vocabulary
from starweave_image.tasks.synonyms import READ_AS
from tiny.first import emoji, scenes, shapes

TINY = Path(__file__).parents[2] / "priv/models/starweave-tiny"
KNOWN = reading.vocabulary(TINY)
assert KNOWN is not None
FEW = Vocabulary(frozenset("a an the of in on cat dog car red large wolf leaf hills beside".split()))


def test_what_the_embedded_model_was_trained_with_is_read_as_it_stands() -> None:
    rng = random.Random(0)
    captions = [make(rng).caption for make in (shapes.single_shape, shapes.two_shapes) for _ in range(150)]
    captions += [scenes.landscape(rng).caption for _ in range(150)]
    for subject in KNOWN.subjects:
        captions += [
            subject,
            f"a {subject}",
            f"A picture of an {subject}",
            f"the {subject} on a blue background",
        ]
    changed = {
        caption: read.text for caption in captions if (read := reading.read(caption, KNOWN)).text != caption
    }
    assert changed == {}


def test_each_name_of_a_thing_is_read_as_a_name_of_that_thing() -> None:
    for names in emoji.everyday_things().values():
        for name in names:
            read = reading.read(name, KNOWN)
            assert not read.dropped
            # Each is a flower to the model, alone and in a bunch.
            assert read.text in (*names, "flower") or names[0] == "gold ring", name


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("A cozy cabin in the woods, snow", "a cabin in the woods, snow"),
        ("a photo of an astronaut riding a horse, 4k, masterpiece", "a picture of a horse"),
        ("two cats", "cat"),
        ("a kitty", "a cat"),
        ("three automobiles", "car"),
        ("an automobile", "a car"),
        ("trees", "tree"),
        ("a tiny crimson triangle", "a small red triangle"),
        ("a teal square next to a red circle", "a cyan square to the left of a red circle"),
        ("grey heart on a violet background", "gray heart on a purple background"),
        ("a yellow school bus", "a yellow bus"),
        ("a slice of pizza.", "a pizza"),
        ("a girl with a red dress", "a red dress"),
        ("a bunch of grapes", "grapes"),
        ("a mouse under the table", "a mouse"),
        ("snowy mountains at night, oil painting", "snowy mountains at night"),
        ("A CAFÉ!!!", "a cafe"),
        ("a red apple 🍎", "a red apple"),
        ("the wizard\u2019s castle", "the castle"),
        ("A red apple", "A red apple"),
        ("ein rotes Auto", "car"),
        ("красное яблоко", ""),
        ("🍎", ""),
        ("a", ""),
        ("...", ""),
    ],
)
def test_prompts_of_a_stranger(prompt: str, text: str) -> None:
    assert reading.read(prompt, KNOWN).text == text


def test_what_was_left_out_and_what_was_read_as_what_is_told() -> None:
    read = reading.read("two fluffy kitties, huge wolves, fluffy leaves", FEW)
    assert read.text == "cat, large wolf, leaf"
    assert read.dropped == ["two", "fluffy"]
    assert read.replaced == [("kitties", "cat"), ("huge", "large"), ("wolves", "wolf"), ("leaves", "leaf")]
    assert read.notices("Few", "prompt") == [
        'Few does not know "two", "fluffy" in the prompt, and draws without.',
        'Few reads "cat" for "kitties", "large" for "huge", "wolf" for "wolves", "leaf" for "leaves" in the prompt.',
    ]
    nothing = reading.read("Zwei Äpfel 🍏", FEW)
    assert nothing.is_empty
    assert nothing.notices("Few", "negative_prompt") == [
        'Few understood nothing of the negative prompt: it does not know "zwei", "äpfel", "🍏".'
    ]
    assert reading.read("a red cat", FEW).notices("Few", "prompt") == []


def test_long_words_and_lists_of_them_are_told_in_short() -> None:
    [notice] = reading.read(" ".join(f"{'x' * 5000}{i}" for i in "abcdefghijkl"), FEW).notices(
        "Few", "prompt"
    )
    assert len(notice) < 600
    assert notice.endswith(" ….")


def test_a_spelling_is_read_as_the_first_name_that_the_model_knows() -> None:
    assert reading.read("a cat next to a dog", FEW).text == "a cat beside a dog"
    other = Vocabulary(FEW.words - {"beside"} | {"to", "left"})
    assert reading.read("a cat next to a dog", other).text == "a cat to the left of a dog"
    assert (
        reading.read("a cat next to a dog", Vocabulary(frozenset({"a", "cat", "dog"}))).text == "a cat a dog"
    )


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"words": ["Cat", "dog"]}, {"cat", "dog"}),
        (["cat", "dog"], {"cat", "dog"}),
        ({"words": ["cat"], "subjects": ["black cat"], "more": 1}, {"cat"}),
        ({"words": []}, None),
        ({"words": "cat"}, None),
        ({"words": [1]}, None),
        ({"words": {}}, None),
        ({"words": ["cat"], "subjects": [None]}, None),
        ({"words": ["cat"], "subjects": 5}, None),
        ({}, None),
        ("cat", None),
        (7, None),
        (None, None),
    ],
)
def test_a_vocabulary_that_is_none_is_no_vocabulary(
    tmp_path: Path, written: object, words: set[str] | None
) -> None:
    (tmp_path / "vocabulary.json").write_text(json.dumps(written))
    known = reading.vocabulary(tmp_path)
    assert (known and known.words) == words


def test_damaged_and_missing_vocabularies_are_none(tmp_path: Path) -> None:
    assert reading.vocabulary(tmp_path) is None
    for damaged in (b"", b"{", b"[" * 200_000, b"\xff\xfe"):
        (tmp_path / "vocabulary.json").write_bytes(damaged)
        assert reading.vocabulary(tmp_path) is None


@given(st.text(max_size=300))
def test_what_is_read_is_of_words_that_are_known_and_reading_it_again_changes_nothing(prompt: str) -> None:
    read = reading.read(prompt, KNOWN)
    if read.text != prompt:
        assert set(read.text.replace(",", " ").split()) <= KNOWN.words
    again = reading.read(read.text, KNOWN)
    assert not again.dropped


def test_no_spelling_is_listed_twice_for_one_name() -> None:
    for target, spellings in READ_AS.items():
        listed = spellings.split(", ")
        assert len(set(listed)) == len(listed), target
        assert all(listed), target
