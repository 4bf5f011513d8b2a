"""The encoder and the classifier: gradients, independence of the batch, folders."""

import json

import numpy as np
import pytest

from fusedattn.encoder import (
    Encoder,
    EncoderConfig,
    TextClassifier,
    encoder_shapes,
    hidden_states,
    init_encoder,
)
from fusedattn.nn import draw, flatten, map_leaves, unflatten
from fusedattn.text import pack, train_tokenizer

CONFIG = EncoderConfig(
    vocab_size=30,
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    hidden_dropout_prob=0.0,
    initializer_range=0.3,
)
NORMS = [False, True]


def config(**changes):
    return EncoderConfig(**{**vars(CONFIG), **changes})


def sequences(count, rng):
    return [rng.integers(0, 30, n).astype(np.int32) for n in rng.integers(1, 20, count)]


@pytest.mark.parametrize("norm_first", NORMS)
def test_gradients_of_the_whole_classifier(norm_first):
    shape = config(norm_first=norm_first, hidden_size=4, intermediate_size=6, layer_norm_eps=1e-5)
    model = TextClassifier(Encoder(shape), ["a", "b", "c"])
    wide = {name: p.astype(np.float64) for name, p in flatten(model.params).items()}
    model.params = unflatten(wide)
    model.encoder.params = model.params["encoder"]
    rng = np.random.default_rng(0)
    batch = pack([np.array(s, np.int32) for s in ([1, 2, 1], [3], [2, 4, 2, 5])])
    logits, vjp = model.forward(batch)
    dlogits = rng.standard_normal(logits.shape)
    grads = flatten(vjp(dlogits)[0])
    assert set(grads) == set(wide)
    for name, p in flatten(model.params).items():
        direction = rng.standard_normal(p.shape)
        kept = p.copy()
        values = []
        for step in (1e-5, -1e-5):
            p[...] = kept + step * direction
            values.append(np.vdot(model.forward(batch)[0], dlogits))
        p[...] = kept
        slope = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(
            np.vdot(grads[name], direction), slope, rtol=1e-6, atol=1e-8, err_msg=name
        )


@pytest.mark.parametrize("norm_first", NORMS)
def test_a_text_does_not_depend_on_its_batch(norm_first):
    encoder = Encoder(config(norm_first=norm_first))
    texts = sequences(40, np.random.default_rng(0))
    together, _ = encoder.forward(pack(texts))
    start = 0
    for text in texts:
        alone, _ = encoder.forward(pack([text]))
        np.testing.assert_array_equal(together[start : start + len(text)], alone)
        start += len(text)
    assert start == len(together)


def test_order_of_tokens_matters():
    encoder = Encoder(CONFIG)
    one, _ = encoder.forward(pack([np.array([1, 2, 3], np.int32)]))
    other, _ = encoder.forward(pack([np.array([3, 2, 1], np.int32)]))
    assert np.abs(one[1] - other[1]).max() > 1e-3


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_only_with_an_rng(where):
    encoder = Encoder(config(**{where: 0.5}))
    batch = pack(sequences(3, np.random.default_rng(0)))
    quiet, again = encoder.forward(batch)[0], encoder.forward(batch)[0]
    noisy = encoder.forward(batch, np.random.default_rng(0))[0]
    np.testing.assert_array_equal(quiet, again)
    assert np.abs(noisy - quiet).max() > 0.1


def test_empty_batch():
    hidden, vjp = Encoder(CONFIG).forward(pack([]))
    assert hidden.shape == (0, 16)
    assert all(not g.any() for g in flatten(vjp(hidden)[0]).values())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 30], r"^ids: expected values in \[0, 30\), got 1 to 30"),
        ([-1, 3], r"^ids: expected values in \[0, 30\), got -1 to 3"),
        ([1] * 21, r"^cu_seqlens: expected sequences of at most 20 tokens .* got one of 21"),
    ],
)
def test_bad_tokens(ids, message):
    with pytest.raises(ValueError, match=message):
        Encoder(CONFIG).forward(pack([np.array(ids, np.int32)]))


def test_bad_configurations():
    with pytest.raises(ValueError, match=r"^hidden_size: expected a multiple .*\(3\), got 16"):
        config(num_attention_heads=3)
    with pytest.raises(ValueError, match=r"^hidden_act: expected one of .*, got 'swish'"):
        config(hidden_act="swish")
    for key, value, expected in (
        ("num_attention_heads", 0, "at least 1"),
        ("num_hidden_layers", -1, "at least 0"),
        ("intermediate_size", 0, "at least 1"),
        ("hidden_dropout_prob", 1.0, r"a probability in \[0, 1\)"),
        ("attention_probs_dropout_prob", -0.5, r"a probability in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=rf"^{key}: expected {expected}, got {value}"):
            config(**{key: value})


@pytest.fixture
def classifier():
    pytest.importorskip("safetensors", reason="folders need safetensors")
    pytest.importorskip("tokenizers", reason="text needs tokenizers")
    tokenizer = train_tokenizer(["some words to learn", "other words"] * 5, 60, max_length=20)
    shape = config(vocab_size=tokenizer.get_vocab_size())
    return TextClassifier(Encoder(shape, tokenizer=tokenizer, seed=1), ["yes", "no"], seed=1)


TEXTS = ["some words", "", "words to other words learn"]


@pytest.mark.parametrize("norm_first", NORMS)
def test_classifier_round_trip(classifier, norm_first, tmp_path):
    encoder = classifier.encoder
    shape = EncoderConfig(**{**vars(encoder.config), "norm_first": norm_first})
    classifier = TextClassifier(Encoder(shape, tokenizer=encoder.tokenizer), ["yes", "no"])
    classifier.save_pretrained(tmp_path / "model")
    back = TextClassifier.from_pretrained(tmp_path / "model")
    assert back.names == classifier.names
    assert back.encoder.config == shape
    np.testing.assert_equal(back.params, classifier.params)
    assert list(flatten(back.params)) == list(flatten(classifier.params))
    proba = classifier.predict_proba(TEXTS)
    np.testing.assert_array_equal(back.predict_proba(TEXTS), proba)
    assert back.predict(TEXTS) == [["yes", "no"][i] for i in proba.argmax(axis=1)]


def test_folder_holds_berts_names_and_no_pickle(classifier, tmp_path):
    from safetensors.numpy import load_file

    classifier.save_pretrained(tmp_path)
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    arrays = load_file(str(tmp_path / "model.safetensors"))
    assert arrays["bert.embeddings.word_embeddings.weight"].shape[1] == 16
    for part in ("query", "key", "value"):
        assert arrays[f"bert.encoder.layer.1.attention.self.{part}.weight"].shape == (16, 16)
    block = {n.split("layer.0.")[1] for n in arrays if "layer.0." in n and n.endswith(".weight")}
    assert block == {
        "attention.self.query.weight",
        "attention.self.key.weight",
        "attention.self.value.weight",
        "attention.output.dense.weight",
        "attention.output.LayerNorm.weight",
        "intermediate.dense.weight",
        "output.dense.weight",
        "output.LayerNorm.weight",
    }
    assert arrays["classifier.weight"].shape == (2, 16)
    content = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert content["id2label"] == {"0": "yes", "1": "no"}
    assert content["hidden_size"] == 16


def test_encoder_round_trip_and_from_a_classifier(classifier, tmp_path):
    encoder = classifier.encoder
    encoder.save_pretrained(tmp_path / "encoder")
    classifier.save_pretrained(tmp_path / "classifier")
    for folder in ("encoder", "classifier"):
        back = Encoder.from_pretrained(tmp_path / folder)
        np.testing.assert_equal(back.params, encoder.params)
        assert back.tokenizer.to_str() == encoder.tokenizer.to_str()


def test_what_an_encoder_does_not_use_is_passed_over():
    content = {**vars(CONFIG), "model_type": "bert", "use_cache": True}
    assert EncoderConfig.from_dict(content) == CONFIG


def test_folder_errors(classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: expected a folder with config\.json"):
        Encoder.from_pretrained(tmp_path)
    classifier.encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^path: expected a folder of a classifier"):
        TextClassifier.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^path: .* lacks parameters .*layer\.2\.attention"):
        Encoder.from_pretrained(tmp_path)
    file.write_text(json.dumps({**content, "intermediate_size": 25}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"^path: .* has .*layer\.0\.intermediate\.dense\.weight of"
    ):
        Encoder.from_pretrained(tmp_path)


def test_prediction_needs_a_tokenizer():
    model = TextClassifier(Encoder(CONFIG), ["a", "b"])
    with pytest.raises(ValueError, match=r"^texts: expected a model with a tokenizer"):
        model.predict(["x"])


@pytest.mark.parametrize("norm_first", NORMS)
def test_parameters_have_the_shapes_that_a_configuration_states(norm_first):
    """Scales start from 1, biases from 0, matrices from chance; all of them float32."""
    shapes = encoder_shapes(config(norm_first=norm_first, num_hidden_layers=1))
    assert ("norm" in shapes) == norm_first
    assert shapes["embeddings"]["word"] == {"weight": (30, 16)}
    assert shapes["blocks"]["0"]["attention"]["qkv"] == {"weight": (48, 16), "bias": (48,)}
    params = draw(np.random.default_rng(0), shapes, 0.3)
    assert flatten(map_leaves(lambda _, p: p.shape, params)) == flatten(shapes)
    for name, p in flatten(params).items():
        assert p.dtype == np.float32
        if p.ndim == 1:
            assert (p == name.endswith("norm.weight")).all(), name
        else:
            assert abs(p.std() - 0.3) < 0.1, name
            assert abs(p.mean()) < 0.1, name


def test_an_encoder_of_no_blocks_is_read_back(tmp_path):
    pytest.importorskip("safetensors", reason="folders need safetensors")
    encoder = Encoder(config(num_hidden_layers=0))
    encoder.save_pretrained(tmp_path)
    np.testing.assert_equal(Encoder.from_pretrained(tmp_path).params, encoder.params)


def test_start_depends_on_the_seed_alone():
    one, again, other = (flatten(Encoder(CONFIG, seed=s).params) for s in (1, 1, 2))
    np.testing.assert_equal(one, again)
    assert not np.array_equal(one["embeddings.word.weight"], other["embeddings.word.weight"])
    spread = init_encoder(np.random.default_rng(0), config(initializer_range=0.1))
    assert abs(flatten(spread)["blocks.0.attention.qkv.weight"].std() - 0.1) < 0.01
    hidden, _ = hidden_states(spread, CONFIG, np.array([1, 2]), np.array([0, 2]))
    assert hidden.shape == (2, 16)
