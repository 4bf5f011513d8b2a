"""A masked language model on top of an encoder (arXiv:1810.04805)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusedattn import nn
from fusedattn._whole import whole_folder
from fusedattn.encoder.config import EncoderConfig
from fusedattn.encoder.folder import read_folder, write_model
from fusedattn.encoder.model import Encoder, read_encoder
from fusedattn.encoder.names import from_disk, to_disk
from fusedattn.encoder.tokenizer_files import write_tokenizer
from fusedattn.nn import VJP, Array, Params, Rng, Shapes
from fusedattn.text import IGNORE, Batch


class MaskedLM:
    """An encoder and a head that predicts tokens, whose last matrix is the word embedding.

    Parameters
    ----------
    encoder : Encoder
    head : dict, optional
        As from `fusedattn.nn.init_masked_lm_head`, which makes it, with `seed`, where it is left
        out.
    seed : int, default 0
    """

    def __init__(self, encoder: Encoder, head: Params | None = None, seed: int = 0) -> None:
        self.encoder = encoder
        config = encoder.config
        if head is None:
            rng = np.random.default_rng(seed)
            head = nn.draw(rng, _head_shapes(config), config.initializer_range)
        self.params: Params = {"encoder": encoder.params, "head": head}

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Logits of the tokens to be predicted, and their vjp; dropout where an `rng` is given.

        Parameters
        ----------
        batch : Batch
            With labels (T,), -100 where nothing is to be predicted; without labels, every token's
            logits are given.
        rng : numpy.random.Generator, optional

        Returns
        -------
        logits : array (M, vocab_size)
            In the order of the M tokens with another label than -100.
        vjp : callable
            dlogits -> (dparams, an empty array).
        """
        config = self.encoder.config
        rows = np.flatnonzero(batch.labels != IGNORE) if len(batch.labels) else None
        word = self.encoder.params["embeddings"]["word"]
        learns = nn.learns(word)
        hidden, encoder_vjp = self.encoder.forward(batch, rng)
        logits, head_vjp = nn.masked_lm_head(
            self.params["head"],
            hidden,
            word["weight"],
            rows,
            activation=config.head_act,
            eps=config.layer_norm_eps,
            learn_weight=learns,
        )

        def vjp(dlogits: Array) -> tuple[Params, Array]:
            dhead, dhidden, dword = head_vjp(dlogits)
            dencoder, nothing = encoder_vjp(dhidden)
            if learns:
                dencoder["embeddings"]["word"]["weight"] += dword
            return {"encoder": dencoder, "head": dhead}, nothing

        return logits, vjp

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `transformers` loads as a masked language model.

        The word embedding is written once, as `transformers` writes tied weights.
        """
        config = self.encoder.config
        with whole_folder(path) as folder:
            write_model(folder, config.to_dict("masked_lm"), to_disk(self.params, config))
            write_tokenizer(folder, self.encoder.tokenizer, config.max_position_embeddings)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> MaskedLM:
        """Read a folder of `save_pretrained`, or of a masked language model of `transformers`.

        Errors are those of `Encoder.from_pretrained`; a head that is missing, or not tied to the
        word embedding, is a ValueError.
        """
        content, arrays = read_folder(path)
        if content.get("tie_word_embeddings", True) is False:
            raise ValueError(f"tie_word_embeddings: expected True in {path}, got False")
        encoder = read_encoder(path, content, arrays)
        shapes = {"head": _head_shapes(encoder.config)}
        return cls(encoder, from_disk(arrays, shapes, encoder.config, path)["head"])


def _head_shapes(config: EncoderConfig) -> Shapes:
    return nn.masked_lm_head_shapes(config.hidden_size, config.vocab_size)
