"""Porter's suffix stripping (Porter 1980), with the departures of the implementation behind published ROUGE figures.

Only for comparison with those figures: TOFU's evaluation stems, with NLTK's stemmer in its default mode. That mode
departs from the paper in the rules that are marked below.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

_IRREGULAR = {  # departure: forms that the rules would spoil
    "sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning",
    "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
_STEP2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
_STEP3 = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_STEP4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


@lru_cache(maxsize=65536)
def porter_stem(word: str) -> str:
    """Return the stem of a word in lower case; words of one or two letters stay as they are."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plurals, _past, _final_y, _step2, _step3, _step4, _final_e, _double_l):
        word = step(word)
    return word


def _consonant(word: str, i: int) -> bool:
    if word[i] == "y":
        return i == 0 or not _consonant(word, i - 1)
    return word[i] not in "aeiou"


def _measure(stem: str) -> int:
    """Number of vowel-consonant sequences."""
    kinds = [_consonant(stem, i) for i in range(len(stem))]
    return sum(1 for one, other in pairwise(kinds) if other and not one)


def _has_vowel(stem: str) -> bool:
    return not all(_consonant(stem, i) for i in range(len(stem)))


def _short_end(word: str) -> bool:
    """Consonant, vowel, consonant other than w, x, y; departure: also a word that is vowel, consonant."""
    if len(word) == 2:
        return not _consonant(word, 0) and _consonant(word, 1)
    if len(word) < 3:
        return False
    kinds = [_consonant(word, i) for i in range(len(word) - 3, len(word))]
    return kinds == [True, False, True] and word[-1] not in "wxy"


def _double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _replace(word: str, rules: tuple[tuple[str, str], ...], allowed: Callable[[str], bool]) -> str:
    """Apply the rule of the longest matching suffix, if what is left before it allows that."""
    matching = [rule for rule in rules if word.endswith(rule[0])]
    if not matching:
        return word
    suffix, new = max(matching, key=lambda rule: len(rule[0]))
    stem = word[: -len(suffix)]
    return stem + new if allowed(stem) else word


def _plurals(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]  # departure: ties, not ti
    return _replace(word, (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")), lambda _: True)


def _past(word: str) -> str:
    if word.endswith("ied"):  # departure
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    stem = next((word[: -len(end)] for end in ("ed", "ing") if word.endswith(end)), None)
    if stem is None or not _has_vowel(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _double(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _short_end(stem) else stem


def _final_y(word: str) -> str:
    """Departure: y becomes i after a consonant that is not the first letter, in place of after any vowel."""
    stem = word[:-1]
    if word.endswith("y") and len(stem) > 1 and _consonant(stem, len(stem) - 1):
        return stem + "i"
    return word


def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:  # departure: what remains is looked at again
        return _step2(word[:-4] + "al")
    if word.endswith("logi"):  # departure
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _STEP2, lambda stem: _measure(stem) > 0)


def _step3(word: str) -> str:
    return _replace(word, _STEP3, lambda stem: _measure(stem) > 0)


def _step4(word: str) -> str:
    rules = tuple((suffix, "") for suffix in (*_STEP4, "ion"))
    longest = max((suffix for suffix, _ in rules if word.endswith(suffix)), key=len, default="")
    if longest == "ion" and word[-4:-3] not in ("s", "t"):
        return word
    return _replace(word, rules, lambda stem: _measure(stem) > 1)


def _final_e(word: str) -> str:
    stem = word[:-1]
    if not word.endswith("e"):
        return word
    return stem if _measure(stem) > 1 or (_measure(stem) == 1 and not _short_end(stem)) else word


def _double_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
