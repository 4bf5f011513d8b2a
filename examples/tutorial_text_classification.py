"""Sentiment in the manner of the well-known Keras tutorial, with the self-attention it speaks of.

Vocabulary 10,000; embedding of 64; self-attention; average pooling; dense 64 with ReLU; dense 1
with sigmoid; Adam; binary cross-entropy; 10 epochs of batches of 32. The reviews of aclImdb
(https://ai.stanford.edu/~amaas/data/sentiment, Maas et al., ACL 2011) are what it was made for:

    python examples/tutorial_text_classification.py aclImdb

Any file or folder of two classes will do that `fusedattn finetune` reads. Without one, it tells the
docstrings of two packages of Python's standard library apart.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np

from fusedattn import nn
from fusedattn.losses import binary_cross_entropy
from fusedattn.nn import VJP, Array, Params
from fusedattn.optim import AdamW
from fusedattn.text import Batch, Dataset, label_names, read_examples, train_tokenizer

VOCABULARY, WIDTH, HEADS = 10_000, 64, 4
PACKAGES = ("asyncio", "email")  # of the standard library: about as many docstrings in each


class Model:
    """Embedding, self-attention, average pooling, dense with ReLU, dense: a logit for each text."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        std = WIDTH**-0.5  # keeps the size of what passes through
        self.params: Params = {
            "embedding": nn.init_embedding(rng, vocabulary, WIDTH, 0.05),
            "attention": nn.init_self_attention(rng, WIDTH, std),
            "hidden": nn.init_linear(rng, WIDTH, 64, std),
            "output": nn.init_linear(rng, 64, 1, std),
        }

    def forward(self, batch: Batch) -> tuple[Array, VJP]:
        """Logits (N, 1), whose sigmoid is the probability of the second class, and their vjp."""
        p = self.params
        x, embedding_vjp = nn.embedding(p["embedding"], batch.ids)
        x, attention_vjp = nn.self_attention(p["attention"], x, batch.cu_seqlens, HEADS)
        x, pool_vjp = nn.mean_pool({}, x, batch.cu_seqlens)
        x, hidden_vjp = nn.linear(p["hidden"], x)
        x, relu_vjp = nn.relu({}, x)
        logits, output_vjp = nn.linear(p["output"], x)

        def vjp(d: Array) -> tuple[Params, Array]:
            grads: Params = {}
            grads["output"], d = output_vjp(d)
            grads["hidden"], d = hidden_vjp(relu_vjp(d)[1])
            grads["attention"], d = attention_vjp(pool_vjp(d)[1])
            grads["embedding"], d = embedding_vjp(d)
            return grads, d

        return logits, vjp


class Average:
    """The mean loss and accuracy of the texts seen so far."""

    def __init__(self) -> None:
        self.loss, self.right, self.texts = 0.0, 0, 0

    def add(self, loss: float, logits: Array, labels: Array) -> None:
        """Count a batch."""
        self.loss += loss * len(labels)
        self.right += int(((logits[:, 0] > 0) == labels).sum())
        self.texts += len(labels)

    def __str__(self) -> str:
        return f"loss: {self.loss / self.texts:.4f} - accuracy: {self.right / self.texts:.4f}"


def fit(model: Model, train: Dataset, validation: Dataset, epochs: int, batch_size: int) -> None:
    """Adam for so many epochs, each followed by a line of metrics named as Keras names them."""
    adam = AdamW(model.params, betas=(0.9, 0.999), eps=1e-7, weight_decay=0.0)
    tokens = batch_size * max(len(s) for s in train.sequences)  # batches are full in sentences
    order, steps = np.random.default_rng(0), math.ceil(len(train) / batch_size)
    for epoch in range(epochs):
        started, learnt, seen = time.perf_counter(), Average(), Average()
        for batch in train.batches(tokens, batch_size, order):
            logits, vjp = model.forward(batch)
            loss, loss_vjp = binary_cross_entropy(logits, batch.labels)
            adam.step(vjp(loss_vjp(1.0))[0], learning_rate=1e-3)
            learnt.add(loss, logits, batch.labels)
        for batch in validation.batches(tokens, batch_size):
            logits, _ = model.forward(batch)
            seen.add(binary_cross_entropy(logits, batch.labels)[0], logits, batch.labels)
        print(f"Epoch {epoch + 1}/{epochs}")
        validated = str(seen).replace("loss", "val_loss").replace("accuracy", "val_accuracy")
        seconds = time.perf_counter() - started
        print(f"{steps}/{steps} - {seconds:.0f}s - {learnt} - {validated}", flush=True)


Texts = tuple[list[str], list[str]]  # and their labels


def load(data: Path | None) -> tuple[Texts, Texts]:
    """Texts to learn from and texts to validate on: all of aclImdb, or 80 and 20 % of a file."""
    if data is None:
        from fusedattn.cli._docstrings import docstring_task

        task = docstring_task()  # no file has passages on both sides
        parts = ([p for p in part if p.package in PACKAGES] for part in (task.train, task.test))
        return tuple(([p.text for p in s], [p.package for p in s]) for s in parts)
    if (data / "train").is_dir() and (data / "test").is_dir():
        parts = [read_examples(data / part) for part in ("train", "test")]
        return tuple((part.texts, part.labels) for part in parts)
    found = read_examples(data)
    order = np.random.default_rng(0).permutation(len(found.texts)).tolist()
    cut = len(order) // 5
    parts = order[cut:], order[:cut]
    return tuple(([found.texts[i] for i in s], [found.labels[i] for i in s]) for s in parts)


def main(argv: list[str] | None = None) -> None:
    """Read, train, and show what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, nargs="?", help="aclImdb, or texts of two classes")
    parser.add_argument("--epochs", type=int, default=10, help="[%(default)s]")
    parser.add_argument("--batch-size", type=int, default=32, help="[%(default)s]")
    parser.add_argument("--max-length", type=int, default=256, help="tokens [%(default)s]")
    options = parser.parse_args(argv)

    (texts, labels), (val_texts, val_labels) = load(options.data)
    names = label_names(labels)
    if len(names) != 2:
        parser.error(f"data: expected two classes, got {len(names)}")
    print(f"{len(texts):,} texts to learn from, {len(val_texts):,} to validate on: {names}")
    tokenizer = train_tokenizer(texts, VOCABULARY, max_length=options.max_length)
    train = Dataset.from_texts(tokenizer, texts, labels, names)
    validation = Dataset.from_texts(tokenizer, val_texts, val_labels, names)
    fit(Model(VOCABULARY), train, validation, options.epochs, options.batch_size)


if __name__ == "__main__":
    main()
