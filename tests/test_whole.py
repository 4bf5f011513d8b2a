"""Files and folders that appear whole or not at all."""

import os

import pytest

from fusedattn._whole import whole_file, whole_folder

WAYS = {"file": whole_file, "folder": whole_folder}


def write(way, target, content):
    """One file `target`, in either way."""
    with WAYS[way](target if way == "file" else target.parent) as path:
        (path if way == "file" else path / target.name).write_text(content)
        assert not target.exists() or target.read_text() == "old"


@pytest.mark.parametrize("way", WAYS)
def test_the_target_is_as_it_was_until_the_end(way, tmp_path):
    target = tmp_path / "made" / "new" / "x.txt"
    for content in ("old", "other"):
        write(way, target, content)
        assert target.read_text() == content
        assert [p.name for p in target.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_flushed_is_not_put_in_place(way, is_there, tmp_path, monkeypatch):
    target = tmp_path / "new" / "x.txt"
    if is_there:
        write(way, target, "old")

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write(way, target, "other")
    assert target.exists() == is_there
    assert not is_there or target.read_text() == "old"


def test_a_folder_keeps_its_other_files_and_loses_none_to_an_error(tmp_path):
    (tmp_path / "kept.txt").write_text("kept")

    def breaks_off(folder):
        (folder / "x.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path) as folder:
        breaks_off(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"kept.txt"}
    with whole_folder(tmp_path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x.txt").write_text("whole")
    assert (tmp_path / "kept.txt").read_text() == "kept"
    assert (tmp_path / "inner" / "x.txt").read_text() == "whole"
