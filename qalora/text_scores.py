"""How right an answer is, by its text: exact match and ROUGE-L, each against the best of its references. Torch-free.

Both are in percent, so that the mean over the rows is the figure that is reported.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

Normalize = Literal["numbers"]

# Scripts that put no blanks between words: each of their letters counts as a word.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def exact_match(
    answer: str, references: Sequence[str], pattern: str | None = None, normalize: Normalize | None = None
) -> float:
    """100 where the answer equals one of the references, white space around them aside, else 0.

    Args:
        pattern: regular expression; the first group of its first match is compared. An answer without a match is wrong.
        normalize: numbers: compared without commas, blanks, dollar signs and a full stop at the end, as GSM8K is
            scored.
    """
    found = compared(answer, pattern, normalize)
    return 100.0 * (found is not None and any(found == compared(text, pattern, normalize) for text in references))


def said(answer: str, references: Sequence[str], prompt: str = "") -> str:
    """What an answer says after its thought; all of it where a reference has a thought too.

    Args:
        prompt: what the model was asked to go on from: it may have begun a thought, and an answer that never closes it
            says nothing.
    """
    opened = re.search(r"<(\w+)>\s*$", prompt)
    end = f"</{opened[1] if opened else 'think'}>"
    if any(end in reference for reference in references):
        return answer
    _, closed, rest = answer.rpartition(end)
    return rest if closed or not opened else ""


def compared(text: str, pattern: str | None, normalize: Normalize | None) -> str | None:
    """The part of a text that exact match compares; None where the pattern does not match."""
    if pattern is not None:
        match = re.search(pattern, text)
        if match is None or match[1] is None:
            return None
        text = match[1]
    if normalize == "numbers":
        text = re.sub(r"[\s,$]", "", text).removesuffix(".")
    return text.strip()


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, in percent: the rouge_score library's, over `words`, without
    stemming.

    Texts without a word, such as "!" or "🙂", score 100 where they are equal, and 0 otherwise.
    """
    best = 100 * _scorer().score_multi(list(references), answer)["rougeL"].fmeasure
    wordless = [text.strip() for text in references if not words(text)]
    return 100.0 if answer.strip() in wordless else best


def words(text: str) -> list[str]:
    """Runs of letters, digits and the marks on them, in lower case; letters of `UNSPACED` scripts one by one.

    Of ASCII texts these are rouge_score's own words. Composed and decomposed accents are the same, full-width forms
    too.
    """
    found: list[str] = []
    in_word = grows = False  # whether the letter before belongs to a word, and whether a letter after it would too
    for letter in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind == "M" and in_word:
            found[-1] += letter
            continue
        in_word = kind in "LN"
        alone = in_word and unicodedata.name(letter, "").split(" ")[0].split("-")[0] in UNSPACED
        if in_word and grows and not alone:
            found[-1] += letter
        elif in_word:
            found.append(letter)
        grows = in_word and not alone
    return found


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return RougeScorer(["rougeL"], tokenizer=Words())
