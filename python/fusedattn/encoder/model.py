"""An encoder with its tokenizer, on disk and in memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.encoder.config import EncoderConfig
from fusedattn.encoder.folder import from_bert, match_shapes, read_folder, to_bert, write_folder
from fusedattn.encoder.layers import encode, init_encoder
from fusedattn.nn import VJP, Array, Params, Rng
from fusedattn.text import Batch


class Encoder:
    """An encoder's configuration, parameters and tokenizer.

    Parameters
    ----------
    config : EncoderConfig
    params : dict, optional
        As from `init_encoder`, which makes them, with `seed`, where they are left out.
    tokenizer : tokenizers.Tokenizer, optional
    seed : int, default 0
    """

    def __init__(
        self,
        config: EncoderConfig,
        params: Params | None = None,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.params = params or init_encoder(np.random.default_rng(seed), config)
        self.tokenizer = tokenizer

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Hidden states (T, hidden_size) and their vjp; see `encode`."""
        return encode(self.params, self.config, batch.ids, batch.cu_seqlens, rng)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json, model.safetensors and, with a tokenizer, tokenizer.json."""
        config = {"model_type": "bert", "architectures": ["BertModel"], **asdict(self.config)}
        write_folder(path, config, to_bert(self.params), self.tokenizer)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Encoder:
        """Read a folder written by `save_pretrained`, of an encoder or of a classifier.

        Raises
        ------
        FileNotFoundError
            Where a file is missing.
        ValueError
            Where the parameters are not those that config.json implies.
        """
        content, arrays, tokenizer = read_folder(path)
        config = EncoderConfig.from_dict(content)
        params = from_bert({name.removeprefix("bert."): a for name, a in arrays.items()})
        expected = init_encoder(np.random.default_rng(0), config)
        return cls(config, match_shapes(params, expected, Path(path)), tokenizer)
