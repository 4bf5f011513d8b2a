"""The files with which sentence-transformers says how hidden states become an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedattn.encoder.folder import read_json, write_json
from fusedattn.nn import POOLINGS

# Their name for each pooling in 1_Pooling/config.json.
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
}
_PACKAGE = "sentence_transformers.models"


def read_pooling(path: str | Path) -> tuple[str, bool]:
    """The pooling of a folder and whether its embeddings have length 1; ("mean", False) unsaid.

    Raises
    ------
    ValueError
        For modules that `Encoder.encode` does not compute.
    """
    path = Path(path)
    if not (path / "modules.json").is_file():
        return "mean", False
    pooling, normalize = "mean", False
    for module in read_json(path / "modules.json"):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling_of(path / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ValueError(
                f"path: expected Transformer, Pooling and Normalize in {path / 'modules.json'}, "
                f"got {kind}"
            )
    return pooling, normalize


def _pooling_of(file: Path) -> str:
    content = read_json(file)
    named = content.get("pooling_mode")
    if named is None:
        modes = [key for key, on in content.items() if key.startswith("pooling_mode_") and on]
        known = {flag: name for name, flag in _FLAGS.items()}
    else:
        modes = [named] if isinstance(named, str) else list(named)
        known = {name: name for name in _FLAGS}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"path: expected one of {sorted(POOLINGS)} in {file}, got {modes}")
    return known[modes[0]]


def write_pooling(folder: Path, pooling: str, normalize: bool, width: int, longest: int) -> None:
    """Write modules.json, sentence_bert_config.json and 1_Pooling/config.json."""
    names = ["", "1_Pooling", "2_Normalize"][: 3 if normalize else 2]
    modules: list[dict[str, Any]] = [
        {
            "idx": i,
            "name": str(i),
            "path": name,
            "type": f"{_PACKAGE}.{name.partition('_')[2] or 'Transformer'}",
        }
        for i, name in enumerate(names)
    ]
    flags = {flag: name == pooling for name, flag in _FLAGS.items()}
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}
    )
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **flags})
