"""The kernel under PyTorch's autograd and inside transformers' models."""

import numpy as np
import pytest

import fusedattn

torch = pytest.importorskip("torch", reason="the integrations of PyTorch")

from fusedattn.integrations.torch import attention  # noqa: E402

B, H, HKV, SQ, SK, D = 2, 4, 2, 5, 7, 8


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, H, SQ, D), (B, HKV, SK, D), (B, HKV, SK, D), (H, 1, SK), (H,)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def test_gradients_are_those_of_autograd():
    q, k, v, bias, sinks = leaves()
    mask = torch.rand(B, 1, SQ, SK, generator=torch.Generator().manual_seed(1)) < 0.7

    def call(q, k, v, bias, sinks):
        return attention(
            q, k, v, bias=bias, sinks=sinks, mask=mask, softcap=2.0, dropout_p=0.3, seed=4,
            return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))


def test_only_what_asks_for_gradients_gets_them():
    q, k, v, bias, _ = leaves()
    k.requires_grad_(False)
    attention(q, k, v, bias=bias).sum().backward()
    assert k.grad is None
    assert q.grad.shape == q.shape
    assert bias.grad.shape == bias.shape


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_agrees_with_pytorch(dtype):
    tensors = leaves(dtype)[:3]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)
    got = attention(*tensors)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=4 * eps, atol=4 * eps)
    upstream = torch.ones_like(got)
    for x, y in zip(
        torch.autograd.grad(got, tensors, upstream),
        torch.autograd.grad(expected, tensors, upstream),
        strict=True,
    ):
        assert x.dtype == dtype
        torch.testing.assert_close(x, y, rtol=16 * eps, atol=16 * eps)


def test_strides_rules_and_the_generator():
    q, k, v, *_ = leaves(torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    lengths = torch.tensor([3, 7])
    got = attention(*turned, kv_lengths=lengths, is_causal=True)
    arrays = (x.detach().numpy() for x in (q, k, v))
    expected = fusedattn.attention(*arrays, kv_lengths=lengths.numpy(), is_causal=True)
    np.testing.assert_array_equal(got.detach().numpy(), expected)
    dropped = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        dropped.append(attention(q, k, v, dropout_p=0.5))
    assert torch.equal(*dropped[:2])
    assert not torch.equal(*dropped[1:])
    with pytest.raises(TypeError, match="out: not an argument"):
        attention(q, k, v, out=q)


def config(transformers, **more):
    return transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_transformers(padded):
    transformers = pytest.importorskip("transformers", reason="the integration of transformers")
    from fusedattn.integrations.transformers import register

    register()
    torch.manual_seed(0)
    model = transformers.BertModel(config(transformers)).double()
    ids, weights = torch.randint(50, (3, 9)), torch.randn(3, 9, 32, dtype=torch.float64)
    mask = torch.ones(3, 9, dtype=torch.long)
    if padded:
        mask[1, 5:] = mask[2, 2:] = 0
    results = []
    for name in ("sdpa", "fusedattn"):
        model.set_attn_implementation(name)
        model.zero_grad()
        hidden = model(ids, attention_mask=mask).last_hidden_state
        (hidden * weights * mask[..., None]).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([hidden[mask > 0].detach(), *grads])
    for got, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_decoder_of_transformers_with_a_cache():
    transformers = pytest.importorskip("transformers", reason="the integration of transformers")
    from fusedattn.integrations.transformers import register

    register()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(1, 50, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    texts = []
    for name in ("sdpa", "fusedattn"):
        model.set_attn_implementation(name)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)
