"""Every layer of `fusedattn.nn`, its options and the batches it gets: what test_nn checks.

A new layer needs an entry of `TABLE` and a new option a new column of its entry: tests fail
without. Every combination is there, so that nothing depends on a draw.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from fusedattn import nn


def grid(**choices):
    """Every combination of one choice for each name, as dicts."""
    return [dict(zip(choices, c, strict=True)) for c in itertools.product(*choices.values())]


# Lengths of the packed sequences of a batch. The large one is for comparing bits: its sequences end
# inside and beyond the kernels' blocks.
BATCHES = {"one": (4,), "packed": (3, 0, 4), "single": (1, 1)}
LARGE = (5, 130, 1, 0, 300, 17)
VOCABULARY = 7


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer: ``layer(params, *inputs, **named, **options)``.

    Parameters
    ----------
    params : dict
    inputs : tuple of arrays
        What has a gradient (of integers an empty one).
    cuts : tuple of (N + 1,) arrays
        Where the sequences of each input begin and end; None: all sequences share it.
    packed : bool
        Whether the layer is told: the cuts follow the inputs.
    named : dict
        Arrays without a gradient.
    """

    params: nn.Params
    inputs: tuple[np.ndarray, ...]
    cuts: tuple[np.ndarray | None, ...]
    packed: bool = False
    named: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def of_sequence(self, n):
        """The same of sequence n alone."""
        own = [slice(None) if c is None else slice(c[n], c[n + 1]) for c in self.cuts]
        inputs = tuple(x[rows] for x, rows in zip(self.inputs, own, strict=True))
        cuts = tuple(c if c is None else np.array([0, c[n + 1] - c[n]]) for c in self.cuts)
        named = {name: a[own[0]] for name, a in self.named.items()}
        return Call(self.params, inputs, cuts, self.packed, named)


@dataclasses.dataclass(frozen=True)
class Entry:
    """The rows of one layer: each shape with each of the options, in each batch.

    Parameters
    ----------
    make : callable
        (rng, lengths, width, **shapes) -> Call; float64.
    shapes : list of dict
        What of a call is not an option: which tables there are, another width.
    options : list of dict
        Arguments by name. A row whose options ask for dropout (a `p` above 0) is given a `rng`.
    """

    make: Callable[..., Call]
    shapes: list[dict[str, object]] = dataclasses.field(default_factory=lambda: [{}])
    options: list[dict[str, object]] = dataclasses.field(default_factory=lambda: [{}])


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    layer: str
    batch: str
    shape: dict[str, object]
    options: dict[str, object]

    def __str__(self) -> str:
        chosen = {**self.shape, **self.options}
        return "-".join([self.layer, self.batch, *(f"{k}={v}" for k, v in chosen.items())])

    @property
    def drops(self) -> bool:
        return any(value for name, value in self.options.items() if name in ("p", "attention_p"))

    def call(self, lengths=None, width=4, dtype=np.float64):
        """The call's arrays, drawn alike whenever it is asked for."""
        rng, entry = np.random.default_rng(3), TABLE[self.layer]
        call = entry.make(rng, lengths or BATCHES[self.batch], width, **self.shape)

        def cast(a):  # by way of float32, so that both types see the same numbers
            return a.astype(np.float32).astype(dtype) if a.dtype.kind == "f" else a

        params = nn.unflatten({name: cast(a) for name, a in nn.flatten(call.params).items()})
        return dataclasses.replace(call, params=params, inputs=tuple(map(cast, call.inputs)))

    def run(self, call, *, drop=True, **others):
        """``y, vjp``; the same elements are dropped every time, none unless `drop`."""
        options = self.options | call.named | others
        if drop and self.drops:
            options["rng"] = np.random.default_rng(5)
        elif self.layer == "dropout":
            options["rng"] = None  # which it insists on being told
        cuts = call.cuts if call.packed else ()
        return getattr(nn, self.layer)(call.params, *call.inputs, *cuts, **options)


def drawn(rng, params):
    """Parameters of an initialisation as if they had been trained: no ones, no zeros, no order."""
    flat = {name: rng.standard_normal(a.shape) * 0.5 for name, a in nn.flatten(params).items()}
    return nn.unflatten({name: a + name.endswith("norm.weight") for name, a in flat.items()})


def rows(rng, lengths, width):
    """One input of so many rows, and where its sequences begin and end."""
    return (rng.standard_normal((sum(lengths), width)),), (bounds(lengths),)


def ids(rng, lengths):
    return (rng.integers(VOCABULARY, size=sum(lengths)),), (bounds(lengths),)


def bounds(lengths):
    return np.cumsum([0, *lengths])


def elementwise(rng, lengths, width):
    return Call({}, *rows(rng, lengths, width))


def pooling(rng, lengths, width):
    return Call({}, *rows(rng, lengths, width), packed=True)


def linear(rng, lengths, width):
    params = drawn(rng, nn.init_linear(rng, width, width + 2))
    return Call(params, *rows(rng, lengths, width))


def layer_norm(rng, lengths, width):
    params = drawn(rng, {"norm": nn.init_layer_norm(width)})
    return Call(params["norm"], *rows(rng, lengths, width))


def embedding(rng, lengths, width):
    params = drawn(rng, nn.init_embedding(rng, VOCABULARY, width))
    return Call(params, *ids(rng, lengths))


def feed_forward(rng, lengths, width):
    params = drawn(rng, nn.init_feed_forward(rng, width, width + 2))
    return Call(params, *rows(rng, lengths, width))


def self_attention(rng, lengths, width):
    params = drawn(rng, nn.init_self_attention(rng, width))
    return Call(params, *rows(rng, lengths, width), packed=True)


def cross_attention(rng, lengths, width, *, memory_width):
    params = drawn(rng, nn.init_cross_attention(rng, width, memory_width))
    (x,), (cut,) = rows(rng, lengths, width)
    longer = [n + 2 for n in lengths]
    (memory,), (memory_cut,) = rows(rng, longer, memory_width or width)
    return Call(params, (x, memory), (cut, memory_cut), packed=True)


def encoder_block(rng, lengths, width):
    params = drawn(rng, nn.init_encoder_block(rng, width, width + 2))
    return Call(params, *rows(rng, lengths, width), packed=True)


def token_embedding(rng, lengths, width, *, types):
    tables = 0 if types == "none" else 2
    params = nn.init_token_embedding(rng, VOCABULARY, max(lengths) + 2, tables, width)
    named = {"types": rng.integers(2, size=sum(lengths))} if types == "given" else {}
    return Call(drawn(rng, params), *ids(rng, lengths), packed=True, named=named)


def masked_lm_head(rng, lengths, width, *, predicted):
    params = drawn(rng, nn.init_masked_lm_head(rng, width, VOCABULARY))
    (x,), (cut,) = rows(rng, lengths, width)
    weight = rng.standard_normal((VOCABULARY, width))
    named = {"rows": rng.permutation(len(x))[: len(x) // 2]} if predicted == "half" else {}
    return Call(params, (x, weight), (cut, None), named=named)


P = (0.0, 0.25)
ACTIVATIONS = tuple(nn.ACTIVATIONS)

TABLE = {
    "cls_pool": Entry(pooling),
    "cross_attention": Entry(
        cross_attention,
        shapes=grid(memory_width=(None, 3)),
        options=grid(num_heads=(1, 2), p=P),
    ),
    "dropout": Entry(elementwise, options=grid(p=P)),
    "embedding": Entry(embedding),
    "encoder_block": Entry(
        encoder_block,
        options=grid(
            norm_first=(False, True),
            activation=ACTIVATIONS,
            p=P,
            attention_p=P,
            num_heads=(2,),
            eps=(1e-5,),
        )
        + grid(norm_first=(False, True), num_heads=(1, 4)),
    ),
    "feed_forward": Entry(feed_forward, options=grid(activation=ACTIVATIONS)),
    "gelu": Entry(elementwise),
    "gelu_tanh": Entry(elementwise),
    "layer_norm": Entry(layer_norm, options=grid(eps=(1e-12, 1e-2))),
    "linear": Entry(linear),
    "masked_lm_head": Entry(
        masked_lm_head,
        shapes=grid(predicted=("all", "half")),
        options=grid(activation=ACTIVATIONS, eps=(1e-12, 1e-2)),
    ),
    "max_pool": Entry(pooling),
    "mean_pool": Entry(pooling),
    "relu": Entry(elementwise),
    "self_attention": Entry(
        self_attention, options=grid(num_heads=(1, 2), is_causal=(False, True), p=P)
    ),
    "tanh": Entry(elementwise),
    "token_embedding": Entry(
        token_embedding,
        shapes=grid(types=("none", "left out", "given")),
        options=grid(first_position=(0, 2), p=P, eps=(1e-12, 1e-2)),
    ),
}

CASES = [
    Case(layer, batch, shape, options)
    for layer, entry in TABLE.items()
    for batch in BATCHES
    for shape in entry.shapes
    for options in entry.options
]
