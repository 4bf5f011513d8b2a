"""A scikit-learn classifier of texts: a small Transformer, from scratch or from a folder.

from fusedattn.integrations.sklearn import TextClassifier

model = TextClassifier(pretrained="path/to/minilm").fit(texts, labels)
model.predict(["..."])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn import encoder as _encoder
from fusedattn.encoder import Encoder, EncoderConfig
from fusedattn.nn import Array
from fusedattn.text import Dataset, train_tokenizer
from fusedattn.train import Trainer, TrainingConfig

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, check_is_fitted
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fusedattn.integrations.sklearn needs scikit-learn: pip install 'fusedattn[train]'",
        name=error.name,
    ) from None

__all__ = ["TextClassifier"]


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A Transformer encoder and a linear classifier, fitted to texts and their labels.

    From scratch it trains a tokenizer on the texts first; from a pre-trained folder it takes the
    tokenizer and the encoder there, and fine-tunes both encoder and classifier.

    Parameters
    ----------
    pretrained : path, optional
        A folder that `fusedattn.encoder.Encoder.from_pretrained` reads. The parameters from
        `vocab_size` to `dropout` are then not used.
    vocab_size : int, default 8000
        The most tokens of a new tokenizer.
    hidden_size, num_hidden_layers, num_attention_heads : int, default 128, 2 and 4
        The shape of a new encoder, whose feed-forward layers are twice as wide inside.
    dropout : float, default 0.3
        Of a new encoder.
    max_length : int, default 128
        Longer texts are cut to this many tokens.
    pooling : {"mean", "cls", "max"}, default "mean"
        How one vector is made of a text's tokens; see `fusedattn.encoder.TextClassifier`.
    epochs : int, default 10
    batch_size : int, default 32
        Texts a step.
    learning_rate : float, optional
        At its peak, before which it rises and after which it falls to 0. By default 2e-3 for a new
        encoder and 1e-4 for a pre-trained one.
    weight_decay : float, default 0.01
    class_weight : dict or "balanced", optional
        What each class counts in the loss, as everywhere in scikit-learn.
    random_state : int or numpy.random.RandomState, optional
        Of the starting weights, the order of the texts and dropout. With an int, fitting twice
        gives the same model.
    verbose : bool, default False
        Show a progress bar.

    Attributes
    ----------
    classes_ : array (number of classes,)
        The labels, sorted.
    model_ : fusedattn.encoder.TextClassifier
        What was fitted; its `save_pretrained` writes a folder.
    history_ : list of dict
        What `fusedattn.train.Trainer` recorded, an entry an epoch.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        vocab_size: int = 8000,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        dropout: float = 0.3,
        max_length: int = 128,
        pooling: str = "mean",
        epochs: int = 10,
        batch_size: int = 32,
        learning_rate: float | None = None,
        weight_decay: float = 0.01,
        class_weight: Mapping[Any, float] | str | None = None,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.pretrained = pretrained
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.dropout = dropout
        self.max_length = max_length
        self.pooling = pooling
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.class_weight = class_weight
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Sequence[str], y: Sequence[Any]) -> TextClassifier:
        """Train on texts `X` and their labels `y`, both of length N; returns self.

        Raises
        ------
        TypeError
            Where `X` is not a one-dimensional sequence of str.
        ValueError
            For no texts, labels of one class only, or another number of labels than of texts.
        KeyboardInterrupt
            After Ctrl-C, nothing being fitted.
        """
        texts = _texts(X)
        check_consistent_length(texts, y)
        check_classification_targets(y)
        classes, codes = np.unique(np.asarray(y), return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y: expected labels of at least 2 classes, got {len(classes)} class")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        weights = None
        if self.class_weight is not None:
            found = compute_class_weight(self.class_weight, classes=classes, y=np.asarray(y))
            weights = tuple(float(w) for w in found)
        names = [str(name) for name in classes.tolist()]
        model = _encoder.TextClassifier(
            self._start(texts, seed), names, seed=seed, pooling=self.pooling
        )
        rate = self.learning_rate
        if rate is None:
            rate = 2e-3 if self.pretrained is None else 1e-4
        config = TrainingConfig(
            epochs=self.epochs,
            max_sentences=self.batch_size,
            max_tokens=self.batch_size * self.max_length,
            learning_rate=rate,
            weight_decay=self.weight_decay,
            class_weights=weights,
            seed=seed,
        )
        data = Dataset.from_texts(model.encoder.tokenizer, texts, [names[i] for i in codes], names)
        result = Trainer(model, config, show_progress_bar=bool(self.verbose)).fit(data)
        if result.interrupted:
            raise KeyboardInterrupt
        self.classes_, self.model_, self.history_ = classes, model, result.history
        return self

    def predict_proba(self, X: Sequence[str]) -> Array:
        """Probabilities (N, number of classes), float32, columns in the order of `classes_`."""
        check_is_fitted(self)
        return self.model_.predict_proba(_texts(X, empty=True), self.batch_size)

    def predict(self, X: Sequence[str]) -> Array:
        """The likeliest label of each text, an array (N,) of the labels' own type."""
        likeliest = self.predict_proba(X).argmax(axis=1)
        return np.asarray(self.classes_[likeliest])

    def _start(self, texts: list[str], seed: int) -> Encoder:
        if self.pretrained is not None:
            encoder = Encoder.from_pretrained(self.pretrained)
            if encoder.tokenizer is None:
                raise ValueError(
                    f"pretrained: expected a folder with a tokenizer, {self.pretrained} has none"
                )
            longest = min(self.max_length, encoder.config.max_position_embeddings)
            encoder.tokenizer.enable_truncation(longest)
            return encoder
        tokenizer = train_tokenizer(texts, self.vocab_size, max_length=self.max_length)
        config = EncoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=2 * self.hidden_size,
            hidden_act="gelu_new",
            hidden_dropout_prob=self.dropout,
            max_position_embeddings=self.max_length,
            initializer_range=0.05,
            norm_first=True,
        )
        return Encoder(config, tokenizer=tokenizer, seed=seed)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


def _texts(X: Any, empty: bool = False) -> list[str]:
    """`X` as a list of str, or an error that says what it is instead."""
    if isinstance(X, (str, bytes)) or getattr(X, "ndim", 1) != 1:
        shape = getattr(X, "shape", None)
        what = f"an array of shape {shape}" if shape is not None else f"one {type(X).__name__}"
        raise TypeError(f"X: expected a one-dimensional sequence of str, got {what}")
    texts = list(X)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"X: expected str, got {type(text).__name__} at {i}")
    if not texts and not empty:
        raise ValueError("X: expected at least 1 text, got none")
    return texts
