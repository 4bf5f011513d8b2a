"""What embedding texts costs: `Encoder.encode` beside the same model in PyTorch.

    python benchmarks/encode.py MODEL TEXTS

MODEL is a folder that `Encoder.from_pretrained` reads, TEXTS a file that `fusedattn encode` reads.
The contenders are `transformers` (batches of 32 sorted by their count of tokens, padded, inference
mode) and, where it is installed, sentence-transformers; all use the same number of threads. They
take turns, a slice of the texts at a time; reported is the median ratio over slices and rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusedattn import get_num_threads, set_num_threads
from fusedattn.bench.surroundings import blas_threads, surroundings
from fusedattn.encoder import Encoder
from fusedattn.nn import Array
from fusedattn.text import read_examples

Embed = Callable[[list[str]], Array]
BATCH = 32


def transformers_embed(path: Path, encoder: Encoder) -> Embed:
    """The same model on PyTorch, mean pooling, batches of texts with like counts of tokens."""
    import torch
    import transformers

    if encoder.pooling != "mean":
        raise ValueError(f"MODEL: expected one with mean pooling, got {encoder.pooling}")
    model = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    longest = encoder.tokenizer.truncation["max_length"]

    def embed(texts: list[str]) -> Array:
        ids = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = np.empty((len(ids), encoder.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                batch = {"input_ids": [ids[i] for i in chosen]}
                batch = tokenizer.pad(batch, return_tensors="pt")
                hidden = model(**batch).last_hidden_state
                seen = batch["attention_mask"][..., None].float()
                pooled = (hidden * seen).sum(1) / seen.sum(1)
                if encoder.normalize:
                    pooled = torch.nn.functional.normalize(pooled)
                out[chosen] = pooled.numpy()
        return out

    return embed


def sentence_transformers_embed(path: Path) -> Embed:
    """The same model in sentence-transformers."""
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("texts", type=Path, metavar="TEXTS")
    parser.add_argument("--count", type=int, default=2000, help="texts [%(default)s]")
    parser.add_argument("--slices", type=int, default=4, help="of them [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=get_num_threads(), help="[%(default)s]")
    options = parser.parse_args()

    set_num_threads(options.threads)
    texts = read_examples(options.texts).texts[: options.count]
    encoder = Encoder.from_pretrained(options.model)
    tokens = sum(len(e.ids) for e in encoder.tokenizer.encode_batch(texts))
    embed: dict[str, Embed] = {"fusedattn": lambda t: encoder.encode(t, BATCH, False, False)}
    if importlib.util.find_spec("transformers"):
        import torch

        torch.set_num_threads(options.threads)
        embed["transformers"] = transformers_embed(options.model, encoder)
    if importlib.util.find_spec("sentence_transformers"):
        embed["sentence-transformers"] = sentence_transformers_embed(options.model)
    about = surroundings(options.threads)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{len(texts)} texts, {tokens} tokens")

    slices = [texts[i :: options.slices] for i in range(options.slices)]
    seconds: dict[str, list[float]] = {name: [] for name in embed}
    with blas_threads(options.threads):
        ours = encoder.encode(slices[0], BATCH, False, False)
        for name, contender in embed.items():  # also warms each up
            apart = float(np.abs(contender(slices[0]) - ours).max())
            if apart > 1e-5:
                raise RuntimeError(f"{name}: expected the same embeddings, got {apart:.1e} apart")
        for _ in range(options.rounds):
            for part in slices:
                for name, contender in embed.items():
                    started = time.perf_counter()
                    contender(part)
                    seconds[name].append(time.perf_counter() - started)
    for name, taken in seconds.items():
        rate = options.rounds * tokens / sum(taken)
        ratio = np.median(np.array(taken) / seconds["fusedattn"])
        print(f"{name:22} {rate:>8,.0f} tokens/s   fusedattn is {ratio:.2f}x as fast")


if __name__ == "__main__":
    main()
