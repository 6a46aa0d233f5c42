"""A word-level vocabulary in the form that CLIP's byte-pair tokenizer understands.

Merges are built so that each word of the captions is one token. Words outside it fall apart into pieces and letters;
characters outside ASCII become the unknown token.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

CONTEXT = 32
"""Tokens of a prompt, with the start and end tokens and the padding."""

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def words_of(captions: Iterable[str]) -> list[str]:
    """All words of the captions as CLIP's pre-tokenizer splits them, sorted."""
    found: set[str] = set()
    for caption in captions:
        found.update(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower()))
    return sorted(found)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, commonest pair first, until every word is a single token."""
    split = [(*word[:-1], word[-1] + _WORD_END) for word in words]
    # For each pair, which words hold it: a merge touches those alone.
    holders: dict[tuple[str, str], set[int]] = {}
    counts: dict[tuple[str, str], int] = {}

    def count(row: int, by: int) -> None:
        for pair in pairwise(split[row]):
            counts[pair] = counts.get(pair, 0) + by
            if by > 0:
                holders.setdefault(pair, set()).add(row)

    for row in range(len(split)):
        count(row, 1)
    merges: list[tuple[str, str]] = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for row in holders.pop(best):
            count(row, -1)
            split[row] = _merged(split[row], best)
            count(row, 1)
        counts = {pair: n for pair, n in counts.items() if n > 0}
    return merges


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
