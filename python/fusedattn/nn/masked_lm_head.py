"""BERT's masked-language-model head (arXiv:1810.04805), tied to the word embedding."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._core_ops import empty, product, rows_of
from fusedattn.nn._frozen import Frozen
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import VJP2, Array, Params, Rng, Shapes
from fusedattn.nn.feed_forward import activation_of
from fusedattn.nn.layer_norm import layer_norm, layer_norm_shapes
from fusedattn.nn.linear import linear_shapes, weight_gradients

# The bias's gradient comes with a product of its own left side, whatever the right. With as many
# columns as this the product is made in the same way as one of all columns: its sums have the same
# bits, on tiles too.
_COLUMNS = 32


def masked_lm_head_shapes(width: int, vocab_size: int) -> Shapes:
    """A linear layer ``dense`` and a layer norm ``norm`` of `width`, and ``bias`` (vocab_size,)."""
    return {
        "dense": linear_shapes(width, width),
        "norm": layer_norm_shapes(width),
        "bias": (vocab_size,),
    }


def init_masked_lm_head(rng: Rng, width: int, vocab_size: int, std: float = 0.02) -> Params:
    """Parameters of `masked_lm_head_shapes`: the matrix from N(0, std²), scale 1, biases 0."""
    return draw(rng, masked_lm_head_shapes(width, vocab_size), std)


def masked_lm_head(
    params: Params,
    x: Array,
    weight: Array,
    rows: Array | None = None,
    *,
    activation: str = "gelu",
    eps: float = 1e-12,
    learn_weight: bool = True,
) -> tuple[Array, VJP2]:
    """norm(activation(dense(x))) weightᵀ + bias, for the chosen rows alone.

    Sharing the matrix between input and output is due to Press and Wolf (arXiv:1608.05859).

    Parameters
    ----------
    params : dict
        As from `init_masked_lm_head`.
    x : array (T, width)
    weight : array (vocab_size, width)
        The word embedding.
    rows : int array (M,), optional
        Which rows of `x` to predict, each at most once; by default all. In pre-training they are
        the masked 15 %, and the others cost nothing.
    activation, eps
        A key of `fusedattn.nn.ACTIVATIONS`, and of the layer norm.
    learn_weight : bool, default True
        Whether the vjp makes the gradient of `weight`; without, it is an empty array.

    Returns
    -------
    logits : array (M, vocab_size)
    vjp : callable
        dlogits (M, vocab_size) -> (dparams, dx, dweight).
    """
    dense, chosen = params["dense"], rows_of(x if rows is None else x[rows])
    weight = rows_of(weight)
    slope = empty((len(chosen), len(dense["bias"])), x.dtype)
    name = activation_of(activation).__name__
    a = product(chosen, dense["weight"].T, bias=dense["bias"], then=name, slope=slope)
    n, norm_vjp = layer_norm(params["norm"], a, eps)
    logits = product(n, weight.T, bias=params["bias"])

    def vjp(dlogits: Array) -> tuple[Params, Array, Array]:
        dlogits = rows_of(dlogits)
        dbias = np.empty(dlogits.shape[1], dlogits.dtype)
        dweight = np.empty((0,), dlogits.dtype)
        if learn_weight:
            dweight = product(dlogits.T, n, row_sums=dbias)
        elif not isinstance(params, Frozen):
            product(dlogits.T, n[:, :_COLUMNS], row_sums=dbias)
        dnorm, da = norm_vjp(product(dlogits, weight))
        dh = da * slope
        dx = product(dh, dense["weight"])
        if rows is not None:
            dchosen, dx = dx, np.zeros(x.shape, dx.dtype)
            dx[rows] = dchosen
        dparams: Params = {"dense": weight_gradients(dense, dh, chosen), "norm": dnorm}
        if not isinstance(params, Frozen):
            dparams["bias"] = dbias
        return dparams, dx, dweight

    return logits, vjp
