"""Two linear layers with an activation between them."""

from __future__ import annotations

from collections.abc import Callable

from fusedattn.nn._core_ops import empty, product, rows_of
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import VJP, Array, Params, ResidualVJP, Rng, Shapes
from fusedattn.nn.gelu import gelu
from fusedattn.nn.gelu_tanh import gelu_tanh
from fusedattn.nn.linear import linear_shapes, weight_gradients
from fusedattn.nn.relu import relu

# By the names of `hidden_act` in a Hugging Face config.json.
ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": relu,
}


def activation_of(name: str) -> Callable[[Params, Array], tuple[Array, VJP]]:
    """The layer of that name among `ACTIVATIONS`, or a ValueError."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def feed_forward_shapes(width: int, inner: int) -> Shapes:
    """A linear layer ``up`` from width to inner and one ``down`` back."""
    return {"up": linear_shapes(width, inner), "down": linear_shapes(inner, width)}


def init_feed_forward(rng: Rng, width: int, inner: int, std: float = 0.02) -> Params:
    """Parameters of `feed_forward_shapes`: weights drawn from N(0, std²), biases 0; float32."""
    return draw(rng, feed_forward_shapes(width, inner), std)


def feed_forward(
    params: Params, x: Array, activation: str = "gelu", *, added: Array | None = None
) -> tuple[Array, ResidualVJP]:
    """down(activation(up(x))), row by row.

    Parameters
    ----------
    params : dict
        As from `init_feed_forward`.
    x : array (T, width)
    activation : str, default "gelu"
        A key of `ACTIVATIONS`.
    added : array (T, width), optional
        Joins y in the same pass; its gradient is dy.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx); a second argument joins dx.
    """
    up, down, x = params["up"], params["down"], rows_of(x)
    name = activation_of(activation).__name__
    slope = empty((len(x), len(up["bias"])), x.dtype)
    a = product(x, up["weight"].T, bias=up["bias"], then=name, slope=slope)
    y = product(a, down["weight"].T, bias=down["bias"], added=added)

    def vjp(dy: Array, added: Array | None = None) -> tuple[Params, Array]:
        dy = rows_of(dy)
        ddown = weight_gradients(down, dy, a)
        dh = product(dy, down["weight"], then="times", slope=slope)
        dup = weight_gradients(up, dh, x)
        return {"up": dup, "down": ddown}, product(dh, up["weight"], added=added)

    return y, vjp
