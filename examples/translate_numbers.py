"""Attention across two sequences: an encoder-decoder that translates digits into English words.

    40215  ->  forty thousand two hundred fifteen

The encoder reads the digits. The decoder writes the words one after another: it attends to the
words so far (causal self-attention) and to the digits (cross-attention), the Transformer of
arXiv:1706.03762 in small. No rule of English is built into it, and the numbers that it is tested on
are not among those it learns from.

    python examples/translate_numbers.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from fusedattn import nn
from fusedattn.losses import cross_entropy
from fusedattn.nn import VJP, Array, Params, Rng
from fusedattn.optim import AdamW, clip_scale, global_norm, warmup_linear
from fusedattn.text import Batch, pack

WIDTH, INNER, HEADS, BLOCKS, LARGEST = 64, 128, 4, 2, 999_999
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = ["<end>", "hundred", "thousand", *ONES, *TENS[2:]]
END = 0  # also what the decoder begins with


def in_words(n: int) -> list[str]:
    """A number below a million in English."""
    if n < 20:
        return [ONES[n]]
    if n < 100:
        return [TENS[n // 10], *(in_words(n % 10) if n % 10 else [])]
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return [*in_words(n // size), name, *(in_words(n % size) if n % size else [])]


def examples(numbers: Array) -> tuple[Batch, Batch]:
    """Digits; and the words so far, whose labels are the words that come next."""
    digits = [np.array([int(d) for d in str(n)]) for n in numbers]
    words = [np.array([WORDS.index(w) for w in in_words(n)]) for n in numbers.tolist()]
    following = np.concatenate([np.append(w, END) for w in words])
    return pack(digits), pack([np.insert(w, 0, END) for w in words], following)


def init_decoder_block(rng: Rng) -> Params:
    """Self-attention, cross-attention and a feed-forward layer, each with a norm before it."""
    return {
        "self": nn.init_self_attention(rng, WIDTH, 0.1),
        "self_norm": nn.init_layer_norm(WIDTH),
        "cross": nn.init_cross_attention(rng, WIDTH, std=0.1),
        "cross_norm": nn.init_layer_norm(WIDTH),
        "inner": nn.init_feed_forward(rng, WIDTH, INNER, 0.1),
        "inner_norm": nn.init_layer_norm(WIDTH),
    }


def decoder_block(
    params: Params, x: Array, memory: Array, cu_seqlens: Array, cu_memory: Array
) -> tuple[Array, nn.VJP2]:
    """x + f(norm(x)) for f causal self-attention, attention to `memory`, and feed-forward.

    The vjp gives the gradients of the parameters, of `x` and of `memory`.
    """
    h, norm1_vjp = nn.layer_norm(params["self_norm"], x)
    a, self_vjp = nn.self_attention(params["self"], h, cu_seqlens, HEADS, is_causal=True)
    a += x
    h, norm2_vjp = nn.layer_norm(params["cross_norm"], a)
    c, cross_vjp = nn.cross_attention(params["cross"], h, memory, cu_seqlens, cu_memory, HEADS)
    c += a
    h, norm3_vjp = nn.layer_norm(params["inner_norm"], c)
    y, inner_vjp = nn.feed_forward(params["inner"], h)
    y += c

    def vjp(dy: Array) -> tuple[Params, Array, Array]:
        grads: Params = {}
        grads["inner"], d = inner_vjp(dy)
        grads["inner_norm"], dc = norm3_vjp(d)
        dc += dy
        grads["cross"], d, dmemory = cross_vjp(dc)
        grads["cross_norm"], da = norm2_vjp(d)
        da += dc
        grads["self"], d = self_vjp(da)
        grads["self_norm"], dx = norm1_vjp(d)
        dx += da
        return grads, dx, dmemory

    return y, vjp


class Translator:
    """Two encoder blocks over digits, two decoder blocks over words, and a linear layer."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.params: Params = {
            "digits": nn.init_token_embedding(rng, 10, len(str(LARGEST)), 0, WIDTH, 0.5),
            "words": nn.init_token_embedding(rng, len(WORDS), 16, 0, WIDTH, 0.5),
            "encoder": {
                str(n): nn.init_encoder_block(rng, WIDTH, INNER, 0.1) for n in range(BLOCKS)
            },
            "decoder": {str(n): init_decoder_block(rng) for n in range(BLOCKS)},
            "output": nn.init_linear(rng, WIDTH, len(WORDS), 0.1),
        }

    def forward(self, digits: Batch, words: Batch) -> tuple[Array, VJP]:
        """Logits of the word that follows each word, and their vjp."""
        p = self.params
        memory, digits_vjp = nn.token_embedding(p["digits"], digits.ids, digits.cu_seqlens)
        encoder_vjps, decoder_vjps = {}, {}
        for n, block in p["encoder"].items():
            memory, encoder_vjps[n] = nn.encoder_block(block, memory, digits.cu_seqlens, HEADS)
        x, words_vjp = nn.token_embedding(p["words"], words.ids, words.cu_seqlens)
        for n, block in p["decoder"].items():
            x, decoder_vjps[n] = decoder_block(
                block, x, memory, words.cu_seqlens, digits.cu_seqlens
            )
        logits, output_vjp = nn.linear(p["output"], x)

        def vjp(dlogits: Array) -> tuple[Params, Array]:
            grads: Params = {"encoder": {}, "decoder": {}}
            grads["output"], dx = output_vjp(dlogits)
            dmemory = np.zeros_like(memory)
            for n in reversed(decoder_vjps):  # every decoder block reads the same memory
                grads["decoder"][n], dx, d = decoder_vjps[n](dx)
                dmemory += d
            grads["words"], nothing = words_vjp(dx)
            for n in reversed(encoder_vjps):
                grads["encoder"][n], dmemory = encoder_vjps[n](dmemory)
            grads["digits"], _ = digits_vjp(dmemory)
            return grads, nothing

        return logits, vjp

    def translate(self, numbers: Array) -> list[list[str]]:
        """The likeliest word again and again, until each translation has ended."""
        digits, _ = examples(numbers)
        words = np.full((len(numbers), 1), END)
        while words.shape[1] < 16:
            logits, _ = self.forward(digits, pack(list(words)))
            last = logits.reshape(*words.shape, -1)[:, -1]
            words = np.column_stack([words, last.argmax(axis=1)])
            if (words[:, 1:] == END).any(axis=1).all():
                break
        ends = [int(np.append(np.flatnonzero(w == END), len(w))[0]) for w in words[:, 1:]]
        return [[WORDS[i] for i in w[1 : end + 1]] for w, end in zip(words, ends, strict=True)]


def numbers_of_each_length(rng: Rng, count: int) -> Array:
    """Different numbers, of any count of digits alike as far as there are enough."""
    digits = rng.integers(1, 7, count)
    return np.unique(rng.integers(np.where(digits > 1, 10 ** (digits - 1), 0), 10**digits))


def fit(model: Translator, numbers: Array, steps: int, rng: Rng, batch_size: int = 64) -> None:
    """AdamW, warming up and falling to 0 along a line."""
    adam = AdamW(model.params)
    started = time.perf_counter()
    for step in range(steps):
        digits, words = examples(rng.choice(numbers, batch_size))
        logits, vjp = model.forward(digits, words)
        loss, loss_vjp = cross_entropy(logits, words.labels)
        grads, _ = vjp(loss_vjp(1.0))
        rate = 3e-3 * warmup_linear((step + 0.5) / steps, 0.1)
        adam.step(grads, rate, clip_scale(global_norm(grads), 1.0))
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1}: loss {loss:.4f}, {time.perf_counter() - started:.0f} s")


def main(argv: list[str] | None = None) -> float:
    """Learn, be tested, show some translations; the share of them that is right."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="[%(default)s]")
    parser.add_argument("--tests", type=int, default=1000, help="numbers [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    options = parser.parse_args(argv)
    rng = np.random.default_rng(options.seed)
    numbers = rng.permutation(numbers_of_each_length(rng, 20_000))
    test, train = numbers[: options.tests], numbers[options.tests :]
    model = Translator(options.seed)
    fit(model, train, options.steps, rng)
    answers = model.translate(test)
    right = [answer == in_words(n) for answer, n in zip(answers, test.tolist(), strict=True)]
    for n, answer in list(zip(test.tolist(), answers, strict=True))[:6]:
        print(f"{n:>7}  {' '.join(answer)}")
    share = float(np.mean(right))
    print(f"{100 * share:.1f} % of {len(test)} other numbers are right, word for word.")
    return share


if __name__ == "__main__":
    main()
