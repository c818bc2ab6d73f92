"""ROUGE-L of texts in any script, stemmed as the distillation papers report it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from torchmetrics.functional.text import rouge_score

_UNSPACED = re.compile(
    "(["
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\u1780-\u17ff"  # Burmese, Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "])"
)


def rouge_l(response: str, references: str | Sequence[str], stem: bool = True) -> float:
    """Measure ROUGE-L (F1 of the longest common subsequence of words), in [0, 1].

    Args:
        response: The text to score.
        references: One text or several; the best score counts.
        stem: Compare words of more than three letters by their Porter stems, as MiniLLM (arXiv
            2306.08543) and later papers with its evaluation code do.

    Returns:
        The score by torchmetrics; 0 where either side has no word.
    """
    texts = [references] if isinstance(references, str) else list(references)
    score = rouge_score(
        response,
        [texts],
        rouge_keys="rougeL",
        use_stemmer=stem,
        normalizer=_only_words,
        tokenizer=str.split,
    )
    return float(score["rougeL_fmeasure"])


def _only_words(text: str) -> str:
    """Return lower-case words separated by blanks; each character of an unspaced script is a word.

    On ASCII text this is the normalisation of the ``rouge_score`` package. That package drops all
    other letters, so a Chinese text scores 0 against itself.
    """
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
    return _UNSPACED.sub(r" \1 ", kept)
