"""The training benchmark compares like with like; never how fast it is."""

import numpy as np
import pytest

from fusedattn.bench import training
from fusedattn.encoder import EncoderConfig

TINY = EncoderConfig(50, 16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


@pytest.mark.parametrize("length", [9, 0])
def test_contenders_take_the_same_steps(length):
    pytest.importorskip("torch", reason="the peer is PyTorch")
    case = training.TrainingCase("tiny", TINY, 5, length, {})
    rounds = training.BATCHES + 1
    samples = training.measure(case, ["fusedattn", "pytorch"], 1, rounds=rounds)
    assert [len(times) for times in samples.values()] == [rounds, rounds]


def test_different_losses_are_noticed(monkeypatch):
    case = training.TrainingCase("tiny", TINY, 5, 9, {})
    liar = {"fusedattn": training.our_step, "liar": lambda case: lambda batch: 4.0}
    monkeypatch.setattr(training, "contenders", lambda threads: liar)
    with pytest.raises(RuntimeError, match="tiny: losses differ"):
        training.measure(case, ["fusedattn", "liar"], 1, rounds=1)


def test_lengths_are_those_of_questions():
    (batch,) = training.CASES["small-banking77"].batches(1)
    lengths = np.diff(batch.cu_seqlens)
    assert len(lengths) == 32
    assert 12 < lengths.mean() < 16
    assert lengths.max() > 1.5 * lengths.mean()


def test_unknown_case():
    with pytest.raises(ValueError, match=r"^case: expected names or patterns of"):
        training.main(patterns=["nothing"])
