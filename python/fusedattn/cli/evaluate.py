"""``fusedattn evaluate``: how well a classifier does on labelled texts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.cli import _chunks, _reading, _threads


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "evaluate", description="Loss, accuracy and F1 of a classifier on labelled texts."
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("data", metavar="DATA", help="a file, a folder a class, or - for stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _threads.add_option(parser)
    _reading.add_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the figures; 0."""
    from fusedattn.encoder import TextClassifier
    from fusedattn.losses import cross_entropy
    from fusedattn.metrics import accuracy, macro_f1
    from fusedattn.text import Dataset

    with _threads.limited_to(args.threads):
        model = TextClassifier.from_pretrained(args.model)
        examples = _reading.read(args.data, args)
        data = Dataset.from_texts(
            model.encoder.tokenizer, examples.texts, examples.labels, model.names
        )
        proba = np.concatenate(list(_chunks.probabilities(model, examples.texts)))
    assert data.labels is not None
    guesses = proba.argmax(axis=1)
    loss = cross_entropy(np.log(np.maximum(proba, np.finfo(proba.dtype).tiny)), data.labels)[0]
    scores = {
        "texts": len(data),
        "loss": loss,
        "accuracy": accuracy(data.labels, guesses),
        "macro_f1": macro_f1(data.labels, guesses),
    }
    classes = []
    for i, name in enumerate(model.names):
        hits = int(((guesses == i) & (data.labels == i)).sum())
        truth, said = int((data.labels == i).sum()), int((guesses == i).sum())
        precision, recall = hits / said if said else 0.0, hits / truth if truth else 0.0
        classes.append({"label": name, "texts": truth, "precision": precision, "recall": recall})
    if args.json:
        print(json.dumps({**scores, "labels": classes}))
        return 0
    width = max(32, *map(len, model.names))
    print(f"{'label':<{width}}{'texts':>7}{'precision':>11}{'recall':>9}")
    for row in classes:
        print(
            f"{row['label']:<{width}}{row['texts']:>7}{row['precision']:>11.3f}{row['recall']:>9.3f}"
        )
    print(
        f"{scores['texts']:,} texts: accuracy {100 * scores['accuracy']:.2f} %, "
        f"macro-F1 {100 * scores['macro_f1']:.2f} %, loss {loss:.4f} nats"
    )
    return 0
