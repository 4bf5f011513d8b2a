"""Folders of a model: config.json, model.safetensors, a tokenizer.

What the arrays in them are called is the matter of names.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.nn import Array


def read_folder(path: str | Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The content of config.json and the arrays of model.safetensors."""
    path = Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"path: expected a folder with {name}, there is none in {path}")
    content = read_json(path / "config.json")
    return content, _read_arrays(path / "model.safetensors")


def read_json(file: Path) -> Any:
    """The content of a JSON file, or a ValueError that names it."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {file} is not JSON: {error}") from None


def _read_arrays(file: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, deserialize
    from safetensors.numpy import load_file

    try:
        return load_file(str(file))  # type: ignore[no-any-return]
    except SafetensorError as error:
        raise ValueError(f"path: {file} is not a whole safetensors file: {error}") from None
    except TypeError:  # bfloat16, which NumPy does not know
        read: Any = deserialize
        return {
            name: _from_bytes(view["data"], view["dtype"]).reshape(view["shape"])
            for name, view in read(file.read_bytes())
        }


def _from_bytes(data: bytes, dtype: str) -> Array:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    kind = {"F": "f", "I": "i", "U": "u", "B": "?"}[dtype[0]]
    return np.frombuffer(data, kind if kind == "?" else f"<{kind}{int(dtype[1:]) // 8}")


def write_model(folder: Path, content: dict[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.numpy import save_file

    write_json(folder / "config.json", content)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # "pt" is the layout that transformers asks for: weights (outputs, inputs), as here.
    save_file(contiguous, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, its folder made if it is not there."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
