"""What a training step costs, ours beside PyTorch's.

A step is forward, backward and AdamW of a text classifier (BERT's blocks, mean pooling), without
dropout, so that the losses can be compared: all contenders start from the same weights, see the
same batches and must report the same losses to 1e-4. PyTorch gets its fused AdamW and
`scaled_dot_product_attention`, the same threads, and batches padded to their longest sequence, with
a mask where lengths differ. Contenders take turns step by step; what is reported is the median of
the rounds' ratios. Memory is the growth of the peak resident size over a few steps, in a fresh
process for each contender.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fusedattn.encoder import Encoder, EncoderConfig, TextClassifier
from fusedattn.losses import cross_entropy
from fusedattn.nn import flatten
from fusedattn.optim import AdamW
from fusedattn.text import Batch, pack

__all__ = ["CASES", "TrainingCase", "main", "measure"]

CLASSES = 77
BATCHES = 4  # different ones, taken in turns
RATE = 1e-4
AGREE = 1e-4
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class TrainingCase:
    """A model and the lengths of the sequences in its batches.

    Attributes
    ----------
    name : str
    config : EncoderConfig
    sentences : int
        In a batch.
    length : int
        Of every sequence; 0 for lengths drawn as the questions of banking77 have them.
    targets : dict of str to float
        How many times faster than a contender a step should be.
    """

    name: str
    config: EncoderConfig
    sentences: int
    length: int
    targets: dict[str, float]

    def batches(self, count: int = BATCHES) -> list[Batch]:
        """Batches of random ids and labels, the same each time."""
        rng = np.random.default_rng(0)
        found = []
        for _ in range(count):
            lengths = np.full(self.sentences, self.length)
            if not self.length:
                # Mean 14, from 4 to 90: log-normal, as the training questions of banking77 are.
                drawn = np.exp(rng.normal(2.45, 0.5, self.sentences))
                lengths = np.clip(drawn.round().astype(int), 2, 88) + 2
            ids = [rng.integers(0, self.config.vocab_size, n, np.int32) for n in lengths]
            found.append(pack(ids, rng.integers(0, CLASSES, self.sentences)))
        return found

    def model(self) -> TextClassifier:
        """The same starting weights each time."""
        return TextClassifier(Encoder(self.config), [str(i) for i in range(CLASSES)])


_SMALL = EncoderConfig(
    10_000, 256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
)
_MINILM = EncoderConfig(
    30_522, 384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
_BOTH = {"pytorch": 1.5, "compiled": 1.15}
CASES = {
    case.name: case
    for case in (
        TrainingCase("small-32x128", _SMALL, 32, 128, _BOTH),
        TrainingCase("small-banking77", _SMALL, 32, 0, {"pytorch": 2.0}),
        TrainingCase("minilm-8x512", _MINILM, 8, 512, {"pytorch": 1.4}),
        TrainingCase("minilm-32x128", _MINILM, 32, 128, {"pytorch": 1.4}),
    )
}

Step = Callable[[Batch], float]


def our_step(case: TrainingCase) -> Step:
    """A function that takes one step on a batch and returns the loss before it."""
    model = case.model()
    optimizer = AdamW(model.params, **OPTIONS)

    def step(batch: Batch) -> float:
        logits, vjp = model.forward(batch)
        loss, loss_vjp = cross_entropy(logits, batch.labels)
        grads, _ = vjp(loss_vjp(1.0))
        optimizer.step(grads, RATE)
        return loss

    return step


def pytorch_step(case: TrainingCase, threads: int, *, compiled: bool = False) -> Step:
    """The same in PyTorch."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    config, heads = case.config, case.config.num_attention_heads
    ours = case.model().params
    p = {n: torch.tensor(a, requires_grad=True) for n, a in flatten(ours).items()}
    decayed = [t for t in p.values() if t.ndim > 1]
    groups = [
        {"params": decayed},
        {"params": [t for t in p.values() if t.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True, **OPTIONS)

    def norm(name: str, x: Any) -> Any:
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, config.layer_norm_eps)

    def linear(name: str, x: Any) -> Any:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def forward(ids: Any, mask: Any, labels: Any) -> Any:
        n, s = ids.shape
        e = "encoder.embeddings"
        x = F.embedding(ids, p[f"{e}.word.weight"]) + p[f"{e}.position.weight"][:s]
        x = norm(f"{e}.norm", x + p[f"{e}.type.weight"][0])
        attended = None if mask is None else mask[:, None, None, :]
        for layer in range(config.num_hidden_layers):
            b = f"encoder.blocks.{layer}"
            qkv = linear(f"{b}.attention.qkv", x).view(n, s, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(q, k, v, attended)
            o = linear(f"{b}.attention.out", o.transpose(1, 2).reshape(n, s, -1))
            x = norm(f"{b}.attention_norm", x + o)
            h = F.gelu(linear(f"{b}.feed_forward.up", x))
            x = norm(f"{b}.feed_forward_norm", x + linear(f"{b}.feed_forward.down", h))
        if mask is None:
            pooled = x.mean(dim=1)
        else:
            weight = mask[:, :, None].to(x.dtype)
            pooled = (x * weight).sum(dim=1) / weight.sum(dim=1)
        return F.cross_entropy(linear("classifier", pooled), labels)

    run = torch.compile(forward, dynamic=None) if compiled else forward

    def step(batch: Batch) -> float:
        lengths = np.diff(batch.cu_seqlens)
        ids = np.zeros((len(lengths), lengths.max()), np.int64)
        inside = np.arange(lengths.max()) < lengths[:, None]
        ids[inside] = batch.ids
        mask = None if inside.all() else torch.from_numpy(inside)
        loss = run(torch.from_numpy(ids), mask, torch.from_numpy(batch.labels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def contenders(threads: int) -> dict[str, Callable[[TrainingCase], Step]]:
    """Who can take part here: a function for each that makes its step."""
    found: dict[str, Callable[[TrainingCase], Step]] = {"fusedattn": our_step}
    if importlib.util.find_spec("torch"):
        found["pytorch"] = lambda case: pytorch_step(case, threads)
        found["compiled"] = lambda case: pytorch_step(case, threads, compiled=True)
    return found


def measure(
    case: TrainingCase, names: Sequence[str], threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step for each contender, round by round.

    Raises
    ------
    RuntimeError
        If the contenders' losses differ.
    """
    from fusedattn.bench.timing import _settle

    batches = case.batches()
    makers = contenders(threads)
    steps = {name: makers[name](case) for name in names}
    losses = {name: [step(batch) for batch in batches] for name, step in steps.items()}
    for values in losses.values():
        if not np.allclose(values, losses["fusedattn"], rtol=0, atol=AGREE):
            raise RuntimeError(f"{case.name}: losses differ, {losses['fusedattn']} and {values}")
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        batch = batches[turn % len(batches)]
        for name, step in steps.items():
            _settle()
            step(batches[(turn - 1) % len(batches)])  # wakes the threads
            start = time.perf_counter()
            step(batch)
            samples[name].append(time.perf_counter() - start)
    return samples


def peak_growth(case: TrainingCase, name: str, threads: int) -> float:
    """Bytes by which the peak resident size grows over a few steps in this process."""
    batches = case.batches()
    step = contenders(threads)[name](case)
    before = _status("VmRSS")
    for batch in batches:
        step(batch)
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _grown(case: TrainingCase, name: str, threads: int) -> float | None:
    """`peak_growth` in a fresh process; None where /proc is not there to ask."""
    if not Path("/proc/self/status").exists():
        return None
    code = (
        "from fusedattn.bench.training import CASES, peak_growth\n"
        f"print(peak_growth(CASES[{case.name!r}], {name!r}, {threads}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(answer.stdout) if answer.returncode == 0 else None


ROW = "{:18} {:>7} {:>10} {:>12} {:>11} {:>9} {:>11} {:>8} {:>11}"
HEAD = (
    "model and batch|tokens|ours ms|PyTorch ms|compiled ms|x PyTorch|x compiled|ours MB|PyTorch MB"
)


def main(
    json_path: Path | None = None, *, quick: bool = False, patterns: Sequence[str] = ()
) -> int:
    """Print the table and, where no case is asked for, that of the products.

    Parameters
    ----------
    json_path : Path, optional
        Where to write every sample as JSON.
    quick : bool, default False
        Three rounds, and no torch.compile, which takes a minute for each case.
    patterns : sequence of str
        Only the cases whose names match one of these, as file names do; by default all.

    Returns
    -------
    int
        0 if every target of every case is reached (or nobody else is installed), else 1.
    """
    from fusedattn import get_num_threads

    threads, rounds = get_num_threads(), 3 if quick else 9
    cases = [c for c in CASES.values() if not patterns or any(fnmatch(c.name, p) for p in patterns)]
    if not cases:
        raise ValueError(f"case: expected names or patterns of {list(CASES)}, got {list(patterns)}")
    print(ROW.format(*HEAD.split("|")))
    record, missed = [], []
    for case in cases:
        names = [n for n in contenders(threads) if not (quick and n == "compiled")]
        try:
            samples = measure(case, names, threads, rounds)
        except Exception as error:  # torch.compile needs a C++ compiler, and more
            if "compiled" not in names or isinstance(error, RuntimeError):
                raise
            names.remove("compiled")
            samples = measure(case, names, threads, rounds)
        memory = {name: _grown(case, name, threads) for name in names if name != "compiled"}
        faster = {
            name: median(t / o for t, o in zip(times, samples["fusedattn"], strict=True))
            for name, times in samples.items()
        }
        print(_line(case, samples, faster, memory), flush=True)
        missed += [
            f"{case.name}: {faster[name]:.2f} x {name}, target {target}"
            for name, target in case.targets.items()
            if name in faster and faster[name] < target
        ]
        record.append(
            {"case": case.name, "samples_s": samples, "faster_by": faster, "peak_growth": memory}
        )
    for line in missed:
        print(line)
    if not patterns:
        from fusedattn.bench import products

        products.main(threads, quick=quick)
    if json_path:
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(bool(missed))


def _line(
    case: TrainingCase,
    samples: dict[str, list[float]],
    faster: dict[str, float],
    memory: dict[str, float | None],
) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    others = ("pytorch", "compiled")
    milliseconds = [
        cell(1e3 * median(samples[n]) if n in samples else None, "{:.1f}")
        for n in ("fusedattn", *others)
    ]
    tokens = sum(len(batch.ids) for batch in case.batches()) // BATCHES
    return ROW.format(
        case.name,
        tokens,
        *milliseconds,
        *(cell(faster.get(n), "{:.2f}") for n in others),
        *(cell((memory.get(n) or 0) / 1e6 or None, "{:.0f}") for n in ("fusedattn", "pytorch")),
    )
