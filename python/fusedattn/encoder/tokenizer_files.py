"""A folder's tokenizer: tokenizer.json, or BERT's vocab.txt; and how long a text may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusedattn.encoder.folder import read_json, write_json
from fusedattn.text import load_tokenizer

_ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BERT_TOKENS = dict(zip(_ROLES, ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True))
_ROBERTA_TOKENS = dict(zip(_ROLES, ("<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True))


def read_tokenizer(path: str | Path, longest: int) -> Any:
    """The `tokenizers.Tokenizer` of a folder, cutting texts, padding none; None where it has none.

    Texts are cut to what the folder says, which is the first of sentence_bert_config.json's
    max_seq_length, tokenizer_config.json's model_max_length and the tokenizer.json's own, and at
    most to `longest` tokens.
    """
    path = Path(path)
    settings = _optional_json(path / "tokenizer_config.json")
    sentence = _optional_json(path / "sentence_bert_config.json")
    if (path / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(path)
    elif (path / "vocab.txt").is_file():
        tokenizer = _word_piece(path / "vocab.txt", settings)
    else:
        return None
    own = (tokenizer.truncation or {}).get("max_length")
    said = sentence.get("max_seq_length") or settings.get("model_max_length") or own or longest
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(int(said), longest))
    if sentence.get("do_lower_case"):
        from tokenizers import normalizers

        lower = normalizers.Lowercase()
        others = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([lower, *others])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Any, longest: int) -> int:
    """Write tokenizer.json, and the tokenizer_config.json that `transformers` reads beside it.

    Nothing is written for None. Returns how many tokens a text is cut to, at most `longest`.
    """
    if tokenizer is None:
        return longest
    longest = min(longest, (tokenizer.truncation or {}).get("max_length", longest))
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    names = _ROBERTA_TOKENS if "<s>" in vocabulary else _BERT_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        **{role: token for role, token in names.items() if token in vocabulary},
    }
    write_json(folder / "tokenizer_config.json", settings)
    return longest


def _optional_json(file: Path) -> dict[str, Any]:
    return dict(read_json(file)) if file.is_file() else {}


def _word_piece(file: Path, settings: dict[str, Any]) -> Any:
    """BERT's tokenizer from a token a line and the settings that `transformers` keeps beside it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    tokens = file.read_text(encoding="utf-8").split("\n")
    vocabulary = {token: i for i, token in enumerate(tokens) if token}
    names = {role: _content(settings.get(role, token)) for role, token in _BERT_TOKENS.items()}
    missing = [names[role] for role in ("unk_token", "cls_token", "sep_token")]
    missing = [token for token in missing if token not in vocabulary]
    if missing:
        raise ValueError(f"path: {file} lacks the special tokens {missing}")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([t for t in names.values() if t in vocabulary])
    first, last = names["cls_token"], names["sep_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    return tokenizer


def _content(token: str | dict[str, Any]) -> str:
    """A special token's text, written as it is or as the fields of an added token."""
    return token if isinstance(token, str) else str(token["content"])
