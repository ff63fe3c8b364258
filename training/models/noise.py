"""Texts as they are typed in a hurry, so that a model learns what slips leave as it is."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from training.contract import Array, strings
from training.spec.models import Noise

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_REACH = 1.3
"""Widths of a key between the middles of two that are neighbours, at most."""


def noisy(spec: Noise, texts: Array, chance: np.random.Generator) -> Array:
    """Each text changed by its own chance, strings [n]; none is left without a character."""
    return strings([_changed(spec, it, chance) for it in texts])


def _changed(spec: Noise, text: str, chance: np.random.Generator) -> str:
    if chance.random() >= spec.share:
        return text
    found = _reworded(spec, text, chance) if spec.words_dropped or spec.words_swapped else text
    if spec.typos:
        found = _mistyped(found, spec.typos, chance)
    if spec.punctuation:
        found = _unmarked(found, spec.punctuation, chance)
    if spec.case and chance.random() < spec.case:
        found = found.upper() if chance.random() < 0.5 else found.lower()
    return found if found.strip() else text


def _reworded(spec: Noise, text: str, chance: np.random.Generator) -> str:
    """Some words left out, and some exchanged with the next; what is between words stays where it is."""
    parts = re.split(r"(\s+)", text)
    words, blanks = parts[::2], [*parts[1::2], ""]
    swapped = chance.random(len(words)) < spec.words_swapped
    at = 0
    while at < len(words) - 1:
        if swapped[at]:
            words[at], words[at + 1] = words[at + 1], words[at]
            at += 1  # neither of the two goes on
        at += 1
    dropped = chance.random(len(words)) < spec.words_dropped
    return "".join(word + blank for word, blank, gone in zip(words, blanks, dropped, strict=True) if not gone)


def _mistyped(text: str, rate: float, chance: np.random.Generator) -> str:
    """Each letter a slip at this rate."""
    pieces, done = [], 0
    for at in np.flatnonzero(chance.random(len(text)) < rate).tolist():
        if at >= done and text[at].isalpha():
            slips = _slips(text[at], text[at + 1 : at + 2], chance)
            typed, letters = slips[chance.integers(len(slips))]
            pieces += [text[done:at], typed]
            done = at + letters
    return "".join([*pieces, text[done:]])


def _slips(letter: str, after: str, chance: np.random.Generator) -> list[tuple[str, int]]:
    """What may be typed in place of a letter and what follows it, and of how many characters. The last letter of a word
    is never left out: a word does not go by typing."""
    found = [(letter + letter, 1)]
    if after.isalpha():
        found += [(after + letter, 2), ("", 1)]
    if keys := _NEIGHBOURS.get(letter.lower()):
        key = keys[chance.integers(len(keys))]
        found += [(key.upper() if letter.isupper() else key, 1)]
    return found


def _unmarked(text: str, rate: float, chance: np.random.Generator) -> str:
    """Each punctuation mark left out at this rate."""
    gone = chance.random(len(text)) < rate
    return "".join(
        it for it, out in zip(text, gone.tolist(), strict=True) if not (out and unicodedata.category(it)[0] == "P")
    )


def _neighbours() -> Mapping[str, str]:
    """Letter → those around it on a keyboard, each row of which begins a little further right."""
    places = {
        key: (at + shift, row)
        for row, (keys, shift) in enumerate(zip(_KEYS, (0.0, 0.25, 0.75), strict=True))
        for at, key in enumerate(keys)
    }
    return MappingProxyType(
        {
            key: "".join(it for it, there in places.items() if 0 < math.dist(there, place) <= _REACH)
            for key, place in places.items()
        }
    )


_NEIGHBOURS = _neighbours()
