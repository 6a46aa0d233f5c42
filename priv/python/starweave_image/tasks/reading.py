"""How a prompt is read for a model with a small vocabulary.

The folder of such a model has a `vocabulary.json` with its `words`. The tokenizer would split any other word into
pieces with other meanings. So unknown words are left out, or replaced by synonyms that the model knows. A prompt of
known words only stays as it is.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..weights.outside import Unreadable, read_json
from .synonyms import COLOURS_AND_SIZES, IRREGULAR, READ_AS

_ARTICLES = frozenset({"a", "an", "the"})
# Words that have no meaning without a thing after them.
_LINKS = _ARTICLES | {"of", "in", "on", "at", "with", "and", "by", "to", "under", "above", "below", "during"}
_BARE = _LINKS | set(COLOURS_AND_SIZES) | {"picture"}
# Words that a prompt must not begin with.
_TIES = frozenset({"of", "with", "and", "by", "to"})
_LONGEST = 4
_MOST_TOLD = 8
_PLAIN = re.compile(r"[A-Za-z0-9\s,'-]*")


@dataclass(frozen=True)
class Reading:
    """`text` is the prompt for the model. `dropped` are the words left out of it, in order, and `replaced` the replaced
    words: (typed, read)."""

    text: str
    dropped: list[str] = field(default_factory=list)
    replaced: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether no word was understood."""
        return not self.text

    def notices(self, model: str, field: str) -> list[str]:
        """Sentences for the caller about the words of a `field` that a `model` does not know."""
        text = f"the {field.replace('_', ' ')}"
        if self.is_empty:
            why = f": it does not know {_listed(self.dropped)}" if self.dropped else ""
            return [f"{model} understood nothing of {text}{why}."]
        told = []
        if self.dropped:
            told.append(f"{model} does not know {_listed(self.dropped)} in {text}, and draws without.")
        if self.replaced:
            pairs = [f'"{_short(read)}" for "{_short(typed)}"' for typed, read in self.replaced]
            told.append(f"{model} reads {', '.join(pairs[:_MOST_TOLD])}{_more(pairs)} in {text}.")
        return told


def _listed(words: list[str]) -> str:
    return ", ".join(f'"{_short(word)}"' for word in words[:_MOST_TOLD]) + _more(words)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def _more(items: list[str]) -> str:
    return " …" if len(items) > _MOST_TOLD else ""


@dataclass(frozen=True)
class Vocabulary:
    """The `words` that a model knows, and the `subjects` that it draws: known words joined by single spaces."""

    words: frozenset[str]
    subjects: frozenset[str] = frozenset()


def vocabulary(folder: Path) -> Vocabulary | None:
    """The content of a model's `vocabulary.json`; None without that file, which means that the model reads all
    words."""
    try:
        listed: Any = read_json(folder / "vocabulary.json", Any)
        listed = listed if isinstance(listed, dict) else {"words": listed}
        if not isinstance(listed["words"], list):
            return None
        words = frozenset(word.lower() for word in listed["words"])
        subjects = frozenset(" ".join(_tokens(subject)) for subject in listed.get("subjects", ()))
    except (Unreadable, LookupError, TypeError, AttributeError):
        return None
    return Vocabulary(words, subjects) if words else None


def read(prompt: str, known: Vocabulary) -> Reading:
    """The prompt as a model with this vocabulary reads it."""
    tokens = _tokens(prompt)
    spans = {
        " ".join(tokens[at : at + n]) for n in range(1, _LONGEST + 1) for at in range(len(tokens) - n + 1)
    }
    # A known word may be only a tag of things that the model draws. If the prompt has no other word, it stands for
    # these.
    content = [token for token in tokens if token in known.words and token not in _BARE]
    named = len(content) != 1 or bool(spans & known.subjects)
    said: list[str] = []
    dropped: list[str] = []
    replaced: list[tuple[str, str]] = []
    at = 0
    while at < len(tokens):
        typed, meant = _at(tokens, at, known, named)
        at += len(typed)
        said += meant
        if not meant:
            dropped.append(" ".join(typed))
        elif meant != typed:
            replaced.append((" ".join(typed), " ".join(meant)))
    text = _tidy(said)
    if text and not dropped and not replaced and _PLAIN.fullmatch(prompt):
        return Reading(prompt)
    return Reading(text, list(dict.fromkeys(dropped)), list(dict.fromkeys(replaced)))


def _tokens(text: str) -> list[str]:
    """Words in lower case, other characters one by one, and commas for anything else that separates things."""
    text = re.sub(r"[’']s\b", "", text.lower())
    parts = re.finditer(
        r"(?P<word>[^\W_]+)|(?P<pause>[,.;:!?()\[\]{}|\n—…]+)|(?P<sign>[^\s\x00-\x7f’‘“”–])", text
    )
    return ["," if part.lastgroup == "pause" else part[0] for part in parts]


def _at(tokens: list[str], at: int, known: Vocabulary, named: bool) -> tuple[list[str], list[str]]:
    """The words at this position that belong together, and the model's words for them."""
    for count in range(min(_LONGEST, len(tokens) - at), 1, -1):
        typed = tokens[at : at + count]
        for last in _bases(typed[-1]):
            for target in _spellings().get(" ".join([*typed[:-1], last]), ()):
                meant = _tokens(target)
                if known.words.issuperset(meant):
                    return typed, meant
    token = tokens[at]
    if token == ",":
        return [token], [token]
    wanted = known.words
    if token in known.words:
        wanted = frozenset() if named else known.subjects
    for base in _bases(token):
        for target in (base, *filter(None, _spellings().get(base, ()))):
            if target in wanted or (wanted is known.words and wanted.issuperset(_tokens(target))):
                return [token], _tokens(target)
    return [token], [token] if token in known.words else []


def _bases(word: str) -> Iterator[str]:
    """Forms of the word that the model may know: itself, its singular, its plural, and itself without accents."""
    yield word
    if word in IRREGULAR:
        yield IRREGULAR[word]
    for ending, singular in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            yield word.removesuffix(ending) + singular
    if len(word) > 2:
        yield word.removesuffix("y") + "ies" if word.endswith("y") else word + "s"
    plain = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    if plain != word:
        yield plain


def _tidy(said: list[str]) -> str:
    """The words without links and commas that have lost their neighbours, and with the right form of each article."""
    kept: list[str] = []
    for token in said:
        while kept and kept[-1] in _LINKS and (token == "," or (kept[-1] in _ARTICLES and token in _LINKS)):
            kept.pop()
        if (token == "," or token in _TIES) and (not kept or kept[-1] == ","):
            continue
        if kept and kept[-1] in ("a", "an"):
            kept.pop()
            if not token.endswith("s") or token.endswith(("ss", "us", "is")):
                kept.append("an" if token[0] in "aeiou" else "a")
        kept.append(token)
    while kept and kept[-1] in _LINKS | {","}:
        kept.pop()
    return " ".join(kept).replace(" ,", ",")


@functools.cache
def _spellings() -> dict[str, tuple[str, ...]]:
    """For each spelling, what it may be read as, the likeliest first."""
    found: dict[str, tuple[str, ...]] = {}
    for target, spellings in READ_AS.items():
        for spelling in spellings.split(", "):
            key = " ".join(token for token in _tokens(spelling) if token != ",")
            found[key] = (*found.get(key, ()), target)
    return found
