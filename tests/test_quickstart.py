"""The quickstart, on a small library made up here: the task's rules, and the whole command."""

import re
from unittest import mock

import numpy as np
import pytest

from fusedattn.cli import _docstrings, main, quickstart
from fusedattn.cli._docstrings import (
    Passage,
    docstring_task,
    read_docstrings,
    split_by_file,
    without_duplicates,
)

SUBJECTS = {
    "net": "socket server connection address packet port client".split(),
    "paint": "canvas colour brush window pixel widget image".split(),
    "number": "integer fraction decimal root sum product divide".split(),
}


@pytest.fixture
def library(tmp_path):
    """Three packages of eight files of eight functions, and files that must not be read."""
    rng = np.random.default_rng(0)
    root = tmp_path / "lib"
    for package, words in SUBJECTS.items():
        for number in range(8):
            texts = (" ".join(rng.choice(words, 6)) for _ in range(8))
            source = "\n".join(f'def f{i}():\n    """Do {t}."""' for i, t in enumerate(texts))
            path = root / package / f"m{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
    for path, text in {
        "net/test/t.py": '"""A test of sockets, left out for good reason."""',
        "site-packages/other/x.py": '"""This is somebody else\'s package, not the library\'s."""',
        "paint/bad.py": "def broken(:",
        "single.py": '"""A module of one file cannot be divided by file."""',
        "number/short.py": '"""Too short."""',
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


def test_what_is_read(library):
    passages = list(read_docstrings(library))
    assert len(passages) == 3 * 64 + 1
    assert {p.file for p in passages if "/" not in p.file} == {"single.py"}
    assert {p.package for p in passages} == {*SUBJECTS, "single"}
    assert not any("test" in p.file or "site" in p.file for p in passages)
    assert all(p.text.startswith("Do ") for p in passages if p.package != "single")


def test_duplicates():
    passages = [
        Passage("Return the name.", "a/x.py", "a"),
        Passage("return  the\nNAME.", "a/y.py", "a"),
        Passage("Open it.", "a/x.py", "a"),
        Passage("Open it.", "b/x.py", "b"),
        Passage("Close it.", "b/x.py", "b"),
    ]
    assert without_duplicates(passages) == [passages[0], passages[4]]


def test_split_by_file_leaks_nothing_and_keeps_the_share(library):
    passages = [p for p in read_docstrings(library) if p.package in SUBJECTS]
    kept, aside = split_by_file(passages, 0.25, seed=0)
    assert sorted(kept + aside) == sorted(passages)
    assert not {p.file for p in kept} & {p.file for p in aside}
    for package in SUBJECTS:
        assert sum(p.package == package for p in aside) == 16
    assert split_by_file(passages, 0.25, seed=0) == (kept, aside)
    assert split_by_file(passages, 0.25, seed=1) != (kept, aside)


def test_a_file_larger_than_the_share_stays():
    passages = [Passage(str(i), "a/big.py", "a") for i in range(90)]
    passages += [Passage(str(i), "a/small.py", "a") for i in range(90, 100)]
    _, aside = split_by_file(passages, 0.2, seed=0)
    assert {p.file for p in aside} == {"a/small.py"}


def test_task_leaves_out_what_cannot_be_divided(library, monkeypatch):
    monkeypatch.setattr(_docstrings, "MIN_PASSAGES", 1)
    task = docstring_task(library=library)
    assert task.packages == sorted(SUBJECTS)
    assert {p.package for p in task.train} == {p.package for p in task.test} == set(SUBJECTS)
    assert not {p.text for p in task.train} & {p.text for p in task.test}
    assert len(docstring_task(max_packages=2, library=library).packages) == 2


def test_task_of_the_real_library():
    task = docstring_task()
    assert len(task.packages) >= 10
    assert "email" in task.packages
    assert len(task.train) > 3 * len(task.test) > 900
    assert not {p.file for p in task.train} & {p.file for p in task.test}


def test_score_table():
    table = quickstart.score_table(["a", "b"], ["a", "b", "b"], {"one": ["a", "b", "a"]})
    assert re.search(r"^one +66\.7 % +66\.7 %$", table, re.MULTILINE)


def test_the_whole_command(library, tmp_path, monkeypatch, capsys):
    for package in ("tokenizers", "safetensors", "sklearn", "tqdm", "threadpoolctl"):
        pytest.importorskip(package, reason=f"quickstart needs {package}")
    monkeypatch.setattr(
        quickstart, "docstring_task", lambda seed: docstring_task(seed=seed, library=library)
    )
    out = tmp_path / "model"
    command = ["quickstart", "--epochs", "4", "--pretrain-epochs", "2", "--threads", "1"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 packages" in printed
    scores = {
        line[:34].strip(): [float(x) for x in re.findall(r"([\d.]+) %", line)]
        for line in printed.splitlines()
        if line.count(" %") == 2 and "/" not in line
    }
    majority, bag, encoder, pretrained = scores.values()
    assert majority[0] == pytest.approx(33.3, abs=0.1)
    assert bag[0] > 90  # each subject has words of its own: easy for all but the majority class
    assert encoder[0] > 90
    assert pretrained[0] > 90
    assert "Tuning the bag of words to compare with: words" in printed
    assert "Pre-training bought" in printed
    assert "read back, it gives the same probabilities" in printed
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert model | {"history.jsonl"} <= {p.name for p in out.iterdir()}
    assert (out / "pretraining" / "history.jsonl").exists()
    assert not list(out.rglob("checkpoint*"))

    with pytest.raises(SystemExit):  # what is finished is not begun anew by mistake
        main([*command, "--out", str(out)])
    assert f"--out: {out} holds a model already; --restart replaces it" in capsys.readouterr().err

    stopped = tmp_path / "stopped"
    with mock.patch("fusedattn.text.Masking.__call__", side_effect=KeyboardInterrupt):
        assert main([*command, "--out", str(stopped)]) == 130
    assert main([*command, "--out", str(stopped)]) == 0
    percent = [
        [x for x in text.splitlines() if " %" in x] for text in (printed, capsys.readouterr().out)
    ]
    assert percent[0] == percent[1]
