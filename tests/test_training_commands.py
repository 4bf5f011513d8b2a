"""The commands that train and use models, on a small made-up task."""

import io
import json
import math
import signal
from unittest import mock

import numpy as np
import pytest

from fusedattn.cli import encode, finetune, main
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


@pytest.fixture
def data(tmp_path):
    """120 sentences of two subjects, text<TAB>label."""
    rng = np.random.default_rng(0)
    path = tmp_path / "data.txt"
    labels = ["sea", "sky"] * 60
    lines = [f"the {' '.join(rng.choice(WORDS[label], 4))}\t{label}\n" for label in labels]
    path.write_text("".join(lines), encoding="utf-8")
    return path


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
    assert "the same command goes on" in capsys.readouterr().out
    assert (out / CHECKPOINT).exists()
    assert main([*command, "--hide-words", "0.2"]) == 0
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


def test_predict(model, tmp_path, capsys, monkeypatch):
    texts = ["the ship anchor sail", "the cloud wing wind star", "xyz"]
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["predict", str(model)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows[:2]] == ["sea", "sky"]
    expected = TextClassifier.from_pretrained(model).predict_proba(texts)
    found = [[row["probabilities"][name] for name in ("sea", "sky")] for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_predict_resumes(model, tmp_path, capsys):
    source, out = tmp_path / "texts.txt", tmp_path / "labels.jsonl"
    source.write_text("the ship\nthe cloud\nthe star\n")
    command = ["predict", str(model), str(source), "--out", str(out), "--resume"]
    assert main(command) == 0
    whole = out.read_text()
    assert whole.count("\n") == 3
    out.write_text(whole[:-10])  # killed while writing the third
    assert main(command) == 0
    assert f"Wrote 1 lines to {out}." in capsys.readouterr().err
    assert out.read_text() == whole


def test_one_class_only(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a\tb\nc\tb\n")
    with pytest.raises(SystemExit):
        main(["finetune", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out")])
    assert "labels: expected at least two different ones, got ['b']" in capsys.readouterr().err


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


def test_encode(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 2)
    texts = ["the ship", "the cloud", "the star and the ship", ""]
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts[:3])
    )
    out = tmp_path / "vectors.npy"
    command = ["encode", str(model), str(tmp_path / "texts.jsonl"), "--out", str(out)]
    assert main(command) == 0
    assert f"Wrote an array (3, 16) to {out}." in capsys.readouterr().err
    whole = np.load(out)
    expected = Encoder.from_pretrained(model).encode(texts[:3], show_progress_bar=False)
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    assert not (tmp_path / "vectors.npy.partial").exists()

    (tmp_path / "vectors.npy.partial").write_bytes(whole.tobytes()[: 2 * 16 * 4 + 7])
    assert main([*command, "--resume", "--normalize"]) == 0  # only the third is new
    np.testing.assert_array_equal(np.load(out)[:2], whole[:2])
    assert np.linalg.norm(np.load(out)[2]) == pytest.approx(1)


def test_sweep(data, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    out = tmp_path / "sweep"
    command = ["sweep", str(data), "--dim", "8,16", "--seeds", "2", "--out", str(out)]
    options = ["--heads", "2", "--layers", "1", "--vocab-size", "80", "--epochs", "2"]
    assert main([*command, *options]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith(("8 ", "16 "))]
    assert [row[0] for row in rows] == ["8", "16"]
    assert int(rows[0][1].replace(",", "")) < int(rows[1][1].replace(",", ""))
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    runs = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(run["dim"], run["seed"]) for run in runs] == [(8, 0), (8, 1), (16, 0), (16, 1)]

    (out / "sweep.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs[:3]))
    with mock.patch("fusedattn.cli.finetune.train", wraps=finetune.train) as spy:
        assert main([*command, *options]) == 0
    assert spy.call_count == 1  # the others are there
    again = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert again[3]["validation_accuracy"] == runs[3]["validation_accuracy"]
    with pytest.raises(SystemExit):
        main([*command, *options, "--epochs", "3"])
    assert "of another sweep" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", str(data), "--dim", "8,wide"])
