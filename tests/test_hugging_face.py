"""Folders of transformers and sentence-transformers: read as they mean, written so that they load.

The models of transformers are made here, small and random; the tests that need the library, or the
package that carries a real MiniLM, are skipped where they are not installed.
"""

import numpy as np
import pytest

from fusedattn.encoder import Encoder, EncoderConfig, MaskedLM, TextClassifier
from fusedattn.nn import flatten
from fusedattn.text import Dataset, pack, train_tokenizer
from fusedattn.train import Trainer, TrainingConfig

pytest.importorskip("safetensors", reason="folders need safetensors")
torch = pytest.importorskip("torch", reason="compares with PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCABULARY, WIDTH = 40, 24
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": WIDTH,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 36,
    "max_position_embeddings": 20,
    "initializer_range": 0.3,
}
ROBERTA = {**SHAPE, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
FAMILIES = {
    "bert": ("Bert", SHAPE),
    "bert, tanh GELU": ("Bert", {**SHAPE, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "roberta": ("Roberta", ROBERTA),
    "roberta-prelayernorm": ("RobertaPreLayerNorm", ROBERTA),
    "distilbert": ("DistilBert", DISTILBERT),
}
HEADS = {
    "encoder": ("Model", Encoder),
    "classifier": ("ForSequenceClassification", TextClassifier),
    "masked_lm": ("ForMaskedLM", MaskedLM),
}
LENGTHS = (7, 1, 18, 4)  # 18: the longest for which RoBERTa's 20 positions suffice


def their_model(family, head):
    """A random model of transformers, its biases and layer norms random too."""
    name, shape = FAMILIES[family]
    torch.manual_seed(0)
    labels = {"num_labels": 3} if head == "classifier" else {}
    model = getattr(transformers, name + HEADS[head][0])(
        getattr(transformers, f"{name}Config")(**shape, **labels)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def sentences():
    rng = np.random.default_rng(0)
    return [rng.integers(5, VOCABULARY, n).astype(np.int32) for n in LENGTHS]


def their_answer(model, texts, pad=0):
    """Hidden states or logits, padded as usual; of each token one after the other, or a text."""
    ids = torch.full((len(texts), max(map(len, texts))), pad)
    seen = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text)
        seen[row, : len(text)] = 1
    with torch.no_grad():
        answer = model(input_ids=ids, attention_mask=seen)[0].numpy()
    if answer.ndim == 2:
        return answer
    return np.concatenate([a[: len(t)] for a, t in zip(answer, texts, strict=True)])


def our_answer(model, texts):
    answer = model.forward(pack(texts))
    return answer[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(family, head, tmp_path):
    theirs = their_model(family, head)
    theirs.save_pretrained(tmp_path)
    ours = HEADS[head][1].from_pretrained(tmp_path)
    pad = theirs.config.pad_token_id
    expected = their_answer(theirs, sentences(), pad)
    np.testing.assert_allclose(our_answer(ours, sentences()), expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 0.5  # not a comparison of nothing with nothing


def our_model(family, head):
    config = EncoderConfig.from_dict(
        {**FAMILIES[family][1], "model_type": family.partition(",")[0], "hidden_dropout_prob": 0.0}
    )
    encoder = Encoder(config, seed=3)
    if head == "encoder":
        return encoder
    model = (
        MaskedLM(encoder, seed=4)
        if head == "masked_lm"
        else TextClassifier(encoder, ["a", "b", "c"], seed=4, pooling="cls")
    )
    rng = np.random.default_rng(5)
    for p in flatten(model.params).values():
        p += 0.1 * rng.standard_normal(p.shape, dtype=np.float32)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dropouts_are_read_and_written(family, tmp_path):
    name, shape = FAMILIES[family]
    keys = (
        ("dropout", "attention_dropout")
        if name == "DistilBert"
        else ("hidden_dropout_prob", "attention_probs_dropout_prob")
    )
    config = getattr(transformers, f"{name}Config")(
        **shape, **dict(zip(keys, (0.3, 0.2), strict=True))
    )
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / "theirs")
    ours = Encoder.from_pretrained(tmp_path / "theirs")
    found = ours.config.hidden_dropout_prob, ours.config.attention_probs_dropout_prob
    assert found == (0.3, 0.2)
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert [getattr(back, key) for key in keys] == [0.3, 0.2]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_is_written(family, head, tmp_path):
    ours = our_model(family, head)
    ours.save_pretrained(tmp_path)
    auto = {
        "encoder": transformers.AutoModel,
        "classifier": transformers.AutoModelForSequenceClassification,
        "masked_lm": transformers.AutoModelForMaskedLM,
    }
    theirs, report = auto[head].from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not [key for key in report["missing_keys"] if "pooler" not in key]
    assert type(theirs).__name__ == FAMILIES[family][0] + HEADS[head][0]
    pad = theirs.config.pad_token_id
    expected = their_answer(theirs.eval(), sentences(), pad)
    np.testing.assert_allclose(our_answer(ours, sentences()), expected, rtol=0, atol=1e-4)
    back = type(ours).from_pretrained(tmp_path)
    np.testing.assert_equal(flatten(back.params), flatten(ours.params))


def test_the_tokenizer_of_transformers_agrees(tmp_path):
    pytest.importorskip("tokenizers", reason="text needs tokenizers")
    tokenizer = train_tokenizer(["some words to learn"] * 5, VOCABULARY, max_length=9)
    config = EncoderConfig.from_dict({**SHAPE, "vocab_size": tokenizer.get_vocab_size()})
    Encoder(config, tokenizer=tokenizer).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.model_max_length, theirs.mask_token) == (9, "[MASK]")
    texts = ["Some words, to learn", "", "words " * 20]
    assert theirs(texts, truncation=True)["input_ids"] == [tokenizer.encode(t).ids for t in texts]


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_classifier_trained_here_classifies_the_same_there(norm_first, tmp_path):
    """From a str to logits, tokenizer included, after training."""
    texts = ["some good words", "bad words to learn", "good", "so bad, so very bad"] * 4
    labels = ["good" if "good" in text else "bad" for text in texts]
    tokenizer = train_tokenizer(texts, VOCABULARY, max_length=9)
    shape = {**SHAPE, "vocab_size": tokenizer.get_vocab_size(), "norm_first": norm_first}
    encoder = Encoder(EncoderConfig(**shape), tokenizer=tokenizer)
    model = TextClassifier(encoder, ["bad", "good"], pooling="cls")
    data = Dataset.from_texts(tokenizer, texts, labels, model.names)
    Trainer(model, TrainingConfig(epochs=5), show_progress_bar=False).fit(data)
    assert model.predict(texts) == labels
    model.save_pretrained(tmp_path)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        texts, truncation=True, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = theirs(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    np.testing.assert_allclose(
        our_answer(model, data.sequences), expected.numpy(), rtol=0, atol=1e-4
    )
