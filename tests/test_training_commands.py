"""The commands that train and use models, on a small made-up task."""

import io
import json
import math
import signal
from unittest import mock

import numpy as np
import pytest

from fusedattn import __version__
from fusedattn.cli import _chunks, main
from fusedattn.encoder import Encoder, MaskedLM, TextClassifier
from fusedattn.text import Masking
from fusedattn.train import CHECKPOINT, HISTORY, read_history

for package in ("tokenizers", "safetensors", "tqdm"):
    pytest.importorskip(package, reason=f"training needs {package}")

WORDS = {
    "sea": "ship wave harbour sail anchor".split(),
    "sky": "wing cloud pilot wind star".split(),
}
SMALL = "--vocab-size 80 --dim 16 --heads 2 --layers 1 --learning-rate 0.01".split()


def write_sentences(path):
    """120 sentences of two subjects, text<TAB>label."""
    rng = np.random.default_rng(0)
    labels = ["sea", "sky"] * 60
    lines = [f"the {' '.join(rng.choice(WORDS[label], 4))}\t{label}\n" for label in labels]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write_sentences(tmp_path / "data.txt")


@pytest.fixture
def model(data, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["finetune", str(data), "--out", str(out), "--epochs", "5", *SMALL]) == 0
    capsys.readouterr()
    return out


def test_finetune_learns_and_says_where_it_wrote(data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["finetune", str(data), "--out", str(out), "--epochs", "5", "--test", str(data)]
    assert main([*command, *SMALL]) == 0
    shown = capsys.readouterr()
    assert "2 labels, 108 texts to learn from, 12 to choose by; " in shown.out
    assert f"to {out}." in shown.out
    assert shown.err == ""  # no bar where nobody looks
    names = {"config.json", "model.safetensors", "tokenizer.json", HISTORY, "settings.json"}
    assert names <= {p.name for p in out.iterdir()}
    assert not (out / CHECKPOINT).exists()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["result"]["test_accuracy"] > 0.9
    assert settings["dim"] == 16
    assert settings["version"] == __version__
    assert len(read_history(out)) == 5

    with pytest.raises(SystemExit):
        main([*command, *SMALL])
    assert f"--out: {out} holds a model already" in capsys.readouterr().err
    assert main([*command, *SMALL, "--restart", "--epochs", "1"]) == 0
    assert len(read_history(out)) == 1


def test_finetune_from_a_model(model, data, tmp_path):
    out = tmp_path / "tuned"
    command = ["finetune", str(data), "--from", str(model), "--out", str(out), "--epochs", "1"]
    command += ["--freeze", "encoder.", "--max-length", "5"]
    assert main([*command, "--dropout", "0.2", "--attention-dropout", "0.1"]) == 0
    tuned, start = TextClassifier.from_pretrained(out), TextClassifier.from_pretrained(model)
    np.testing.assert_equal(tuned.encoder.params, start.encoder.params)
    shape = tuned.encoder.config
    assert (shape.hidden_dropout_prob, shape.attention_probs_dropout_prob) == (0.2, 0.1)
    assert len(tuned.encoder.tokenizer.encode("the ship the ship the ship").ids) == 5


def test_a_loss_that_is_not_a_number_is_said_in_a_line(data, tmp_path, capsys):
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit), np.errstate(all="ignore"):
        main(["finetune", str(data), "--out", out, *SMALL, "--learning-rate", "1e9"])
    assert "fusedattn: loss: expected a finite number, got nan" in capsys.readouterr().err


def test_interrupted_finetune_goes_on(data, model, tmp_path, capsys):
    out = tmp_path / "halves"
    command = ["finetune", str(data), "--out", str(out), "--epochs", "5", *SMALL]
    left = iter(range(9))

    def hide(batch, *_):
        if next(left, None) is None:
            signal.raise_signal(signal.SIGINT)
        return batch

    with mock.patch("fusedattn.text.hide_tokens", hide):
        assert main([*command, "--hide-words", "0.2"]) == 130
    assert "The same command goes on" in capsys.readouterr().out
    assert (out / CHECKPOINT).exists()
    with pytest.raises(SystemExit):
        main([*command, "--hide-words", "0.4", "--dropout", "0.1"])
    shown = capsys.readouterr().err
    assert "found one of another: dropout None, here 0.1; hide_words 0.2, here 0.4" in shown
    assert main([*command, "--hide-words", "0.2", "--threads", "1"]) == 0
    assert "Going on from the checkpoint" in capsys.readouterr().err
    assert len(read_history(out)) == 5


def test_evaluate(model, data, capsys):
    assert main(["evaluate", str(model), str(data), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["texts"] == 120
    assert figures["accuracy"] > 0.9
    assert [row["label"] for row in figures["labels"]] == ["sea", "sky"]
    assert main(["evaluate", str(model), str(data)]) == 0
    assert "120 texts: accuracy" in capsys.readouterr().out
    data.write_text("a cave\tearth\n")
    with pytest.raises(SystemExit):
        main(["evaluate", str(model), str(data)])
    assert "labels: expected names among ['sea', 'sky'], got ['earth']" in capsys.readouterr().err


def test_a_long_label_keeps_the_columns(model, data, capsys):
    longer = TextClassifier.from_pretrained(model)
    longer.names = ["sea", "sky" * 20]
    longer.save_pretrained(model)
    data.write_text(data.read_text().replace("\tsky", "\t" + "sky" * 20))
    assert main(["evaluate", str(model), str(data)]) == 0
    table = capsys.readouterr().out.splitlines()[:-1]
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1


def test_predict(model, tmp_path, capsys, monkeypatch):
    texts = ["the ship anchor sail", "the cloud wing wind star", "", "xyz"]  # a line each
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["predict", str(model)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows[:2]] == ["sea", "sky"]
    expected = TextClassifier.from_pretrained(model).predict_proba(texts)
    found = [[row["probabilities"][name] for name in ("sea", "sky")] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Seven texts, to be taken two at a time."""
    monkeypatch.setattr(_chunks, "SIZE", 2)
    path = tmp_path / "texts.txt"
    path.write_text(
        "".join(f"the {word} and the ship\n" for word in WORDS["sea"] + WORDS["sky"][:2])
    )
    return path


def is_ended(command, method, error, after):
    """Run `command` with a `method` that raises `error` when called once more than `after`."""
    left, whole = iter(range(after)), getattr(*method)

    def ends(*args, **kwargs):
        if next(left, None) is None:
            raise error
        return whole(*args, **kwargs)

    with mock.patch.object(*method, ends):
        return main(command)


@pytest.mark.parametrize(
    ("command", "method"),
    [("predict", (TextClassifier, "predict_proba")), ("encode", (Encoder, "encode"))],
)
def test_predict_and_encode_go_on(model, many, command, method, tmp_path, capsys):
    expected = tmp_path / "expected"
    start = [command, str(model), str(many), "--out"]
    assert main([*start, str(expected)]) == 0

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    assert is_ended([*start, str(out)], method, KeyboardInterrupt, after=1) == 130
    assert f"The same command goes on from {partial}." in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(RuntimeError):
        is_ended([*start, str(out)], method, RuntimeError("killed"), after=2)
    assert f"Going on from {partial} (--restart" in capsys.readouterr().err
    with mock.patch.object(*method, autospec=True, side_effect=getattr(*method)) as calls:
        assert main([*start, str(out)]) == 0
    assert calls.call_count == 1  # three of four were there
    assert out.read_bytes() == expected.read_bytes()
    assert not partial.exists()

    with pytest.raises(SystemExit):  # what is finished is not begun anew by mistake
        main([*start, str(out)])
    assert f"--out: {out} is there already; --restart replaces it" in capsys.readouterr().err
    many.write_text("the ship\n" * 4)
    assert is_ended([*start, str(out), "--restart"], method, KeyboardInterrupt, after=1) == 130
    assert "The same command without --restart goes on from" in capsys.readouterr().err
    assert out.read_bytes() == expected.read_bytes()  # until the new one is whole
    assert main([*start, str(out)]) == 0
    assert out.read_bytes() != expected.read_bytes()


@pytest.mark.parametrize("command", ["predict", "encode"])
def test_results_of_something_else_are_refused(model, many, command, tmp_path, capsys):
    start = [command, str(model), str(many), "--out", str(tmp_path / "out")]
    method = (Encoder, "batches")
    assert is_ended([*start, "--threads", "1"], method, KeyboardInterrupt, after=0) == 130
    many.write_text(many.read_text() + "the cloud\n")  # nothing is there to be refused yet
    assert is_ended(start, method, KeyboardInterrupt, after=1) == 130
    many.write_text("the ship\n" * 7)
    with pytest.raises(SystemExit):
        main(start)
    assert (
        "out.partial holds results that differ in ['texts']; --restart" in capsys.readouterr().err
    )
    assert main([*start, "--restart"]) == 0
    with pytest.raises(SystemExit):
        main([*start[:4], str(tmp_path), "--restart"])
    assert f"--out: expected a file, {tmp_path} is none" in capsys.readouterr().err


def test_one_class_only(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a\tb\nc\tb\n")
    with pytest.raises(SystemExit):
        main(["finetune", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out")])
    assert "labels: expected at least two different ones, got ['b']" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--validation", "--test"])
def test_unknown_labels_are_found_before_training(data, option, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("a cave\tearth\n")
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["finetune", str(data), option, str(tmp_path / "other.txt"), "--out", str(out)])
    assert "labels: expected names among ['sea', 'sky'], got ['earth']" in capsys.readouterr().err
    assert not out.exists()


def test_bad_rows_are_counted(model, data, capsys):
    data.write_text(data.read_text() + "no tab here\n")
    with pytest.raises(SystemExit):
        main(["evaluate", str(model), str(data)])
    assert "data.txt, line 121: expected text, a tab and a label" in capsys.readouterr().err
    assert main(["evaluate", str(model), str(data), "--skip-bad-rows"]) == 0
    assert "skipped 1 bad rows" in capsys.readouterr().err


def test_pretrain_then_finetune(data, tmp_path, capsys):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "pretrained"
    corpus.write_text(data.read_text().replace("\tsea", "").replace("\tsky", ""))
    command = ["pretrain", str(corpus), "--out", str(out), "--epochs", "8", "--whole-words"]
    assert main([*command, *SMALL]) == 0
    shown = capsys.readouterr()
    assert "114 texts" in shown.out
    assert shown.err == ""
    history = read_history(out)
    assert history[-1]["loss"] < history[0]["loss"] < 5
    assert history[-1]["perplexity"] == pytest.approx(math.exp(history[-1]["loss"]))

    more = tmp_path / "more"
    command = ["pretrain", str(corpus), "--from", str(out), "--out", str(more), "--epochs", "1"]
    assert main([*command, "--learning-rate", "1e-5"]) == 0
    assert read_history(more)[0]["loss"] == pytest.approx(history[-1]["loss"], rel=0.1)

    tuned = tmp_path / "tuned"
    command = ["finetune", str(data), "--from", str(out), "--out", str(tuned), "--epochs", "3"]
    assert main([*command, "--learning-rate", "0.01"]) == 0
    assert read_history(tuned)[-1]["accuracy"] > 0.9


def test_killed_pretraining_goes_on(data, tmp_path):
    command = ["pretrain", str(data), *SMALL, "--epochs", "2", "--checkpoint-seconds", "0"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    left = iter(range(3))

    def dies(self, batch, rng):
        if next(left, None) is None:
            raise RuntimeError("killed")
        return masking(self, batch, rng)

    masking = Masking.__call__
    with mock.patch.object(Masking, "__call__", dies), pytest.raises(RuntimeError):
        main([*command, "--out", str(tmp_path / "halves")])
    assert main([*command, "--out", str(tmp_path / "halves")]) == 0
    models = [MaskedLM.from_pretrained(tmp_path / name).params for name in ("whole", "halves")]
    np.testing.assert_equal(*models)


def test_encode(model, tmp_path, capsys):
    texts = ["the ship", "the cloud", "the star and the ship"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    out = tmp_path / "vectors.npy"
    command = ["encode", str(model), str(tmp_path / "texts.jsonl"), "--out", str(out)]
    assert main(command) == 0
    assert f"Wrote an array (3, 16) to {out}." in capsys.readouterr().err
    expected = Encoder.from_pretrained(model).encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(np.load(out), expected, atol=1e-6)
    assert main([*command, "--restart", "--normalize"]) == 0
    np.testing.assert_allclose(np.linalg.norm(np.load(out), axis=1), 1, rtol=1e-6)
