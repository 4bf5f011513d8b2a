"""The quickstart's baseline: logistic regression on a bag of words, tuned on a part of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Weighting by tf-idf, words alone or with pairs of neighbours, and the inverse penalty C.
GRID = tuple((ngrams, c) for ngrams in (1, 2) for c in (10.0, 100.0))


def bag_of_words(ngrams: int, c: float) -> Any:
    """A scikit-learn pipeline: sublinear tf-idf of 1 to `ngrams` words, logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, ngrams)),
        LogisticRegression(C=c, max_iter=100, tol=1e-3),
    )


def tune(
    fit: tuple[Sequence[str], Sequence[str]], validation: tuple[Sequence[str], Sequence[str]]
) -> tuple[int, float]:
    """The (ngrams, C) of `GRID` that, trained on `fit`, is most accurate on `validation`.

    Both are (texts, labels).
    """
    scores = {choice: bag_of_words(*choice).fit(*fit).score(*validation) for choice in GRID}
    return max(scores, key=lambda choice: scores[choice])
