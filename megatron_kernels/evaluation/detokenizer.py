"""Text as people write it, from text whose words and signs were put apart: Megatron-LM's rules, in its order.

They are those of tasks/zeroshot_gpt/detokenizer.py (core_v0.13.0), of which every result is the same, mistakes included: a
perplexity is comparable only on the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_WIKI_BEFORE = (("s '", "s'"),)
_WIKI_SIGNS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"))
_WIKI_AFTER = (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
               (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))
_PTB = ((" '", "'"), (" \n", "\n"), ("\n ", "\n"), (" n't", "n't"), (" N ", "1 "), ("$ 1", "$1"), ("# 1", "#1"))
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
# Meant for years such as ' 93, but its slashes are taken literally. Where it does match, the digit becomes the text "[0-9]".
_YEAR = re.compile("/' [0-9]/")


def wiki(text: str) -> str:
    """WikiText: joins numbers and hyphens, signs to the word before them, and what brackets and quotation marks enclose."""
    text = _YEAR.sub("/'[0-9]/", _replaced(text, _WIKI_BEFORE))
    text = _replaced(text, _WIKI_SIGNS)
    for opening, closing in _PAIRS:
        inside = rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"
        text = re.sub(inside, rf"{opening}\1{closing}", text)
    return _replaced(text, _WIKI_AFTER)


def ptb(text: str) -> str:
    """Penn Treebank."""
    return _replaced(text, _PTB)


def unchanged(text: str) -> str:
    return text


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        text = text.replace(old, new)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"none": unchanged, "wiki": wiki, "ptb": ptb, "lambada": unchanged}
