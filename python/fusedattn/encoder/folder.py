"""Folders of a model: config.json, model.safetensors, a tokenizer, under the names of its family.

Inside, a block has one fused projection to queries, keys and values; on disk there are three. A
position table on disk may begin with rows that no text uses; inside it does not. What a folder has
beyond the parameters that are asked for, such as a pooler or position_ids, is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.encoder.config import EncoderConfig
from fusedattn.nn import Array, Params, leaves

_POSITIONS = "encoder.embeddings.position.weight"
# Other names that a parameter may have on disk: BERT's first layer norms, and an output's bias.
_ALIASES = (
    (r"LayerNorm\.weight$", "LayerNorm.gamma"),
    (r"LayerNorm\.bias$", "LayerNorm.beta"),
    (r"^(cls\.predictions|lm_head)\.bias$", r"\1.decoder.bias"),
)


class _Blank(np.random.Generator):
    """Draws zeros."""

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return np.zeros(size, dtype)


# Stands for a random generator where only the layout of parameters is wanted.
BLANK = _Blank(np.random.PCG64(0))


def names_on_disk(name: str, config: EncoderConfig) -> list[str]:
    """The arrays which, end to end along their first axis, are the parameter `name`."""
    stem, _, leaf = name.rpartition(".")
    number = re.search(r"\.blocks\.(\d+)\.", name)
    n = number.group(1) if number else ""
    generic = stem.replace(f".{n}.", ".{n}.", 1) if n else stem
    parts = [generic[:-3] + part for part in "qkv"] if generic.endswith(".qkv") else [generic]
    prefix = config.family.prefix if name.startswith("encoder.") else ""
    names = config.family.names
    return [f"{prefix}{names[part].replace('{n}', n)}.{leaf}" for part in parts]


def to_disk(params: Params, config: EncoderConfig) -> dict[str, Array]:
    """The arrays of a folder for parameters {"encoder": ..., and those of a head}."""
    arrays: dict[str, Array] = {}
    for name, array in leaves(params):
        names = names_on_disk(name, config)
        if name == _POSITIONS:
            array = np.pad(array, ((config.unused_positions, 0), (0, 0)))
        arrays |= zip(names, np.split(array, len(names)), strict=True)
    return arrays


def from_disk(
    arrays: Mapping[str, Array], layout: Params, config: EncoderConfig, path: str | Path
) -> Params:
    """Fill `layout`, parameters of the right shapes, from a folder's arrays, widened to float32.

    Raises
    ------
    ValueError
        Where an array is missing, has another shape or does not hold real numbers.
    """
    missing: list[str] = []
    for name, target in leaves(layout):
        names = names_on_disk(name, config)
        for on_disk, part in zip(names, np.split(target, len(names)), strict=True):
            array = _find(arrays, on_disk, config.family.prefix)
            if array is None:
                missing.append(on_disk)
                continue
            unused = config.unused_positions if name == _POSITIONS else 0
            shape = (part.shape[0] + unused, *part.shape[1:])
            real = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
            if array.shape != shape or not real:
                raise ValueError(
                    f"path: {path} has {on_disk} of shape {array.shape} and {array.dtype}, "
                    f"its config.json implies {shape} and floats"
                )
            part[...] = array[unused:]
    if missing:
        raise ValueError(f"path: {path} lacks parameters that its config.json implies: {missing}")
    return layout


def _find(arrays: Mapping[str, Array], name: str, prefix: str) -> Array | None:
    for known in (name, name.removeprefix(prefix)):
        if known in arrays:
            return arrays[known]
        for pattern, other in _ALIASES:
            if (alias := re.sub(pattern, other, known)) in arrays:
                return arrays[alias]
    return None


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
