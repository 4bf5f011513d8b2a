"""Folders of a model, without the libraries they come from: weights, names, files, errors."""

import json

import numpy as np
import pytest

from fusedattn.encoder import Encoder, EncoderConfig, MaskedLM, TextClassifier
from fusedattn.nn import flatten
from fusedattn.text import pack, train_tokenizer

safetensors = pytest.importorskip("safetensors", reason="folders need safetensors")
pytest.importorskip("tokenizers", reason="text needs tokenizers")
from safetensors.numpy import load_file, save_file  # noqa: E402

CONFIG = EncoderConfig(
    vocab_size=60,
    hidden_size=8,
    num_attention_heads=2,
    num_hidden_layers=1,
    intermediate_size=12,
    max_position_embeddings=16,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Some words to learn", "other Words"] * 5, 60, max_length=12)


@pytest.fixture
def encoder(tokenizer):
    return Encoder(CONFIG, tokenizer=tokenizer, seed=1, pooling="max", normalize=True)


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Change the arrays of a folder."""
    file = str(folder / "model.safetensors")
    save_file(change(load_file(file)), file)


def change_config(folder, **changes):
    change_json(folder / "config.json", **changes)


def change_json(file, **changes):
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def hidden(encoder):
    return encoder.forward(pack([np.array([2, 7, 9, 3], np.int32)]))[0]


def test_half_precision_is_widened(encoder, folder):
    rewrite(folder, lambda arrays: {n: a.astype(np.float16) for n, a in arrays.items()})
    back = Encoder.from_pretrained(folder)
    for name, p in flatten(back.params).items():
        assert p.dtype == np.float32
        np.testing.assert_array_equal(
            p, flatten(encoder.params)[name].astype(np.float16).astype(np.float32)
        )


def unknown_to_numpy(_):
    raise TypeError("data type 'bfloat16' not understood")


@pytest.mark.parametrize("numpy_knows_it", [False, True])
def test_bfloat16_is_widened(encoder, folder, numpy_knows_it, monkeypatch):
    """NumPy knows bfloat16 once anything has imported ml_dtypes, and not before."""
    if numpy_knows_it:
        pytest.importorskip("ml_dtypes", reason="has NumPy know bfloat16")
    else:
        monkeypatch.setattr("safetensors.numpy.load_file", unknown_to_numpy)
    file = folder / "model.safetensors"
    header, data = {}, b""
    for name, array in load_file(str(file)).items():
        raw = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": offsets}
        data += raw
    offsets = [len(data), len(data) + 16]
    header["position_ids"] = {"dtype": "I64", "shape": (1, 2), "data_offsets": offsets}
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data + bytes(16))
    back = Encoder.from_pretrained(folder)
    for name, p in flatten(back.params).items():
        assert p.dtype == np.float32
        bits = flatten(encoder.params)[name].view(np.uint32) & 0xFFFF0000
        np.testing.assert_array_equal(p, bits.view(np.float32), err_msg=name)


def test_other_names_and_what_is_not_asked_for(encoder, folder):
    """BERT's first layer norms had gamma and beta; a prefix, a pooler and ids change nothing."""

    def rename(arrays):
        old = {
            "bert."
            + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): a
            for n, a in arrays.items()
        }
        assert old.keys() != {f"bert.{n}" for n in arrays}
        more = {"bert.pooler.dense.weight": np.ones((8, 8), np.float32)}
        return old | more | {"bert.embeddings.position_ids": np.arange(16)}

    rewrite(folder, rename)
    np.testing.assert_array_equal(hidden(Encoder.from_pretrained(folder)), hidden(encoder))


def test_heads_round_trip(encoder, tmp_path):
    batch = pack([np.array([2, 7, 9, 3], np.int32), np.array([2, 3], np.int32)])
    for name, model in {
        "lm": MaskedLM(encoder, seed=2),
        "cls": TextClassifier(encoder, ["a", "b"], seed=2, pooling="cls"),
        "max": TextClassifier(encoder, ["a", "b"], seed=2, pooling="max"),
    }.items():
        model.save_pretrained(tmp_path / name)
        back = type(model).from_pretrained(tmp_path / name)
        np.testing.assert_equal(back.params, model.params)
        np.testing.assert_array_equal(back.forward(batch)[0], model.forward(batch)[0])
    for name, head in (("cls", "BertForSequenceClassification"), ("max", "BertModel")):
        content = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert (content["pooling"], content["architectures"]) == (name, [head])


def test_pooling_and_length_round_trip(encoder, folder):
    back = Encoder.from_pretrained(folder)
    assert (back.pooling, back.normalize) == ("max", True)
    assert back.tokenizer.truncation["max_length"] == 12
    texts = ["some words", "other words to learn " * 9, ""]
    np.testing.assert_array_equal(back.encode(texts), encoder.encode(texts))
    change_json(folder / "sentence_bert_config.json", max_seq_length=7)
    assert Encoder.from_pretrained(folder).tokenizer.truncation["max_length"] == 7
    change_json(folder / "sentence_bert_config.json", max_seq_length=99)
    assert Encoder.from_pretrained(folder).tokenizer.truncation["max_length"] == 16
    (folder / "sentence_bert_config.json").unlink()
    change_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert Encoder.from_pretrained(folder).tokenizer.truncation["max_length"] == 16


def test_pooling_of_sentence_transformers(folder):
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode": "cls"}), encoding="utf-8")  # as of version 5
    assert Encoder.from_pretrained(folder).pooling == "cls"
    for content in ({"pooling_mode": "lasttoken"}, {"pooling_mode_weightedmean_tokens": True}, {}):
        pooling.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=r"^path: expected one of \['cls', 'max', 'mean'\] in"):
            Encoder.from_pretrained(folder)
    modules = [{"idx": 0, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^path: expected Transformer, Pooling .*, got Dense$"):
        Encoder.from_pretrained(folder)


def test_vocab_txt(encoder, folder):
    tokens = sorted(encoder.tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "tokenizer.json").unlink()
    text = "\n".join(token for token, _ in tokens) + "\n"
    (folder / "vocab.txt").write_text(text, encoding="utf-8")
    texts = ["Some WORDS, to learn!", "", "ötHer x"]
    back = Encoder.from_pretrained(folder)
    assert [back.tokenizer.encode(t).ids for t in texts] == [
        encoder.tokenizer.encode(t).ids for t in texts
    ]
    change_json(folder / "tokenizer_config.json", do_lower_case=False, unk_token={"content": "x"})
    with pytest.raises(ValueError, match=r"^path: .*vocab\.txt lacks the special tokens \['x'\]"):
        Encoder.from_pretrained(folder)
    change_json(folder / "tokenizer_config.json", unk_token={"content": "[UNK]"})
    cased = Encoder.from_pretrained(folder).tokenizer
    assert cased.encode("WORDS").tokens[1] == "[UNK]"
    (folder / "vocab.txt").unlink()
    assert Encoder.from_pretrained(folder).tokenizer is None


def test_a_failed_write_leaves_what_was_there(encoder, folder, monkeypatch):
    """Also where it is the last of the files that fails; and nothing lies about afterwards."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    encoder.params["embeddings"]["word"]["weight"] += 1.0

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("fusedattn.encoder.model.write_pooling", fail)
    with pytest.raises(OSError, match="no space"):
        encoder.save_pretrained(folder)
    with pytest.raises(OSError, match="no space"):
        encoder.save_pretrained(folder.parent / "new")
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_writing_again_keeps_other_files(encoder, folder):
    (folder / "history.jsonl").write_text("{}\n", encoding="utf-8")
    encoder.params["embeddings"]["word"]["weight"] += 1.0
    encoder.save_pretrained(folder)
    assert (folder / "history.jsonl").read_text(encoding="utf-8") == "{}\n"
    np.testing.assert_equal(Encoder.from_pretrained(folder).params, encoder.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"^model_type: expected one of .*, got 'gpt2'"),
        ({"hidden_act": "silu"}, r"^hidden_act: expected one of .*, got 'silu'"),
        (
            {"position_embedding_type": "relative_key"},
            r"^position_embedding_type: expected 'absolute', got 'relative_key'",
        ),
        ({"is_decoder": True}, r"^is_decoder: expected False, got True"),
        ({"vocab_size": None}, r"^vocab_size: expected one in config\.json"),
        ({"vocab_size": 61}, r"^path: .*word_embeddings\.weight of shape \(60, 8\) and float32"),
    ],
)
def test_what_config_json_may_not_say(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(folder)


def test_files_that_are_not_whole(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"^path: .*model\.safetensors is not a whole safetensors"):
        Encoder.from_pretrained(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^path: .*config\.json is not JSON"):
        Encoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"^path: expected a folder with config\.json"):
        Encoder.from_pretrained(folder)


def test_integers_are_not_parameters(folder):
    rewrite(folder, lambda arrays: {n: a.astype(np.int8) for n, a in arrays.items()})
    with pytest.raises(ValueError, match=r"^path: .* and int8, .* and floats"):
        Encoder.from_pretrained(folder)


def test_heads_that_are_not_there_or_of_another_kind(encoder, folder, tmp_path):
    with pytest.raises(ValueError, match=r"^path: .* lacks parameters .*cls\.predictions\.bias"):
        MaskedLM.from_pretrained(folder)
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"^tie_word_embeddings: expected True in .*, got False"):
        MaskedLM.from_pretrained(folder)
    TextClassifier(encoder, ["a", "b"], pooling="cls").save_pretrained(tmp_path / "c")
    change_config(tmp_path / "c", problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"^problem_type: expected single_label_classification"):
        TextClassifier.from_pretrained(tmp_path / "c")
    change_config(tmp_path / "c", problem_type=None, id2label={"0": "a"})
    with pytest.raises(ValueError, match=r"^id2label: expected 2 labels, .* got 1"):
        TextClassifier.from_pretrained(tmp_path / "c")
    change_config(tmp_path / "c", id2label=None)
    assert TextClassifier.from_pretrained(tmp_path / "c").names == ["LABEL_0", "LABEL_1"]


def test_configurations_that_no_family_has():
    with pytest.raises(ValueError, match=r"^type_vocab_size: expected 0 with model_type 'distil"):
        EncoderConfig(9, model_type="distilbert")
    with pytest.raises(ValueError, match=r"^norm_first: expected False with model_type 'roberta'"):
        EncoderConfig(9, model_type="roberta", norm_first=True)
    with pytest.raises(ValueError, match=r"^pooling: expected one of .*, got 'sum'"):
        Encoder(CONFIG, pooling="sum")
    with pytest.raises(ValueError, match=r"^pooling: expected one of .*, got 'sum'"):
        TextClassifier(Encoder(CONFIG), ["a", "b"], pooling="sum")


def test_masked_lm_gives_the_rows_asked_for(encoder):
    model = MaskedLM(encoder, seed=2)
    batch = pack([np.array([2, 7, 9, 3], np.int32), np.array([2, 8, 3], np.int32)])
    everything = model.forward(batch)[0]
    assert everything.shape == (7, 60)
    labels = np.array([-100, 7, -100, -100, -100, 8, -100])
    chosen, vjp = model.forward(type(batch)(batch.ids, batch.cu_seqlens, labels))
    np.testing.assert_allclose(chosen, everything[[1, 5]], rtol=0, atol=1e-5)
    grads = vjp(np.ones_like(chosen))[0]
    assert flatten(grads).keys() == flatten(model.params).keys()


def test_encode_contract(encoder):
    texts = ["some words", "other words to learn to learn", "words"]
    e = encoder.encode(texts)
    assert (e.shape, e.dtype) == ((3, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1.0, atol=1e-6)
    plain = Encoder(CONFIG, encoder.params, encoder.tokenizer, pooling="cls")
    e = plain.encode(texts, batch_size=2)
    first = [
        plain.forward(pack([np.array(x.ids)]))[0][0] for x in map(plain.tokenizer.encode, texts)
    ]
    np.testing.assert_allclose(e, first, rtol=0, atol=1e-5)
    unit = plain.encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(unit, e / np.linalg.norm(e, axis=1, keepdims=True), atol=1e-6)
    assert plain.encode([]).shape == (0, 8)
    with pytest.raises(TypeError, match=r"^texts: expected a sequence of str, got one str"):
        plain.encode("some words")
    with pytest.raises(ValueError, match=r"^batch_size: expected at least 1, got 0"):
        plain.encode(texts, batch_size=0)
    with pytest.raises(ValueError, match=r"^texts: expected a model with a tokenizer"):
        Encoder(CONFIG).encode(texts)
