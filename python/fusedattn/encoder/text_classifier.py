"""A classifier of texts on top of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fusedattn import nn
from fusedattn.encoder.folder import read_folder, to_bert, write_folder
from fusedattn.encoder.model import Encoder
from fusedattn.nn import VJP, Array, Params, Rng
from fusedattn.text import Batch, fill_batches, pack, tokenize

# Inference: small enough for the caches, large enough for the matrix products.
PREDICT_TOKENS, PREDICT_SENTENCES = 4096, 256


class TextClassifier:
    """An encoder, the mean over each text's tokens, dropout, and a linear classifier.

    Parameters
    ----------
    encoder : Encoder
    names : sequence of str
        The labels, in the order of the logits.
    classifier : dict, optional
        As from `fusedattn.nn.init_linear`, which makes it, with `seed`, where it is left out.
    seed : int, default 0
    """

    def __init__(
        self,
        encoder: Encoder,
        names: Sequence[str],
        classifier: Params | None = None,
        seed: int = 0,
    ) -> None:
        self.encoder = encoder
        self.names = list(names)
        if classifier is None:
            config, rng = encoder.config, np.random.default_rng(seed)
            classifier = nn.init_linear(
                rng, config.hidden_size, len(self.names), config.initializer_range
            )
        self.params: Params = {"encoder": encoder.params, "classifier": classifier}

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Logits (N, number of labels) and their vjp; dropout where an `rng` is given."""
        hidden, encoder_vjp = self.encoder.forward(batch, rng)
        pooled, pool_vjp = nn.mean_pool({}, hidden, batch.cu_seqlens)
        pooled, drop_vjp = nn.dropout({}, pooled, self.encoder.config.hidden_dropout_prob, rng)
        logits, classifier_vjp = nn.linear(self.params["classifier"], pooled)

        def vjp(dlogits: Array) -> tuple[Params, Array]:
            dclassifier, dpooled = classifier_vjp(dlogits)
            dencoder, nothing = encoder_vjp(pool_vjp(drop_vjp(dpooled)[1])[1])
            return {"encoder": dencoder, "classifier": dclassifier}, nothing

        return logits, vjp

    def predict_proba(self, texts: Sequence[str]) -> Array:
        """Probabilities (number of texts, number of labels), float32, in the order given."""
        if self.encoder.tokenizer is None:
            raise ValueError("texts: expected a model with a tokenizer, this one has none")
        sequences = tokenize(self.encoder.tokenizer, texts)
        proba = np.empty((len(sequences), len(self.names)), np.float32)
        lengths = [len(s) for s in sequences]
        for chosen in fill_batches(lengths, PREDICT_TOKENS, PREDICT_SENTENCES):
            logits, _ = self.forward(pack([sequences[i] for i in chosen]))
            proba[chosen] = _softmax(logits)
        return proba

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text."""
        return [self.names[i] for i in self.predict_proba(texts).argmax(axis=1)]

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and, with a tokenizer, tokenizer.json."""
        config = {
            "model_type": "bert",
            "architectures": ["BertForSequenceClassification"],
            **asdict(self.encoder.config),
            "pooling": "mean",
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {name: i for i, name in enumerate(self.names)},
        }
        arrays = {f"bert.{name}": a for name, a in to_bert(self.encoder.params).items()}
        arrays |= {f"classifier.{name}": a for name, a in self.params["classifier"].items()}
        write_folder(path, config, arrays, self.encoder.tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TextClassifier:
        """Read a folder written by `save_pretrained`; errors as in `Encoder.from_pretrained`."""
        content, arrays, _ = read_folder(path)
        labels = content.get("id2label")
        if not labels or "classifier.weight" not in arrays:
            raise ValueError(f"path: expected a folder of a classifier, {path} has no classifier")
        classifier = {
            name: np.array(arrays[f"classifier.{name}"], np.float32) for name in ("weight", "bias")
        }
        names = [labels[str(i)] for i in range(len(labels))]
        return cls(Encoder.from_pretrained(path), names, classifier)


def _softmax(logits: Array) -> Array:
    p: Array = logits - logits.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return p
