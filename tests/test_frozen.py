"""Frozen parameters: no gradients, none made, nothing below; and the same bits for all others."""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import pytest

from fusedattn import _core, nn
from fusedattn.encoder import Encoder, EncoderConfig, MaskedLM, TextClassifier
from fusedattn.nn import Frozen, flatten, freezing, learns
from fusedattn.text import IGNORE, Dataset, pack
from fusedattn.train import Trainer, TrainingConfig
from tests.layer_cases import CASES

CONFIG = EncoderConfig(
    vocab_size=40,
    hidden_size=48,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=12,
    initializer_range=0.1,
)


def names_of(params, *beginnings):
    return {name for name in flatten(params) if name.startswith(beginnings)}


@pytest.mark.parametrize("case", [case for case in CASES if case.batch == "packed"], ids=str)
def test_a_layer_leaves_out_what_is_frozen_and_nothing_else_changes(case):
    """Each dict of a layer's parameters in turn, and then all of them."""
    call = case.call()
    params = {"layer": call.params}

    def gradients():
        y, vjp = case.run(dataclasses.replace(call, params=params["layer"]))
        return vjp(np.random.default_rng(7).standard_normal(y.shape))

    whole, *expected = gradients()
    for part in {n.rpartition(".")[0] for n in flatten(params)} | {"layer"}:
        with freezing(params, names_of(params, part + ".")):
            found, *inputs = gradients()
        left = {n: g for n, g in flatten({"layer": whole}).items() if not n.startswith(part + ".")}
        np.testing.assert_equal(flatten({"layer": found}), left)
        np.testing.assert_equal(inputs, expected)


def test_only_what_is_wholly_frozen_is_marked_and_only_within_the_block():
    encoder = Encoder(CONFIG)
    model = TextClassifier(encoder, ["a", "b"])
    before, blocks = flatten(model.params), encoder.params["blocks"]
    names = names_of(model.params, "encoder.embeddings.", "encoder.blocks.0.", "classifier.weight")
    with freezing(model.params, names):
        assert isinstance(encoder.params["embeddings"]["word"], Frozen)
        assert not learns(blocks["0"])
        assert learns(blocks["1"])
        assert learns(encoder.params)
        assert not isinstance(model.params["classifier"], Frozen)  # its bias learns
        assert all(p is before[name] for name, p in flatten(model.params).items())

    def breaks_off():
        assert not learns(model.params)
        assert not learns(encoder.params)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), freezing(model.params, set(before)):
        breaks_off()
    assert model.params["encoder"] is encoder.params
    assert learns(blocks["0"]["attention"]["qkv"])


def calls_in(vjp, dy, function="product"):
    """How often the vjp calls a function of the core."""
    with mock.patch.object(_core, function, wraps=getattr(_core, function)) as spy:
        vjp(dy)
    return spy.call_count


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("freeze", "products", "tables"),
    [
        # Two linear layers in attention, two in the feed-forward, two products each; two blocks.
        ((), 16 + 2, 3),
        (("encoder.blocks.1.attention.", "encoder.blocks.0.feed_forward.up"), 13 + 2, 3),
        (("encoder.embeddings.word", "encoder.embeddings.norm"), 16 + 2, 2),
        (("encoder.embeddings.",), 16 + 2, 0),
        (("encoder.embeddings.", "encoder.blocks.0."), 8 + 2, 0),
        (("encoder.embeddings.", "encoder.blocks."), 2, 0),
        (("encoder.",), 2, 0),
        (("encoder.", "classifier."), 1, 0),
    ],
)
def test_what_is_frozen_costs_no_product(freeze, products, tables, norm_first):
    shape = EncoderConfig(**{**vars(CONFIG), "norm_first": norm_first})
    model = TextClassifier(Encoder(shape), ["a", "b"])
    batch = pack([np.array([1, 2, 3], np.int32), np.array([4], np.int32)])
    with freezing(model.params, names_of(model.params, *freeze) if freeze else set()):
        logits, vjp = model.forward(batch)
        assert calls_in(vjp, logits) == products
        assert calls_in(vjp, logits, "scatter_sum") == tables
        found = flatten(vjp(logits)[0])
    assert found.keys() == {n for n in flatten(model.params) if not n.startswith(freeze)}


@pytest.mark.parametrize("width", [16, 48])
def test_a_tied_matrix_that_is_frozen_is_not_multiplied(isa, width):
    """The bias beside it has the same bits; there are more rows than any product sums at once."""
    rng = np.random.default_rng(0)
    params = {"head": nn.init_masked_lm_head(rng, width, 90)}
    x, word, dlogits = (
        rng.standard_normal(s, dtype=np.float32) for s in ((700, width), (90, width), (700, 90))
    )

    def gradients(**options):
        sizes = []

        def product(a, b, c, *others):
            sizes.append(c.shape)
            return whole(a, b, c, *others)

        _, vjp = nn.masked_lm_head(params["head"], x, word, **options)
        whole = _core.product
        with mock.patch.object(_core, "product", product):
            return vjp(dlogits), sizes

    (dparams, dx, dweight), sizes = gradients()
    assert dweight.shape == (90, width)
    assert (90, width) in sizes
    (learnt, dx_too, nothing), sizes = gradients(learn_weight=False)
    np.testing.assert_equal((learnt, dx_too), (dparams, dx))
    assert nothing.size == 0
    assert (90, min(width, 32)) in sizes
    with freezing(params, names_of(params, "head.")):
        (learnt, dx_too, nothing), sizes = gradients(learn_weight=False)
    assert flatten(learnt) == {}
    np.testing.assert_equal(dx_too, dx)
    assert len(sizes) == 2


def texts(count, rng):
    return [rng.integers(0, 40, n).astype(np.int32) for n in rng.integers(1, 12, count)]


def train(head, freeze):
    """The parameters after two epochs, and those before them."""
    rng = np.random.default_rng(0)
    model = MaskedLM(Encoder(CONFIG)) if head == "masked" else TextClassifier(Encoder(CONFIG), "ab")
    before = {name: p.copy() for name, p in flatten(model.params).items()}

    def hide(batch, rng):
        labels = np.where(rng.random(len(batch.ids)) < 0.5, batch.ids, IGNORE)
        return type(batch)(batch.ids, batch.cu_seqlens, labels)

    config = TrainingConfig(epochs=2, max_sentences=8, accumulate=2, freeze=freeze)
    data = Dataset(texts(40, rng), rng.integers(0, 2, 40))
    Trainer(model, config, augment=hide if head == "masked" else None).fit(data)
    assert learns(model.encoder.params["embeddings"]["word"])  # unmarked again
    return flatten(model.params), before


@pytest.mark.parametrize(
    ("head", "freeze"),
    [
        ("masked", ("encoder.embeddings.word",)),
        ("masked", ("encoder.", "head.dense")),
        ("masked", ("head.",)),
        ("classifier", ("encoder.embeddings.", "encoder.blocks.0.")),
        ("classifier", ("encoder.blocks.1.attention.qkv.weight", "encoder.blocks.0.")),
        ("classifier", ("encoder.",)),
        ("classifier", ("encoder.", "classifier")),
    ],
)
def test_training_has_the_bits_that_it_has_with_all_gradients(head, freeze):
    """Made and thrown away, they change nothing."""
    params, before = train(head, freeze)
    nothing = contextlib.nullcontext()
    with mock.patch("fusedattn.train.trainer.freezing", return_value=nothing) as spy:
        expected, _ = train(head, freeze)
    assert spy.called
    np.testing.assert_equal(params, expected)
    for name, p in params.items():
        assert np.array_equal(p, before[name]) == name.startswith(freeze), name
