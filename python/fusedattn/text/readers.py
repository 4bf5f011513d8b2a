"""Texts and labels from files: csv, tsv, JSON lines, a folder a class, text<TAB>label, TREC.

A file is UTF-8 unless said otherwise. A row that is not as it should be (too few fields or too
many, no text, no label, bytes that are no text) is an error that names the file and the line, or is
skipped and counted. Lines that are empty or all white space are passed over. Where empty texts are
wanted, as in prediction, a row without text is as good as any other, and so is an empty line where
a line is a text: what comes out then agrees with what went in, line by line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

TEXT_COLUMNS = ("text", "sentence", "content", "title", "review")
LABEL_COLUMNS = ("label", "category", "class", "target")
# Of aclImdb: its folder of texts without a label, and how its lists of web addresses begin.
UNLABELLED, ADDRESSES = "unsup", "urls_"

Row = tuple[int, str, str | None]  # line, text, label


@dataclass
class Examples:
    """What a file held.

    Attributes
    ----------
    texts : list of str
    labels : list of str
        Empty where labels were not asked for.
    skipped : list of str
        What was wrong with each row that was left out.
    """

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class RowError(ValueError):
    """A row that is not as it should be."""


def read_examples(
    path: str | Path,
    *,
    format: str | None = None,
    labelled: bool = True,
    empty: bool = False,
    text_column: str | None = None,
    label_column: str | None = None,
    encoding: str = "utf-8",
    skip_bad_rows: bool = False,
) -> Examples:
    """Read texts, and their labels, from a file, a folder or, for "-", standard input.

    Parameters
    ----------
    path : str or path
    format : str, optional
        By default by the file's ending, "tab" for any other (labelled) or "lines" (not).

        - "csv": a header, commas, quoted where need be.
        - "tsv": a header, tabs, quotes meaning nothing.
        - "jsonl": an object a line (.jsonl, .ndjson, .json).
        - "folder": a folder a class, a text a file ending in .txt, as in aclImdb, of which the
          folder "unsup" is no class. Unlabelled: every .txt file, at any depth, but for aclImdb's
          lists of web addresses ("urls_pos.txt").
        - "tab": text, a tab, label; no header. The text may hold tabs.
        - "trec": label, colon, finer label, space, text. The finer label is left out.
        - "lines": a text a line; no labels.
    labelled : bool, default True
        Whether labels are wanted.
    empty : bool, default False
        Whether empty texts are wanted.
    text_column, label_column : str, optional
        For csv, tsv and jsonl. By default the first that is there of "text", "sentence", "content",
        "title", "review", and of "label", "category", "class", "target".
    encoding : str, default "utf-8"
        A byte order mark is passed over.
    skip_bad_rows : bool, default False
        Leave out what is not as it should be, and say so in `Examples.skipped`.

    Raises
    ------
    ValueError
        For a bad row, naming the file and the line; for an unknown format, column or
        encoding; for a file without a row.
    """
    where = "standard input" if str(path) == "-" else str(path)
    kind = format or _format_of(Path(path), labelled)
    if kind not in (*_READERS, "folder"):
        raise ValueError(f"format: expected one of {[*_READERS, 'folder']}, got {kind!r}")
    if labelled and kind == "lines":
        raise ValueError("format: expected one with labels, 'lines' has none")
    try:
        codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(f"encoding: expected one that Python knows, got {encoding!r}") from error
    examples = Examples()

    def bad(line: int, reason: str) -> None:
        place = f"{where}, line {line}: {reason}" if line else reason
        if not skip_bad_rows:
            raise ValueError(place)
        examples.skipped.append(place)

    if kind == "folder":
        rows: Iterator[Row] = _read_folder(Path(path), labelled, empty, encoding, bad)
    else:
        columns = (text_column, label_column if labelled else "")
        reader = _read_all_lines if kind == "lines" and empty else _READERS[kind]
        rows = _read_file(path, reader, columns, encoding, bad)
    for line, text, label in rows:
        problem = _problem(text, label, labelled, empty)
        if problem:
            bad(line, problem)
            continue
        examples.texts.append(text)
        if labelled:
            examples.labels.append(str(label).strip())
    if not examples.texts:
        raise ValueError(f"{where}: expected at least one text, got none")
    return examples


def label_names(labels: Iterable[str]) -> list[str]:
    """The different labels, sorted; a ValueError for fewer than two."""
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"labels: expected at least two different ones, got {names}")
    return names


def _format_of(path: Path, labelled: bool) -> str:
    if path.is_dir():
        return "folder"
    endings = {
        ".csv": "csv",
        ".tsv": "tsv",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "jsonl",
    }
    return endings.get(path.suffix.lower(), "tab" if labelled else "lines")


def _problem(text: str, label: str | None, labelled: bool, empty: bool) -> str | None:
    try:
        (text + (label or "")).encode()
    except UnicodeEncodeError:
        return "expected text in the encoding given (UTF-8 by default), got other bytes"
    if not empty and not text.strip():
        return "expected a text, got none"
    if labelled and not (label or "").strip():
        return "expected a label, got none"
    return None


def _read_file(
    path: str | Path,
    reader: Callable[..., Iterator[Row | RowError]],
    columns: tuple[str | None, str | None],
    encoding: str,
    bad: Callable[[int, str], None],
) -> Iterator[Row]:
    """The rows of a file; bytes that do not decode become lone surrogates, as `_problem` sees."""
    if encoding.lower().replace("-", "").replace("_", "") == "utf8":
        encoding = "utf-8-sig"
    if str(path) == "-":
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")  # type: ignore[union-attr]
        yield from _good(reader(sys.stdin, *columns), bad)
        return
    with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
        yield from _good(reader(file, *columns), bad)


def _good(rows: Iterator[Row | RowError], bad: Callable[[int, str], None]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, RowError):
            bad(*row.args)
        else:
            yield row


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _read_lines(file: TextIO, *_: Any) -> Iterator[Row]:
    for number, line in _lines(file):
        yield number, line, None


def _read_all_lines(file: TextIO, *_: Any) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        yield number, line.rstrip("\r\n"), None


def _read_tab(file: TextIO, text: Any, label: str | None) -> Iterator[Row | RowError]:
    for number, line in _lines(file):
        before, tab, after = line.rpartition("\t")
        if tab:
            yield number, before, after
        else:
            yield RowError(number, f"expected text, a tab and a label, got {_start(line)}")


def _read_trec(file: TextIO, text: Any, label: str | None) -> Iterator[Row | RowError]:
    for number, line in _lines(file):
        kind, space, question = line.partition(" ")
        coarse, colon, _ = kind.partition(":")
        if space and colon:
            yield number, question, coarse
        else:
            yield RowError(number, f"expected LABEL:finer and a text, got {_start(line)}")


def _read_jsonl(file: TextIO, text: str | None, label: str | None) -> Iterator[Row | RowError]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield RowError(number, f"expected a JSON object, got {_start(line)} ({error.msg})")
            continue
        if not isinstance(row, dict):
            yield RowError(number, f"expected a JSON object, got {_start(line)}")
            continue
        keys = _column(row, text, TEXT_COLUMNS), _column(row, label, LABEL_COLUMNS)
        if keys[0] is None or (keys[1] is None and label != ""):
            yield RowError(number, _no_column(row, text, label))
            continue
        content, kind = row[keys[0]], row[keys[1]] if keys[1] is not None else None
        if not isinstance(content, str) or isinstance(kind, dict | list | float):
            yield RowError(number, f"expected a text and a label, got {_start(line)}")
            continue
        yield number, content, None if kind is None else str(kind)


def _read_table(
    file: TextIO, text: str | None, label: str | None, **dialect: Any
) -> Iterator[Row | RowError]:
    rows = csv.reader(file, strict=True, **dialect)
    header = next(rows, [])
    keys = _column(header, text, TEXT_COLUMNS), _column(header, label, LABEL_COLUMNS)
    if keys[0] is None or (keys[1] is None and label != ""):
        raise ValueError(f"{file.name}, line 1: {_no_column(header, text, label)}")
    places = [header.index(key) for key in keys if key is not None]
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowError(number, f"expected a row of a table, got {error}")
            continue
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            yield RowError(number, f"expected {len(header)} fields, got {len(row)}")
            continue
        yield number, row[places[0]], row[places[1]] if len(places) == 2 else None


def _read_csv(file: TextIO, text: str | None, label: str | None) -> Iterator[Row | RowError]:
    with _long_fields():
        yield from _read_table(file, text, label)


def _read_tsv(file: TextIO, text: str | None, label: str | None) -> Iterator[Row | RowError]:
    with _long_fields():
        yield from _read_table(file, text, label, delimiter="\t", quoting=csv.QUOTE_NONE)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a field: a text may be a book."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_folder(
    path: Path, labelled: bool, empty: bool, encoding: str, bad: Callable[[int, str], None]
) -> Iterator[Row]:
    if labelled:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name != UNLABELLED)
        files = [(p, folder.name) for folder in folders for p in sorted(folder.glob("*.txt"))]
    else:
        found = sorted(path.rglob("*.txt"))
        files = [(p, "") for p in found if not p.name.startswith(ADDRESSES)]
    if not files:
        raise ValueError(f"{path}: expected a folder a class with .txt files, there are none")
    for file, label in files:
        text = file.read_text(encoding, errors="surrogateescape").removeprefix("\ufeff")
        problem = _problem(text, label, labelled, empty)
        if problem:
            bad(0, f"{file}: {problem}")
        else:
            yield 0, text, label


def _column(names: Iterable[str], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    if wanted == "":
        return None
    names = list(names)
    return next((name for name in ((wanted,) if wanted else usual) if name in names), None)


def _no_column(names: Iterable[str], text: str | None, label: str | None) -> str:
    texts = repr(text) if text else f"one of {list(TEXT_COLUMNS)}"
    labels = repr(label) if label else f"one of {list(LABEL_COLUMNS)}"
    what = f"a column {texts}" if label == "" else f"columns {texts} and {labels}"
    return f"expected {what}, got {list(names)}"


def _start(line: str) -> str:
    return ascii(line if len(line) <= 40 else line[:40] + "...")


_READERS: dict[str, Callable[..., Iterator[Row | RowError]]] = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "tab": _read_tab,
    "trec": _read_trec,
    "lines": _read_lines,
}
