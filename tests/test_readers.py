"""Reading labelled texts: every format, every kind of bad row, and the split."""

import csv
import io

import pytest

from fusedattn.text import Examples, label_names, read_examples, split_examples

TEXTS, LABELS = ["one fine day", "two, or 三"], ["good", "bad"]
FILES = {
    "a.csv": 'text,label\none fine day,good\n\n"two, or 三",bad\n',
    "b.csv": 'id,category,text\r\n1,good,one fine day\r\n2,bad,"two, or 三"\r\n',
    "a.tsv": "label\tsentence\ngood\tone fine day\nbad\ttwo, or 三\n",
    "a.jsonl": '{"text": "one fine day", "label": "good"}\n'
    '{"label": "bad", "text": "two, or 三", "id": 3}\n',
    "a.txt": "\ufeffone fine day\tgood\n\ntwo, or 三\tbad",
}


@pytest.mark.parametrize("name", FILES)
def test_formats(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8", newline="")
    assert read_examples(path) == Examples(TEXTS, LABELS)
    if name != "a.txt":
        assert read_examples(path, labelled=False) == Examples(TEXTS)


def test_trec(tmp_path):
    (tmp_path / "TREC.train").write_bytes(
        b"NUM:dist How far ?\nLOC:city Which ?\nHUM:ind Who, \xf0 ?"
    )
    expected = Examples(["How far ?", "Which ?", "Who, ð ?"], ["NUM", "LOC", "HUM"])
    assert read_examples(tmp_path / "TREC.train", format="trec", encoding="latin-1") == expected


def test_a_folder_a_class(tmp_path):
    for name in ("pos/1.txt", "pos/2.txt", "neg/1.txt", "unsup/1.txt", "pos/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"film {name}\nwas fine")
    (tmp_path / "urls_pos.txt").write_text("http")
    examples = read_examples(tmp_path)
    assert examples.labels == ["neg", "pos", "pos"]
    assert examples.texts[0] == "film neg/1.txt\nwas fine"
    texts = read_examples(tmp_path, labelled=False).texts
    assert texts[3] == "film unsup/1.txt\nwas fine"
    assert len(texts) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a folder a class with \.txt files"):
        read_examples(tmp_path / "empty")


def test_lines_and_standard_input(tmp_path, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("one\n\n三\r\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert read_examples("-", labelled=False).texts == ["one", "三"]


def test_empty_texts_where_they_are_wanted(tmp_path, monkeypatch):
    """Then nothing is left out, so that what comes out can be laid beside what went in."""
    lines = "one\n\n \r\ntwo\n"
    rows = {
        "a.txt": (lines, ["one", "", " ", "two"]),
        "a.csv": ('id,text\n1,one\n2,\n3," "\n', ["one", "", " "]),
        "a.jsonl": ('{"text": ""}\n\n{"text": "one"}\n', ["", "one"]),
    }
    for name, (content, expected) in rows.items():
        (tmp_path / name).write_bytes(content.encode())
        assert read_examples(tmp_path / name, labelled=False, empty=True).texts == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert read_examples("-", labelled=False, empty=True).texts == rows["a.txt"][1]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_text("")
    assert read_examples(tmp_path / "texts", labelled=False, empty=True).texts == [""]
    with pytest.raises(ValueError, match=r"1\.txt: expected a text, got none"):
        read_examples(tmp_path / "texts", labelled=False)


def test_columns_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,q,a\nno,yes,1\n")
    examples = read_examples(path, text_column="q", label_column="a")
    assert examples == Examples(["yes"], ["1"])
    with pytest.raises(
        ValueError, match=r"a\.csv, line 1: expected columns 'x' and .* got \['text'"
    ):
        read_examples(path, text_column="x")


@pytest.mark.parametrize(("ending", "comma"), [("csv", ","), ("tsv", "\t")])
def test_a_text_as_long_as_a_book(tmp_path, ending, comma):
    limit, text = csv.field_size_limit(), "word " * 40_000
    path = tmp_path / f"a.{ending}"
    path.write_text(f"text{comma}label\n{text}{comma}x\nshort{comma}y\n")
    assert read_examples(path).texts == [text, "short"]
    assert csv.field_size_limit() == limit


GOOD_LINES = ['{"text": "a", "label": "b"}\n', '{"text": "c", "label": "d"}\n']
BAD: dict[str, list[tuple]] = {
    "a.csv": [
        ("text,label\na,b\na,b,c\nc,d\n", 3, "expected 2 fields, got 3"),
        ("text,label\na,b\na\nc,d\n", 3, "expected 2 fields, got 1"),
        ('text,label\na,b\nc,d\n"x, y\nz', 4, "expected a row of a table, got"),
        ('text,label\na,b\n"two\nlines",\nc,d\n', 3, "expected a label, got none"),
    ],
    "a.tsv": [("text\tlabel\na\tb\n\tc\nc\td\n", 3, "expected a text, got none")],
    "a.jsonl": [
        (GOOD_LINES[0] + '{"text": \n' + GOOD_LINES[1], 2, "expected a JSON object"),
        (GOOD_LINES[0] + "[1]\n" + GOOD_LINES[1], 2, "expected a JSON object"),
        (GOOD_LINES[0] + '{"text": 1, "label": 2}\n' + GOOD_LINES[1], 2, "expected a text and"),
        (GOOD_LINES[0] + '{"label": 2}\n' + GOOD_LINES[1], 2, "expected columns"),
        (GOOD_LINES[0] + '{"text": "x", "label": null}\n' + GOOD_LINES[1], 2, "expected a label"),
    ],
    "a.txt": [
        ("a\tb\nno tab\nc\td\n", 2, "expected text, a tab and a label, got 'no tab'"),
        ("a\tb\nx\t \nc\td\n", 2, "expected a label, got none"),
        (b"a\tb\nx\xff\ty\nc\td\n", 2, r"expected text in the encoding given \(UTF-8 by default\)"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [(name, *case) for name, cases in BAD.items() for case in cases],
)
def test_a_bad_row_is_an_error_or_skipped(tmp_path, name, content, line, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}, line {line}: {message}"):
        read_examples(path)
    examples = read_examples(path, skip_bad_rows=True)
    assert examples.texts == ["a", "c"]
    assert examples.labels == ["b", "d"]
    assert len(examples.skipped) == 1
    assert f"line {line}: " in examples.skipped[0]


def test_a_bad_file_in_a_folder(tmp_path):
    for name, content in (("x/1.txt", b"good"), ("y/1.txt", b"\xff\xfe"), ("y/2.txt", b"fine")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"y/1\.txt: expected text in the encoding"):
        read_examples(tmp_path)
    examples = read_examples(tmp_path, skip_bad_rows=True)
    assert (examples.texts, len(examples.skipped)) == (["good", "fine"], 1)


def test_nothing_to_read(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"a\.txt: expected at least one text, got none"):
        read_examples(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"^format: expected one of .*, got 'xml'"):
        read_examples(tmp_path / "a.txt", format="xml")
    with pytest.raises(ValueError, match=r"^format: expected one with labels"):
        read_examples(tmp_path / "a.txt", format="lines")


def test_an_unknown_encoding(tmp_path):
    (tmp_path / "a.txt").write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"^encoding: expected one that Python knows, got 'utf-9'"):
        read_examples(tmp_path / "a.txt", encoding="utf-9")


def test_label_names():
    assert label_names(["b", "a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match=r"at least two different ones, got \['a'\]"):
        label_names(["a", "a"])


def test_split_keeps_shares_and_copies_together():
    texts = [f"text {i}" for i in range(100)] + ["text 0"] * 5
    labels = ["a"] * 80 + ["b"] * 25
    examples = Examples(texts, labels)
    kept, aside = split_examples(examples, 0.2, seed=1)
    assert sorted(kept.texts + aside.texts) == sorted(texts)
    assert not set(kept.texts) & set(aside.texts)
    assert 16 <= aside.labels.count("a") <= 21
    assert aside.labels.count("b") == 4 or "text 0" in aside.texts
    assert split_examples(examples, 0.2, seed=1) == (kept, aside)
    assert split_examples(examples, 0.2, seed=2) != (kept, aside)
    assert split_examples(examples, 0.0) == (examples, Examples())
    assert len(split_examples(Examples(texts[:10]), 0.5)[1].texts) == 5
    with pytest.raises(ValueError, match=r"^share: expected a value in \[0, 1\), got 1"):
        split_examples(examples, 1)
