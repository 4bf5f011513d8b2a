"""The quickstart's baseline: logistic regression on a bag of words, tuned on a part of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """Words alone or pairs of neighbours too, the inverse penalty C, classes weighted alike."""

    ngrams: int
    c: float
    balanced: bool


GRID = tuple(
    Choice(ngrams, c, balanced)
    for ngrams, c in ((1, 10.0), (1, 30.0), (1, 100.0), (2, 30.0))
    for balanced in (False, True)
)


def bag_of_words(choice: Choice) -> Any:
    """A scikit-learn pipeline: sublinear tf-idf, then logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    weight = "balanced" if choice.balanced else None
    return make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, choice.ngrams)),
        LogisticRegression(C=choice.c, class_weight=weight, max_iter=100, tol=1e-3),
    )


def tune(
    fit: tuple[Sequence[str], Sequence[str]], validation: tuple[Sequence[str], Sequence[str]]
) -> Choice:
    """What of `GRID`, trained on `fit`, is most accurate on `validation`; both (texts, labels)."""
    from tqdm import tqdm

    choices: Iterable[Choice] = tqdm(GRID, desc="tuning", unit="fit", disable=None)
    return max(choices, key=lambda choice: bag_of_words(choice).fit(*fit).score(*validation))
