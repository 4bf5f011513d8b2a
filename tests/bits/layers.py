"""Calls of layers, losses and the optimizer, and a training run of a few steps."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fusedattn
from fusedattn import nn
from fusedattn.encoder import Encoder, EncoderConfig, MaskedLM, TextClassifier
from fusedattn.losses import binary_cross_entropy, cross_entropy
from fusedattn.optim import AdamW
from fusedattn.text import Batch, Dataset
from fusedattn.train import Trainer, TrainingConfig
from tests.bits.attention import Case, Results
from tests.bits.draw import DTYPES, Draw, in_memory

REALS = {name: DTYPES[name] for name in ("float32", "float64")}
ROWS = (1, 2, 3, 5, 8, 17, 64, 129)
WIDTHS = (1, 3, 8, 15, 16, 17, 31, 33, 48, 64, 100, 130, 256)
LARGE = (
    (130, 700, 260),
    (512, 300, 100),
    (40, 384, 384),
    (300, 300, 300),
    (1, 600, 700),
    (256, 64, 512),
)
TOKENS = [0, 7, 7, 40, 41, 64]


def fill(params: nn.Params, draw: Draw, dtype: Any, reach: float = 0.5) -> nn.Params:
    """Parameters of these names and shapes, of drawn numbers."""
    drawn = {n: draw.numbers(p.shape, dtype, reach) for n, p in nn.leaves(params)}
    return nn.unflatten({n: x + 1 if "norm.weight" in n else x for n, x in drawn.items()})


def both_ways(call: Callable[[], Any], draw: Draw, added: bool = False) -> Results:
    """y and every gradient of a layer called by ``call``."""
    y, vjp = call()
    dy = draw.numbers(y.shape, y.dtype)
    dparams, *dinputs = vjp(dy, draw.numbers(y.shape, y.dtype)) if added else vjp(dy)
    return {"y": y, **nn.flatten(dparams), **{f"dx{n}": x for n, x in enumerate(dinputs)}}


def linears() -> Iterator[Case]:
    small = itertools.product((1, 3, 6, 16, 33, 130), (1, 8, 17, 64, 100), (1, 7, 16, 33, 64, 200))
    sizes = [each for n, each in enumerate(small) if n % 3 == 0 or each[0] == 33]
    turns = itertools.product((*sizes, *LARGE), REALS.items())
    for n, ((rows, inputs, outputs), (name, dtype)) in enumerate(turns):
        case = functools.partial(linear, dtype, rows, inputs, outputs, n // 2)
        yield f"linear/{name}/{rows} {inputs} {outputs}", case


def linear(dtype: Any, rows: int, inputs: int, outputs: int, n: int) -> Results:
    draw = Draw(n, 1)
    params = fill(nn.init_linear(np.random.default_rng(0), inputs, outputs), draw, dtype)
    how = ("contiguous", "padded", "every other")[n % 3]
    x = in_memory(draw.numbers((rows, inputs), dtype), how)
    added = draw.numbers((rows, outputs), dtype) if n % 2 else None
    return both_ways(
        lambda: nn.linear(params, x, added=added), draw, bool(n % 2) and inputs == outputs
    )


def elementwise() -> Iterator[Case]:
    for name, (rows, width) in itertools.product(REALS, itertools.product(ROWS, WIDTHS)):
        for kind in ("layer norm", "activations", "dropout", "loss"):
            case = functools.partial(ELEMENTWISE[kind], REALS[name], rows, width)
            yield f"{kind}/{name}/{rows} {width}", case


def layer_norm(dtype: Any, rows: int, width: int) -> Results:
    draw = Draw(rows, width, 2)
    params = fill({"weight": np.empty(width), "bias": np.empty(width)}, draw, dtype)
    x = draw.numbers((rows, width), dtype) + dtype.type(rows % 3)
    return both_ways(lambda: nn.layer_norm(params, x, 1e-5), draw)


def activations(dtype: Any, rows: int, width: int) -> Results:
    """All of them, on both sides of where they are flat; tanh is NumPy's own."""
    draw = Draw(rows, width, 3)
    x = draw.numbers((rows, width), dtype, (1.0, 8.0, 32.0)[(rows + width) % 3])
    x.reshape(-1)[::29] = (0.0, -0.0, np.inf, -np.inf, np.nan)[width % 5]
    results: Results = {}
    for layer in (nn.relu, nn.gelu, nn.gelu_tanh, nn.tanh):
        found = both_ways(functools.partial(layer, {}, x), draw)
        results |= {f"{layer.__name__} {name}": value for name, value in found.items()}
    return results


def dropout(dtype: Any, rows: int, width: int) -> Results:
    draw = Draw(rows, width, 4)
    x, added = draw.numbers((rows, width), dtype), draw.numbers((rows, width), dtype)
    p = (0.1, 0.5, 0.9)[width % 3]
    given = {"added": added if rows % 2 else None}
    return both_ways(lambda: nn.dropout({}, x, p, np.random.default_rng(rows), **given), draw)


def loss(dtype: Any, rows: int, width: int) -> Results:
    draw = Draw(rows, width, 5)
    logits, labels = draw.numbers((rows, width), dtype, 8.0), draw.below(width, (rows,))
    labels[::5] = -100
    weights = abs(draw.numbers((width,), dtype)) if width % 2 else None
    value, vjp = cross_entropy(logits, labels, (0.0, 0.1)[rows % 2], weights)
    yes = draw.below(2, logits.shape)
    other, other_vjp = binary_cross_entropy(logits, yes)
    both = np.array([value, other])
    return {"loss": both, "dlogits": vjp(1.0), "binary dlogits": other_vjp(1.0)}


ELEMENTWISE: dict[str, Callable[..., Results]] = {
    "layer norm": layer_norm,
    "activations": activations,
    "dropout": dropout,
    "loss": loss,
}


def blocks() -> Iterator[Case]:
    """Layers that are made of others, over a packed batch."""
    turns = itertools.product(("gelu", "gelu_new", "relu"), (False, True), (0.0, 0.2), (8, 24, 64))
    for (activation, first, p, width), name in itertools.product(turns, REALS):
        given = {"activation": activation, "norm_first": first, "p": p, "attention_p": p}
        case = functools.partial(block, REALS[name], width, given)
        yield f"encoder block/{name}/{activation} {first} {p} {width}", case
    for (kind, run), name, width in itertools.product(COMPOSED.items(), REALS, (4, 16, 33, 96)):
        yield f"{kind}/{name}/{width}", functools.partial(run, REALS[name], width)


def block(dtype: Any, width: int, given: dict[str, Any]) -> Results:
    draw, cu = Draw(width, 6), np.array(TOKENS)
    params = fill(nn.init_encoder_block(np.random.default_rng(0), width, 2 * width), draw, dtype)
    x, rng = draw.numbers((cu[-1], width), dtype), np.random.default_rng(5)
    return both_ways(lambda: nn.encoder_block(params, x, cu, 2, rng=rng, **given), draw)


def attentions(dtype: Any, width: int) -> Results:
    draw, cu, memory_cu = Draw(width, 7), np.array(TOKENS), np.array([0, 3, 10, 10, 31, 50])
    heads, rng = 1 + (width % 2 == 0), np.random.default_rng(0)
    own = fill(nn.init_self_attention(rng, width), draw, dtype)
    cross = fill(nn.init_cross_attention(rng, width, 5), draw, dtype)
    x, memory = draw.numbers((cu[-1], width), dtype), draw.numbers((50, 5), dtype)
    found = both_ways(lambda: nn.self_attention(own, x, cu, heads, is_causal=True), draw, True)
    other = both_ways(lambda: nn.cross_attention(cross, x, memory, cu, memory_cu, heads), draw)
    return {**found, **{f"cross {name}": value for name, value in other.items()}}


def embeddings(dtype: Any, width: int) -> Results:
    draw, cu = Draw(width, 8), np.array(TOKENS)
    params = fill(nn.init_token_embedding(np.random.default_rng(0), 11, 40, 2, width), draw, dtype)
    ids, types = draw.below(11, (cu[-1],)), draw.below(2, (cu[-1],))
    rng = np.random.default_rng(3)
    given = {"types": types, "first_position": 2, "eps": 1e-5, "p": 0.1, "rng": rng}
    found = both_ways(lambda: nn.token_embedding(params, ids, cu, **given), draw)
    other = both_ways(lambda: nn.embedding(params["word"], ids), draw)
    return {**found, **{f"plain {name}": value for name, value in other.items()}}


def masked_lm_head(dtype: Any, width: int) -> Results:
    draw = Draw(width, 9)
    params = fill(nn.init_masked_lm_head(np.random.default_rng(0), width, 37), draw, dtype)
    x, table = draw.numbers((40, width), dtype), draw.numbers((37, width), dtype)
    rows = np.flatnonzero(draw.chance(0.4, (40,)))
    return both_ways(lambda: nn.masked_lm_head(params, x, table, rows, eps=1e-5), draw)


def feed_forward(dtype: Any, width: int) -> Results:
    draw = Draw(width, 10)
    params = fill(nn.init_feed_forward(np.random.default_rng(0), width, 50), draw, dtype)
    x, added = draw.numbers((40, width), dtype), draw.numbers((40, width), dtype)
    return both_ways(lambda: nn.feed_forward(params, x, "gelu", added=added), draw, True)


def pooling(dtype: Any, width: int) -> Results:
    """In NumPy."""
    draw, cu = Draw(width, 11), np.array(TOKENS)
    x = draw.numbers((cu[-1], width), dtype)
    results: Results = {}
    for name, pool in nn.POOLINGS.items():
        found = both_ways(functools.partial(pool, {}, x, cu), draw)
        results |= {f"{name} {key}": value for key, value in found.items()}
    return results


def adamw(dtype: Any, width: int) -> Results:
    draw = Draw(width, 12)
    params = {"a": draw.numbers((7, width), dtype), "b": draw.numbers((width,), dtype)}
    optimizer = AdamW(params, weight_decay=0.1)
    for step in range(3):
        optimizer.step(fill(params, draw, dtype, 2.0 ** (step - 1)), 0.01, (1.0, 0.3, 1.0)[step])
    return {"p": params["a"], "bias": params["b"], "m": optimizer.m["a"], "v": optimizer.v["a"]}


COMPOSED: dict[str, Callable[..., Results]] = {
    "attention layers": attentions,
    "embeddings": embeddings,
    "masked lm head": masked_lm_head,
    "feed forward": feed_forward,
    "pooling": pooling,
    "adamw": adamw,
}


def large() -> Iterator[Case]:
    """Enough work for three threads."""
    for name, dtype in REALS.items():
        yield f"three threads/{name}/layers", functools.partial(three_threads, dtype)


def three_threads(dtype: Any) -> Results:
    draw, rng = Draw(13), np.random.default_rng(0)
    params = fill(nn.init_linear(rng, 200, 300), draw, dtype)
    x = draw.numbers((700, 200), dtype)
    results: Results = {}
    ids = draw.below(300, (900,))
    chosen: dict[str, Callable[[], Any]] = {
        "linear": lambda: nn.linear(params, x),
        "norm": lambda: nn.layer_norm({"weight": x[0] + 1, "bias": x[1]}, x),
        "gelu": lambda: nn.gelu({}, x),
        "dropout": lambda: nn.dropout({}, x, 0.3, np.random.default_rng(1)),
        "embedding": lambda: nn.embedding({"weight": params["weight"]}, ids),
    }
    fusedattn.set_num_threads(3)
    try:
        for name, layer in chosen.items():
            found = both_ways(layer, draw)
            results |= {f"{name} {key}": value for key, value in found.items()}
    finally:
        fusedattn.set_num_threads(None)
    return results


def training() -> Iterator[Case]:
    for first in (False, True):
        yield f"training/float32/classifier {first}", functools.partial(train, first)
    yield "training/float32/masked lm", masked_lm


def small(first: bool) -> Encoder:
    config = EncoderConfig(
        vocab_size=20,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        attention_probs_dropout_prob=0.1,
        norm_first=first,
    )
    return Encoder(config, fill(Encoder(config).params, Draw(15), np.float32, 0.25))


def train(first: bool) -> Results:
    """A classifier through the whole trainer; gradients are not clipped, as NumPy's BLAS does."""
    draw = Draw(16)
    sequences = [draw.below(20, (1 + draw.below(12),)).astype(np.int32) for _ in range(24)]
    model = TextClassifier(small(first), ["a", "b"])
    model.params |= fill({"classifier": model.params["classifier"]}, draw, np.float32)
    config = TrainingConfig(epochs=2, learning_rate=0.01, max_sentences=8, max_grad_norm=None)
    Trainer(model, config, show_progress_bar=False).fit(Dataset(sequences, draw.below(2, (24,))))
    return nn.flatten(model.params)


def masked_lm() -> Results:
    """Steps by hand, whose gradients of a tied table have two parts."""
    draw = Draw(17)
    model = MaskedLM(small(False))
    model.params["head"] |= fill(model.params["head"], draw, np.float32)
    optimizer, rng = AdamW(model.params), np.random.default_rng(2)
    for _ in range(3):
        ids, labels = draw.below(20, (30,)), draw.below(20, (30,))
        labels[draw.chance(0.6, (30,))] = -100
        logits, vjp = model.forward(
            Batch(ids.astype(np.int32), np.array([0, 9, 20, 30]), labels), rng
        )
        dlogits = cross_entropy(logits, labels[labels >= 0])[1](1.0)
        optimizer.step(vjp(dlogits)[0], 0.01)
    return nn.flatten(model.params)


def cases() -> Iterator[Case]:
    for part in (linears, elementwise, blocks, large, training):
        yield from part()
