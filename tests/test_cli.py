"""The command line: what each command prints, and how wrong use ends."""

import json
import os
import re
import subprocess
import sys

import pytest

import fusedattn
from fusedattn.bench import CASES, Case
from fusedattn.bench.comparisons import COMPARISONS, rule
from fusedattn.bench.ratios import Comparison
from fusedattn.cli import COMMANDS, main


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fusedattn {fusedattn.__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: fusedattn {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_use_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "error" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    facts = fusedattn.cpu_info()
    assert fusedattn.__version__ in shown
    assert all(name in shown for name in facts["isas_built"])
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["isa"] == facts["isa"]
    assert found["version"] == fusedattn.__version__


def test_an_unknown_instruction_set_is_one_clear_line():
    code = "import sys; from fusedattn.cli import main; sys.exit(main(['info']))"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDATTN_ISA": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith("fusedattn: FUSEDATTN_ISA")
    assert "'abacus'" in answer.stderr
    assert "baseline" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    def needs_tokenizers(options):
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr("fusedattn.cli.info.run", needs_tokenizers)
    with pytest.raises(SystemExit) as end:
        main(["info"])
    assert end.value.code == 1
    assert "'tokenizers'" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedattn.cli.info.run", interrupted)
    assert main(["info"]) == 130


def test_ctrl_c_while_a_command_is_being_loaded(monkeypatch, capsys):
    def interrupted(subparsers):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedattn.cli.info.add_parser", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", ["predict", "encode"])
def test_files_may_stand_before_and_after_options(command, monkeypatch):
    seen = []
    monkeypatch.setattr(f"fusedattn.cli.{command}.run", lambda args: seen.append(args) or 0)
    for words in ("model --out o", "model a b --out o", "model --out o a b", "--out o model a b"):
        assert main([command, *words.split()]) == 0
    assert [args.data for args in seen] == [["-"], ["a", "b"], ["a", "b"], ["a", "b"]]
    assert {(str(args.model), str(args.out)) for args in seen} == {("model", "o")}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(CASES, "tiny", Case("tiny", 1, 2, 16, 16, 8, causal=True))
    return "tiny"


def test_bench_prints_and_writes_what_it_measured(tiny, tmp_path, capsys):
    figures, *pictures = (tmp_path / n for n in ("figures.json", "shares.png", "roofline.png"))
    arguments = ["bench", "--quick", "--threads", "1", "--case", tiny, "--isa", "baseline"]
    arguments += ["--json", figures, "--plot", pictures[0], "--roofline", pictures[1]]
    before = fusedattn.cpu_info()["isa"]
    assert main(list(map(str, arguments))) == 0
    assert fusedattn.cpu_info()["isa"] == before
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines() if line.startswith("tiny")]
    assert [row[6] for row in rows] == ["forward", "backward"]
    assert shown.err == ""  # no progress where nobody looks
    written = json.loads(figures.read_text())
    assert written["about"]["threads"] == 1
    assert written["about"]["isa"] == "baseline"
    for result in written["results"]:
        assert result["case"]["name"] == "tiny"
        assert len(result["contenders"]["fusedattn"]["samples_s"]) >= 3
        assert result["peak_flops_per_s"] > 0
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_bench_lengths(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fusedattn.bench.lengths.LENGTHS", (128, 256))
    picture, figures = tmp_path / "lengths.png", tmp_path / "lengths.json"
    arguments = ["bench", "--lengths", "--quick", "--plot", picture, "--json", figures]
    assert main(list(map(str, arguments))) == 0
    shown = capsys.readouterr().out
    assert "time grows as S to the" in shown
    assert [p["s"] for p in json.loads(figures.read_text())["results"]] == [128, 256]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_scaling(tiny, tmp_path, capsys):
    picture, figures = tmp_path / "scaling.png", tmp_path / "scaling.json"
    arguments = ["bench", "--scaling", "--quick", "--threads", "3", "--case", tiny]
    arguments += ["--dtype", "float32", "float64", "--plot", picture, "--json", figures]
    assert main(list(map(str, arguments))) == 0
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines() if line.startswith("tiny")]
    assert len(rows) == 2 * 2 * 3
    assert shown.err == ""
    written = json.loads(figures.read_text())
    assert written["about"]["threads"] == 3
    kinds = [(r["case"]["dtype"], r["direction"]) for r in written["results"]]
    assert kinds == [(t, d) for t in ("float32", "float64") for d in ("forward", "backward")]
    for result in written["results"]:
        assert [p["threads"] for p in result["by_threads"]] == [1, 2, 3]
        assert all(len(p["samples_s"]) >= 3 for p in result["by_threads"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_ratios(monkeypatch, tmp_path, capsys):
    shape = (1, 1, 20, 8)
    causal = Comparison("small", "text", 1e9, rule(shape, lambda: {"is_causal": True}))
    monkeypatch.setitem(COMPARISONS, "small", causal)
    figures = tmp_path / "ratios.json"
    arguments = ["bench", "--ratios", "--quick", "--case", "small", "--json", str(figures)]
    assert main(arguments) == 0
    assert "2 of 2 within their ratio" in capsys.readouterr().out
    rows = json.loads(figures.read_text())["results"]
    assert [r["direction"] for r in rows] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--threads", "0"], "must be at least 1, got 0"),
        (["--threads", "many"], "many"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bench_refuses(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--neighbour", "--threads", "2"], "--neighbour does not take --threads"),
        (["--lengths", "--case", "tiny"], "--lengths does not take --case"),
        (["--scaling", "--roofline", "f.png"], "--scaling does not take --roofline"),
        (["--case", "nonsense"], "expected a case or a pattern of bert-128, .*, got 'nonsense'"),
        (["--ratios", "--case", "nonsense"], "expected a comparison .*, got 'nonsense'"),
        (["--isa", "abacus"], "set_isa: expected one of .*, got 'abacus'"),
    ],
)
def test_bench_refuses_in_one_line(arguments, complaint, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.match(f"fusedattn bench: {complaint}\n$", error)
