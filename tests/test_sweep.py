"""The sweep over widths, on a small made-up task: its table, and how it goes on."""

import json
import signal
from unittest import mock

import pytest

from fusedattn.cli import finetune, main
from fusedattn.train import CHECKPOINT, read_history
from tests.test_training_commands import write_sentences

pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

SMALL = "--dim 8,16 --heads 2 --layers 1 --vocab-size 80 --epochs 2 --seeds 2".split()
SPEEDS = ("tokens_per_second", "seconds")


@pytest.fixture
def command(tmp_path):
    """A sweep of four runs, without --out."""
    return ["sweep", str(write_sentences(tmp_path / "data.txt")), *SMALL]


def without_speeds(rows):
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in rows]


def results(out):
    """The table and the histories of a sweep, but for the speed in them."""
    runs = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    histories = [read_history(out / f"dim{run['dim']}-seed{run['seed']}") for run in runs]
    return without_speeds(runs), [without_speeds(history) for history in histories]


def test_sweep(command, tmp_path, capsys):
    out = tmp_path / "sweep"
    command += ["--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith(("8 ", "16 "))]
    assert [row[0] for row in rows] == ["8", "16"]
    assert int(rows[0][1].replace(",", "")) < int(rows[1][1].replace(",", ""))
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(run["dim"], run["seed"]) for run in runs] == [(8, 0), (8, 1), (16, 0), (16, 1)]

    (out / "sweep.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs[:3]))
    with mock.patch("fusedattn.cli.finetune.train", wraps=finetune.train) as spy:
        assert main(command) == 0
    assert spy.call_count == 1  # the others are there
    again = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert again[3]["validation_accuracy"] == runs[3]["validation_accuracy"]
    with pytest.raises(SystemExit):
        main([*command, "--epochs", "3"])
    assert "of another sweep" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--dim", "8,wide"])


def after(updates, what):
    """Have `what` done in the training update after so many."""
    left = iter(range(updates))

    def hide(batch, *_):
        if next(left, None) is None:
            what()
        return batch

    return mock.patch("fusedattn.text.hide_tokens", hide)


def kill():
    raise RuntimeError("killed")


def test_a_run_that_was_broken_off_goes_on(command, tmp_path, capsys):
    """Ctrl-C in the second run, a kill in the third: as if neither had been."""
    command += ["--checkpoint-seconds", "0"]
    with after(10**9, kill):
        assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "broken"
    with after(12, lambda: signal.raise_signal(signal.SIGINT)):
        assert main([*command, "--out", str(out)]) == 130
    assert f"The same command goes on from the checkpoint in {out}." in capsys.readouterr().out
    assert (out / "dim8-seed1" / CHECKPOINT).exists()
    with after(7, kill), pytest.raises(RuntimeError):
        main([*command, "--out", str(out)])
    with (
        after(10**9, kill),
        mock.patch("fusedattn.cli.finetune.train", wraps=finetune.train) as spy,
    ):
        assert main([*command, "--out", str(out)]) == 0
    assert spy.call_count == 2
    assert results(out) == results(tmp_path / "whole")
    assert not list(out.rglob("checkpoint*"))


def test_a_restart_that_was_broken_off_leaves_nothing_old(command, tmp_path, capsys):
    out = tmp_path / "sweep"
    command += ["--out", str(out)]
    assert main([*command, "--learning-rate", "0.1"]) == 0
    with after(3, lambda: signal.raise_signal(signal.SIGINT)):
        assert main([*command, "--restart"]) == 130
    assert "The same command without --restart goes on" in capsys.readouterr().out
    assert main(command) == 0
    runs, _ = results(out)
    assert [run["settings"]["learning_rate"] for run in runs] == [0.001] * 4


def test_other_texts_are_refused(command, tmp_path, capsys):
    command += ["--out", str(tmp_path / "sweep"), "--seeds", "1"]
    assert main(command) == 0
    with (tmp_path / "data.txt").open("a") as file:
        file.write("a ship\tsea\n")
    with pytest.raises(SystemExit):
        main(command)
    assert "is of another sweep, which differs in ['texts']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--dim", "8,9"], "--dim: expected multiples of --heads (2), got 9"),
        (["--dim", "8,0"], "--dim: expected multiples of --heads (2), got 0"),
        (["--heads", "0"], "--dim: expected multiples of --heads (0), got 8"),
        (["--validation-share", "0"], "--validation-share: expected more than 0"),
    ],
)
def test_what_cannot_be_compared_is_found_before_training(
    command, options, message, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        main([*command, *options, "--out", str(tmp_path / "sweep")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
