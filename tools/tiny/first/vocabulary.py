"""A word-level vocabulary in the form that CLIP's byte-pair tokenizer understands.

Merges are learned from the captions' words until each word is one token. Words outside it
fall apart into pieces and letters; characters outside ASCII become the unknown token.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

CONTEXT = 24
"""Tokens of a prompt, with the start and end tokens and the padding."""

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def words_of(captions: Iterable[str]) -> list[str]:
    """All words of the captions as CLIP's pre-tokenizer splits them, sorted."""
    found: set[str] = set()
    for caption in captions:
        found.update(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower()))
    return sorted(found)


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    i = 0
    while i < len(parts):
        if parts[i : i + 2] == pair:
            out.append(parts[i] + parts[i + 1])
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return tuple(out)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest pair first, until every word is a single token."""
    split = [(*word[:-1], word[-1] + _WORD_END) for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(p for parts in split for p in pairwise(parts))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merged(parts, best) if len(parts) > 1 else parts for parts in split]


def build_tokenizer(words: Iterable[str]) -> Any:
    """A `CLIPTokenizer` that knows `words`."""
    import transformers

    merges = learn_merges(words)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [*letters, *(c + _WORD_END for c in letters), *(a + b for a, b in merges)]
    tokens = [*dict.fromkeys(tokens), START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer: Any = transformers.CLIPTokenizer
    return tokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of an exported checkpoint."""
    import transformers

    tokenizer: Any = transformers.CLIPTokenizer
    return tokenizer.from_pretrained(checkpoint / "tokenizer")


def load_words(checkpoint: Path) -> list[str]:
    """The words that an exported checkpoint knows."""
    words: list[str] = json.loads((checkpoint / "vocabulary.json").read_text())["words"]
    return words
