"""Folders of a model: config.json, model.safetensors, tokenizer.json, with BERT's parameter names.

Inside, a block has one fused projection to queries, keys and values; on disk there are three.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.nn import Array, Params, flatten, unflatten

# Ours to BERT's; {n} is the number of a block. Names that are not here are the same in both.
_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "blocks.{n}.attention.q": "encoder.layer.{n}.attention.self.query",
    "blocks.{n}.attention.k": "encoder.layer.{n}.attention.self.key",
    "blocks.{n}.attention.v": "encoder.layer.{n}.attention.self.value",
    "blocks.{n}.attention.out": "encoder.layer.{n}.attention.output.dense",
    "blocks.{n}.attention_norm": "encoder.layer.{n}.attention.output.LayerNorm",
    "blocks.{n}.feed_forward.up": "encoder.layer.{n}.intermediate.dense",
    "blocks.{n}.feed_forward.down": "encoder.layer.{n}.output.dense",
    "blocks.{n}.feed_forward_norm": "encoder.layer.{n}.output.LayerNorm",
}
_BERT_NAMES = {bert: ours for ours, bert in _NAMES.items()}


def _rename(name: str, table: Mapping[str, str]) -> str:
    stem, _, leaf = name.rpartition(".")
    number = re.search(r"(?<=\.)\d+(?=\.)", stem)
    n = number.group() if number else ""
    generic = stem.replace(f".{n}.", ".{n}.", 1) if n else stem
    return f"{table.get(generic, generic).replace('{n}', n)}.{leaf}"


def to_bert(params: Params) -> dict[str, Array]:
    """The parameters of an encoder under BERT's names."""
    arrays: dict[str, Array] = {}
    for name, array in flatten(params).items():
        if ".qkv." in name:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                arrays[_rename(name.replace(".qkv.", f".{part}."), _NAMES)] = rows
        else:
            arrays[_rename(name, _NAMES)] = array
    return arrays


def from_bert(arrays: Mapping[str, Array]) -> Params:
    """The parameters of an encoder from BERT's names, float32 and freshly allocated."""
    ours = {_rename(name, _BERT_NAMES): array for name, array in arrays.items()}
    flat: dict[str, Array] = {}
    for name, array in ours.items():
        part = re.search(r"\.attention\.([qkv])\.", name)
        if part is None:
            flat[name] = np.array(array, np.float32)
        elif part.group(1) == "q":
            parts = [ours[name.replace(".q.", f".{p}.")] for p in "qkv"]
            flat[name.replace(".q.", ".qkv.")] = np.concatenate(parts).astype(np.float32)
    return unflatten(flat)


def match_shapes(params: Params, expected: Params, path: Path) -> Params:
    """`params` in the order of `expected`, or a ValueError that says what is missing or unlike."""
    have, want = flatten(params), flatten(expected)
    missing = sorted(set(want) - set(have))
    if missing:
        raise ValueError(f"path: {path} lacks parameters that its config.json implies: {missing}")
    for name, array in want.items():
        if have[name].shape != array.shape:
            raise ValueError(
                f"path: {path} has {name} of shape {have[name].shape}, "
                f"its config.json implies {array.shape}"
            )
    return unflatten({name: have[name] for name in want})


def write_folder(
    path: str | Path, config: dict[str, Any], arrays: Mapping[str, Array], tokenizer: Any
) -> None:
    """Write the three files into `path`, made if it is not there; no tokenizer.json for None."""
    from safetensors.numpy import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, str(path / "model.safetensors"), metadata={"format": "np"})
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))


def read_folder(path: str | Path) -> tuple[dict[str, Any], dict[str, Array], Any]:
    """The config, the arrays and the tokenizer (None without a tokenizer.json) of a folder."""
    from safetensors.numpy import load_file

    from fusedattn.text import load_tokenizer

    path = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"path: expected a folder with {name}, there is none in {path}")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    arrays = load_file(str(path / "model.safetensors"))
    tokenizer = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    return config, arrays, tokenizer
