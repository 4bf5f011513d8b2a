"""The whole training loop against PyTorch's pieces: the losses of every step agree."""

import math

import numpy as np
import pytest

from fusedattn.encoder import TextClassifier
from fusedattn.nn import leaves
from fusedattn.text import Dataset
from fusedattn.train import Trainer, TrainingConfig, layer_rates

torch = pytest.importorskip("torch", reason="the peer is PyTorch")
transformers = pytest.importorskip("transformers", reason="the peer's model is of transformers")
pytest.importorskip("safetensors", reason="the weights go through a folder")
pytest.importorskip("tqdm", reason="training needs tqdm")

TEXTS, BATCH, EPOCHS, RATE, WARMUP, DECAY = 40, 6, 2, 2e-3, 0.25, 0.1


@pytest.fixture
def peer():
    """A BERT of transformers that classifies, without dropout."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).eval()


def rate_of(name, rates):
    """What `layer_rates` says of a parameter that transformers calls `name`."""
    if "embeddings" in name:
        return rates["encoder.embeddings.word.weight"]
    if "encoder.layer." in name:
        n = name.partition("encoder.layer.")[2][0]
        return rates[f"encoder.blocks.{n}.attention.qkv.weight"]
    return 1.0


def peer_losses(peer, data, config, rates):
    """The same training in PyTorch, each batch padded to its longest."""
    groups = []
    for name, p in peer.named_parameters():
        rate = rate_of(name, rates)
        p.requires_grad_(rate > 0)
        decay = DECAY if p.ndim > 1 else 0.0
        groups += [{"params": [p], "weight_decay": decay, "rate": rate}] if rate else []
    adam = torch.optim.AdamW(groups, lr=1.0, betas=config.betas)
    weights = config.class_weights and torch.tensor(config.class_weights)
    losses, seen = [], 0
    for epoch in range(EPOCHS):
        order = np.random.default_rng((config.seed, 0, epoch))
        batches = list(data.batches(config.max_tokens, BATCH, order))
        for start in range(0, len(batches), config.accumulate):
            group = batches[start : start + config.accumulate]
            count, total = sum(map(len, group)), 0.0
            adam.zero_grad()
            for batch in group:
                ids = np.split(batch.ids.astype(np.int64), batch.cu_seqlens[1:-1])
                ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), True)
                loss = torch.nn.functional.cross_entropy(
                    peer(input_ids=ids, attention_mask=(ids > 0).long()).logits,
                    torch.tensor(batch.labels),
                    weights,
                    label_smoothing=config.label_smoothing,
                )
                share = loss * len(batch) / count
                share.backward()
                total += share.item()
            losses.append(total)
            torch.nn.utils.clip_grad_norm_([g["params"][0] for g in groups], config.max_grad_norm)
            progress = (seen + 0.5 * count) / (EPOCHS * TEXTS)
            seen += count
            after = (progress - WARMUP) / (1 - WARMUP)
            falling = (
                1 - after if config.schedule == "linear" else (1 + math.cos(math.pi * after)) / 2
            )
            for group_of_one in adam.param_groups:
                factor = progress / WARMUP if progress < WARMUP else falling
                group_of_one["lr"] = RATE * factor * group_of_one["rate"]
            adam.step()
    return losses


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 3},
        {"class_weights": (1.0, 3.0, 0.5), "label_smoothing": 0.1},
        {"freeze": ("encoder.embeddings", "encoder.blocks.0.")},
        {"layer_decay": 0.5, "max_grad_norm": 0.3},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_losses_of_every_step(peer, schedule, settings, tmp_path):
    peer.save_pretrained(tmp_path)
    model = TextClassifier.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    # no token 0: its embedding has no gradient in transformers
    sequences = [rng.integers(1, 100, n).astype(np.int32) for n in rng.integers(2, 20, TEXTS)]
    data = Dataset(sequences, rng.integers(0, 3, TEXTS))
    config = TrainingConfig(
        epochs=EPOCHS,
        max_sentences=BATCH,
        learning_rate=RATE,
        schedule=schedule,
        warmup=WARMUP,
        weight_decay=DECAY,
        seed=1,
        **{"max_grad_norm": 0.5, **settings},
    )
    rates = layer_rates((n for n, _ in leaves(model.params)), config.freeze, config.layer_decay)
    losses = []

    def note(sums):
        losses.append(sums.loss / sums.labels)
        return sums

    Trainer(model, config, reduce=note, show_progress_bar=False).fit(data)
    np.testing.assert_allclose(losses, peer_losses(peer, data, config, rates), rtol=0, atol=1e-5)
