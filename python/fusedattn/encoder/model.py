"""An encoder with its tokenizer, on disk and in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn._whole import whole_folder
from fusedattn.encoder.config import EncoderConfig
from fusedattn.encoder.folder import read_folder, write_model
from fusedattn.encoder.layers import encoder_shapes, hidden_states, infer, init_encoder
from fusedattn.encoder.names import from_disk, to_disk
from fusedattn.encoder.sentence_files import read_pooling, write_pooling
from fusedattn.encoder.tokenizer_files import read_tokenizer, write_tokenizer
from fusedattn.nn import POOLINGS, VJP, Array, Params, Rng
from fusedattn.text import Batch, fill_batches, pack, tokenize

# Inference: small enough for the caches, large enough for the matrix products.
INFERENCE_TOKENS = 4096
# Texts tokenized at a time: the tokenizer's answers are much larger than the ids kept of them.
_TOKENIZED_AT_ONCE = 10_000


class Encoder:
    """An encoder's configuration, parameters and tokenizer, and how it embeds a text.

    Parameters
    ----------
    config : EncoderConfig
    params : dict, optional
        As from `init_encoder`, which makes them, with `seed`, where they are left out.
    tokenizer : tokenizers.Tokenizer, optional
    seed : int, default 0
    pooling : str, default "mean"
        A key of `fusedattn.nn.POOLINGS`: how `encode` makes one vector of a text's hidden states.
    normalize : bool, default False
        Whether `encode` always scales that vector to length 1.
    """

    def __init__(
        self,
        config: EncoderConfig,
        params: Params | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        pooling: str = "mean",
        normalize: bool = False,
    ) -> None:
        check_pooling(pooling)
        self.config = config
        self.params = params or init_encoder(np.random.default_rng(seed), config)
        self.tokenizer = tokenizer
        self.pooling, self.normalize = pooling, normalize

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Hidden states (T, hidden_size) and their vjp; see `fusedattn.encoder.hidden_states`."""
        return hidden_states(self.params, self.config, batch.ids, batch.cu_seqlens, rng)

    def infer(self, batch: Batch) -> Array:
        """The hidden states of `forward`, without dropout and without what a vjp needs."""
        return infer(self.params, self.config, batch.ids, batch.cu_seqlens)

    def encode(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        normalize_embeddings: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Array:
        """One vector for each text.

        Parameters
        ----------
        texts : sequence of str
            Each is cut to the longest that the tokenizer lets through.
        batch_size : int, default 32
            Texts at a time; fewer where they are long. Neighbours in length go together, though
            nothing is padded: a batch's work is then spread evenly over the threads.
        normalize_embeddings : bool, default False
            Scale each vector to length 1, as happens anyway where `normalize` is True.
        show_progress_bar : bool, optional
            By default, where standard error is a terminal.

        Returns
        -------
        float32 array (number of texts, hidden_size)
            In the order of `texts`. A text's vector has the same bits whatever the others are.

        Raises
        ------
        TypeError
            For a single str.
        ValueError
            Without a tokenizer, or for a `batch_size` below 1.
        """
        out = np.empty((len(texts), self.config.hidden_size), np.float32)
        for chosen, batch in self.batches(texts, batch_size, show_progress_bar):
            pooled = POOLINGS[self.pooling]({}, self.infer(batch), batch.cu_seqlens)[0]
            if self.normalize or normalize_embeddings:  # no dot, whose bits depend on the CPU
                length = np.sqrt(np.square(pooled).sum(axis=1, keepdims=True))
                pooled = pooled / np.maximum(length, 1e-12)
            out[chosen] = pooled
        return out

    def batches(
        self, texts: Sequence[str], batch_size: int, show_progress_bar: bool | None = False
    ) -> Iterator[tuple[Array, Batch]]:
        """Batches of texts of like length, the longest first, each with their places in `texts`.

        Raises
        ------
        ValueError
            Without a tokenizer, or for a `batch_size` below 1.
        """
        from tqdm import tqdm

        if self.tokenizer is None:
            raise ValueError("texts: expected a model with a tokenizer, this one has none")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        sequences: list[Array] = []
        for start in range(0, max(1, len(texts)), _TOKENIZED_AT_ONCE):
            sequences += tokenize(self.tokenizer, texts[start : start + _TOKENIZED_AT_ONCE])
        lengths = np.array([len(s) for s in sequences], np.int64)
        order = np.argsort(-lengths, kind="stable")
        hidden = None if show_progress_bar is None else not show_progress_bar
        with tqdm(total=len(sequences), disable=hidden, desc="encoding", unit="text") as bar:
            for places in fill_batches(lengths[order].tolist(), INFERENCE_TOKENS, batch_size):
                chosen = order[places]
                yield chosen, pack([sequences[i] for i in chosen])
                bar.update(len(chosen))

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `transformers` (and sentence-transformers) loads.

        config.json and model.safetensors under the names of the config's family; with a tokenizer
        also tokenizer.json and tokenizer_config.json; and sentence-transformers' files for the
        length of texts and the pooling. A folder that is there keeps its other files, and has
        complete ones at every moment.
        """
        config, prefix = self.config, self.config.family.prefix
        arrays = to_disk({"encoder": self.params}, config)
        bare = {name.removeprefix(prefix): array for name, array in arrays.items()}
        with whole_folder(path) as folder:
            write_model(folder, config.to_dict("encoder"), bare)
            longest = write_tokenizer(folder, self.tokenizer, config.max_position_embeddings)
            write_pooling(folder, self.pooling, self.normalize, config.hidden_size, longest)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Encoder:
        """Read a Hugging Face folder of a BERT, RoBERTa or DistilBERT, with or without a head.

        Weights in float16 or bfloat16 are widened to float32. Pickles are not read.

        Parameters
        ----------
        path : path
            A folder with config.json and model.safetensors; with tokenizer.json or vocab.txt, if
            it is to take text; with sentence-transformers' files, where pooling and the length of
            texts are not the default (the mean, and what the tokenizer says).

        Raises
        ------
        FileNotFoundError
            Where a file is missing.
        ValueError
            For an architecture that an encoder here does not compute, or where the parameters are
            not those that config.json implies.
        """
        return read_encoder(path, *read_folder(path))


def read_encoder(path: str | Path, content: dict[str, Any], arrays: dict[str, Array]) -> Encoder:
    """The encoder of a folder of which config.json and the arrays have been read."""
    config = EncoderConfig.from_dict(content)
    shapes = {"encoder": encoder_shapes(config)}
    params = from_disk(arrays, shapes, config, path)["encoder"]
    tokenizer = read_tokenizer(path, config.max_position_embeddings)
    pooling, normalize = read_pooling(path)
    return Encoder(config, params, tokenizer, pooling=pooling, normalize=normalize)


def check_pooling(pooling: str) -> None:
    """A ValueError unless `pooling` is one of `fusedattn.nn.POOLINGS`."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {sorted(POOLINGS)}, got {pooling!r}")
