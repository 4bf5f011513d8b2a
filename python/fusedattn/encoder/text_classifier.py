"""A classifier of texts on top of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn import nn
from fusedattn._whole import whole_folder
from fusedattn.encoder.config import EncoderConfig
from fusedattn.encoder.folder import read_folder, write_model
from fusedattn.encoder.model import Encoder, check_pooling, read_encoder
from fusedattn.encoder.names import from_disk, names_on_disk, to_disk
from fusedattn.encoder.tokenizer_files import write_tokenizer
from fusedattn.nn import VJP, Array, Params, Rng, Shapes
from fusedattn.text import Batch

_POOLER_ACTS = {"tanh": nn.tanh, "relu": nn.relu}


class TextClassifier:
    """An encoder, one vector for each text, dropout, and a linear classifier.

    With the pooling "cls" it is BERT's classification head: a linear layer ``pooler`` and tanh come
    before the classifier (RoBERTa's and DistilBERT's, with the encoder of one of those). Only such
    a classifier has a counterpart in `transformers`, which then gives the same logits.

    Parameters
    ----------
    encoder : Encoder
    names : sequence of str
        The labels, in the order of the logits.
    classifier : dict, optional
        As from `fusedattn.nn.init_linear`, which makes it, with `seed`, where it is left out.
    seed : int, default 0
        Of the classifier's and the pooler's starting weights.
    pooling : str, default "mean"
        "mean" or "max" over each text's tokens, or "cls", the first token.
    """

    def __init__(
        self,
        encoder: Encoder,
        names: Sequence[str],
        classifier: Params | None = None,
        seed: int = 0,
        pooling: str = "mean",
    ) -> None:
        check_pooling(pooling)
        self.encoder = encoder
        self.names = list(names)
        self.pooling = pooling
        shapes = _head_shapes(encoder.config, len(self.names), pooling)
        head = nn.draw(np.random.default_rng(seed), shapes, encoder.config.initializer_range)
        self.params: Params = {"encoder": encoder.params, **head}
        if classifier is not None:
            self.params["classifier"] = classifier

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Logits (N, number of labels) and their vjp; dropout where an `rng` is given."""
        hidden, encoder_vjp = self.encoder.forward(batch, rng)
        logits, head_vjp = self._head(hidden, batch.cu_seqlens, rng)

        def vjp(dlogits: Array) -> tuple[Params, Array]:
            dhead, dhidden = head_vjp(dlogits)
            dencoder, nothing = encoder_vjp(dhidden)
            return {"encoder": dencoder, **dhead}, nothing

        return logits, vjp

    def infer(self, batch: Batch) -> Array:
        """The logits of `forward`, without dropout and without what a vjp needs."""
        return self._head(self.encoder.infer(batch), batch.cu_seqlens, None)[0]

    def _head(self, hidden: Array, cu_seqlens: Array, rng: Rng | None) -> tuple[Array, VJP]:
        config = self.encoder.config
        x, pool_vjp = nn.POOLINGS[self.pooling]({}, hidden, cu_seqlens)
        if self.pooling == "cls":
            x, pooler_vjp = nn.linear(self.params["pooler"], x)
            x, act_vjp = _POOLER_ACTS[config.family.pooler_act]({}, x)
        x, drop_vjp = nn.dropout({}, x, config.hidden_dropout_prob, rng)
        logits, classifier_vjp = nn.linear(self.params["classifier"], x)

        def vjp(dlogits: Array) -> tuple[Params, Array]:
            grads: Params = {}
            grads["classifier"], dx = classifier_vjp(dlogits)
            _, dx = drop_vjp(dx)
            if self.pooling == "cls":
                grads["pooler"], dx = pooler_vjp(act_vjp(dx)[1])
            return grads, pool_vjp(dx)[1]

        return logits, vjp

    def predict_proba(self, texts: Sequence[str], batch_size: int = 32) -> Array:
        """Probabilities (number of texts, number of labels), float32, in the order given."""
        proba = np.empty((len(texts), len(self.names)), np.float32)
        for chosen, batch in self.encoder.batches(texts, batch_size):
            proba[chosen] = _softmax(self.infer(batch))
        return proba

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text."""
        return [self.names[i] for i in self.predict_proba(texts).argmax(axis=1)]

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and, with a tokenizer, its files.

        With the pooling "cls", `transformers` loads the folder as a classifier that gives the same
        logits. It has no classifier for the other poolings, of which config.json says ``pooling``:
        it loads the encoder, and the array ``classifier.weight`` is for this class.
        """
        config = self.encoder.config
        content = {
            **config.to_dict("classifier" if self.pooling == "cls" else "encoder"),
            "pooling": self.pooling,
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": {name: i for i, name in enumerate(self.names)},
        }
        with whole_folder(path) as folder:
            write_model(folder, content, to_disk(self.params, config))
            write_tokenizer(folder, self.encoder.tokenizer, config.max_position_embeddings)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> TextClassifier:
        """Read a folder of `save_pretrained`, or of a classifier of `transformers`.

        Errors are those of `Encoder.from_pretrained`; a folder without a classifier is a
        ValueError, and so is one that is not for choosing one label of several.
        """
        content, arrays = read_folder(path)
        encoder = read_encoder(path, content, arrays)
        pooling = content.get("pooling", "cls")
        weight = arrays.get(names_on_disk("classifier.weight", encoder.config)[0])
        if weight is None:
            raise ValueError(f"path: expected a folder of a classifier, {path} has no classifier")
        names = _label_names(content, len(weight))
        model = cls(encoder, names, pooling=pooling)
        shapes = _head_shapes(encoder.config, len(names), pooling)
        model.params |= from_disk(arrays, shapes, encoder.config, path)
        return model


def _head_shapes(config: EncoderConfig, classes: int, pooling: str) -> Shapes:
    width = config.hidden_size
    head = {"classifier": nn.linear_shapes(width, classes)}
    if pooling == "cls":
        head["pooler"] = nn.linear_shapes(width, width)
    return head


def _label_names(content: dict[str, Any], count: int) -> list[str]:
    """The labels that config.json names, or those that `transformers` makes up for it."""
    kind = content.get("problem_type") or "single_label_classification"
    if kind != "single_label_classification" or count < 2:
        raise ValueError(
            f"problem_type: expected single_label_classification with at least 2 labels, "
            f"got {kind} with {count}"
        )
    labels = content.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    if len(labels) != count:
        raise ValueError(
            f"id2label: expected {count} labels, as model.safetensors has, got {len(labels)}"
        )
    return [labels[str(i)] for i in range(count)]


def _softmax(logits: Array) -> Array:
    p: Array = logits - logits.max(axis=1, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=1, keepdims=True)
    return p
