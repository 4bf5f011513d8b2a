"""How good a model is, without dropout."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedattn.losses import cross_entropy
from fusedattn.metrics import accuracy, macro_f1
from fusedattn.text import IGNORE, Dataset, Masking
from fusedattn.train.model import Model


def evaluate(
    model: Model, data: Dataset, max_tokens: int = 4096, max_sentences: int = 256
) -> dict[str, float]:
    """Loss (nats), accuracy and macro-F1 of a model on labelled sequences."""
    if data.labels is None:
        raise ValueError("data: expected labelled sequences, got none of the labels")
    loss, predicted = 0.0, []
    for batch in data.batches(max_tokens, max_sentences):
        logits, _ = model.forward(batch)
        loss += cross_entropy(logits, batch.labels)[0] * len(batch)
        predicted.append(logits.argmax(axis=1))
    guesses = np.concatenate(predicted) if predicted else np.empty(0, int)
    return {
        "loss": loss / max(1, len(data)),
        "accuracy": accuracy(data.labels, guesses),
        "macro_f1": macro_f1(data.labels, guesses),
    }


def evaluate_masked(
    model: Model,
    data: Dataset,
    masking: Masking,
    max_tokens: int = 4096,
    max_sentences: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Loss (nats), perplexity and accuracy of a masked language model at the chosen tokens.

    Parameters
    ----------
    model : Model
        One whose logits are those of the labels that are not `fusedattn.text.IGNORE`.
    data : Dataset
    masking : fusedattn.text.Masking
    max_tokens, max_sentences : int, default 4096 and 256
        What a batch may hold.
    seed : int, default 0
        Of the choice of tokens: the same ones every time.
    """
    rng: Any = np.random.default_rng(seed)
    loss, hits, count = 0.0, 0, 0
    for batch in data.batches(max_tokens, max_sentences):
        masked = masking(batch, rng)
        labels = masked.labels[masked.labels != IGNORE]
        if len(labels):
            logits, _ = model.forward(masked)
            loss += cross_entropy(logits, labels)[0] * len(labels)
            hits += int((logits.argmax(axis=1) == labels).sum())
            count += len(labels)
    mean = loss / count if count else float("nan")
    share = hits / count if count else float("nan")
    return {"loss": mean, "perplexity": float(np.exp(min(mean, 700.0))), "accuracy": share}
