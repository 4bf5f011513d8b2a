"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedattn._whole import whole_file

if TYPE_CHECKING:
    from fusedattn.encoder import Encoder
    from fusedattn.text import Examples
    from fusedattn.train import TrainingConfig

CHUNK = 1024  # texts to predict or encode at a time: what a kill can cost
# What may differ when a training goes on. (Of the data, a checkpoint has a checksum.)
MAY_DIFFER = ("data", "test", "out", "restart", "threads", "checkpoint_seconds", "seeds", "func")
FORMATS = ("csv", "tsv", "jsonl", "folder", "tab", "trec", "lines")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How texts are read."""
    group = parser.add_argument_group("reading")
    group.add_argument("--format", choices=FORMATS, help="[by the file's ending]")
    group.add_argument("--text-column", metavar="NAME", help="of csv, tsv and jsonl [text, ...]")
    group.add_argument("--label-column", metavar="NAME", help="[label, category, class or target]")
    group.add_argument("--encoding", default="utf-8", help="[%(default)s]")
    group.add_argument("--skip-bad-rows", action="store_true", help="and count them")


def read(
    path: str | Path, args: argparse.Namespace, *, labelled: bool = True, empty: bool = False
) -> Examples:
    """Read what the options say; how many rows were skipped goes to standard error."""
    from fusedattn.text import read_examples

    examples = read_examples(
        path,
        format=args.format,
        labelled=labelled,
        empty=empty,
        text_column=args.text_column,
        label_column=args.label_column,
        encoding=args.encoding,
        skip_bad_rows=args.skip_bad_rows,
    )
    if examples.skipped:
        first = examples.skipped[0]
        print(f"{path}: skipped {len(examples.skipped)} bad rows ({first})", file=sys.stderr)
    return examples


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of all files of `args.data`, none left out: a line of output for each of input."""
    return [
        text for path in args.data for text in read(path, args, labelled=False, empty=True).texts
    ]


def add_model(parser: argparse.ArgumentParser) -> None:
    """The shape of a new encoder and its vocabulary."""
    group = parser.add_argument_group("a new encoder (not with --from)")
    group.add_argument("--vocab-size", type=int, default=8000, help="[%(default)s]")
    group.add_argument("--cased", action="store_true", help="keep case and accents")
    group.add_argument(
        "--chinese-strings",
        action="store_true",
        help="frequent strings of Chinese characters are tokens [characters are]",
    )
    group.add_argument("--dim", type=int, default=128, help="width of the vectors [%(default)s]")
    group.add_argument("--layers", type=int, default=2, help="[%(default)s]")
    group.add_argument("--heads", type=int, default=4, help="[%(default)s]")
    group.add_argument("--ffn", type=int, metavar="N", help="inner width [2 * dim]")
    group.add_argument("--post-norm", action="store_true", help="BERT's blocks [pre-norm]")
    group.add_argument(
        "--word-vectors",
        choices=("cooccurrence", "random"),
        default="cooccurrence",
        help="what they start from: counts of neighbours, or nothing [%(default)s]",
    )
    group.add_argument(
        "--word-scale",
        type=float,
        default=0.2,
        metavar="X",
        help="root-mean-square of cooccurrence's vectors; positions start from 0.05 [%(default)s]",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a text [128 if new]")
    parser.add_argument(
        "--dropout", type=float, help="[0.1 pre-training, else 0.3; --from: its own]"
    )
    parser.add_argument(
        "--attention-dropout", type=float, help="of probabilities [0 if new; --from: its own]"
    )


def new_encoder(args: argparse.Namespace, texts: list[str], dropout: float) -> Encoder:
    """A tokenizer and an encoder for `texts`, as the options have them."""
    from fusedattn.encoder import Encoder, EncoderConfig
    from fusedattn.text import cooccurrence_embeddings, tokenize, train_tokenizer

    length = 128 if args.max_length is None else args.max_length
    tokenizer = train_tokenizer(
        texts,
        args.vocab_size,
        lowercase=not args.cased,
        max_length=length,
        split_chinese=not args.chinese_strings,
    )
    config = EncoderConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.dim,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=2 * args.dim if args.ffn is None else args.ffn,
        hidden_act="gelu_new",
        hidden_dropout_prob=dropout if args.dropout is None else args.dropout,
        attention_probs_dropout_prob=args.attention_dropout or 0.0,
        max_position_embeddings=length,
        initializer_range=0.05,
        norm_first=not args.post_norm,
    )
    encoder = Encoder(config, tokenizer=tokenizer, seed=args.seed)
    if args.word_vectors == "cooccurrence":
        vectors = cooccurrence_embeddings(
            tokenize(tokenizer, texts), config.vocab_size, config.hidden_size
        )
        encoder.params["embeddings"]["word"]["weight"][...] = args.word_scale * vectors
    return encoder


def adapt(encoder: Encoder, args: argparse.Namespace) -> Encoder:
    """A pre-trained encoder with the options' dropout and length."""
    given = {
        "hidden_dropout_prob": args.dropout,
        "attention_probs_dropout_prob": args.attention_dropout,
    }
    encoder.config = replace(
        encoder.config, **{name: p for name, p in given.items() if p is not None}
    )
    if encoder.tokenizer is None:
        raise ValueError("--from: expected a model with a tokenizer, this one has none")
    if args.max_length is not None:
        encoder.tokenizer.enable_truncation(
            min(args.max_length, encoder.config.max_position_embeddings)
        )
    return encoder


def add_training(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """What `TrainingConfig` holds, and where it all goes."""
    from fusedattn.train import TrainingConfig

    known = asdict(TrainingConfig(**defaults))
    group = parser.add_argument_group("training")
    for name, kind, text in (
        ("epochs", int, ""),
        ("max_sentences", int, "texts a batch"),
        ("max_tokens", int, "tokens a batch"),
        ("accumulate", int, "batches a step"),
        ("learning_rate", float, "at its peak"),
        ("warmup", float, "share of the training in which the rate rises"),
        ("weight_decay", float, ""),
        ("max_grad_norm", float, ""),
        ("label_smoothing", float, ""),
        ("layer_decay", float, "each block's rate as a multiple of that of the block above"),
        ("evaluate_every", int, "steps [an epoch]"),
        ("patience", int, "evaluations without a better one before stopping [no stopping]"),
        ("checkpoint_seconds", float, "between checkpoints"),
        ("seed", int, "of weights, order and dropout"),
    ):
        shown = f"{text} [%(default)s]".lstrip() if known[name] is not None else text
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=known[name], help=shown, metavar="N")
    group.add_argument("--schedule", choices=("linear", "cosine"), default=known["schedule"])
    group.add_argument(
        "--freeze", nargs="*", default=[], metavar="NAME", help="beginnings of names"
    )
    group.add_argument("--threads", type=int, help="of the kernel and of NumPy's BLAS [all cores]")
    group.add_argument("--restart", action="store_true", help="begin anew, whatever --out holds")


def training_config(args: argparse.Namespace, **others: Any) -> TrainingConfig:
    """The options as a config."""
    from dataclasses import fields

    from fusedattn.train import TrainingConfig

    given = {f.name: getattr(args, f.name) for f in fields(TrainingConfig) if hasattr(args, f.name)}
    given["freeze"] = tuple(args.freeze)
    return TrainingConfig(**{**given, **others})


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make a training what it is."""
    return {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(args).items()
        if k not in MAY_DIFFER
    }


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let the kernel and the BLAS have so many threads."""
    if count is None:
        yield
        return
    from threadpoolctl import threadpool_limits

    from fusedattn import get_num_threads, set_num_threads

    before = get_num_threads()
    set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        set_num_threads(before)


def probabilities(model: Any, texts: Sequence[str], start: int = 0) -> Iterator[Any]:
    """Yield the probabilities of `texts` from `start` on, CHUNK texts at a time, with a bar."""
    from tqdm import tqdm

    with tqdm(total=len(texts), initial=start, disable=None, unit="text") as bar:
        for begin in range(start, len(texts), CHUNK):
            chunk = texts[begin : begin + CHUNK]
            yield model.predict_proba(chunk)
            bar.update(len(chunk))


def check_out(out: Path, restart: bool, parts: Sequence[Path] = ()) -> bool:
    """Whether to go on from a checkpoint in `out`; an error where a finished model is there.

    `parts` are folders of earlier trainings of the same command.
    """
    from fusedattn.train import CHECKPOINT

    if restart:
        return False
    if any((folder / CHECKPOINT).exists() for folder in (out, *parts)):
        print(f"Going on from the checkpoint in {out} (--restart begins anew).", file=sys.stderr)
        return True
    if (out / "config.json").exists():
        raise ValueError(f"--out: {out} holds a model already; --restart replaces it")
    return False


def again(restart: bool) -> str:
    """What to type to go on with what was broken off, as the beginning of a sentence."""
    return "The same command without --restart" if restart else "The same command"


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return f"Interrupted. {again(args.restart)} goes on from the checkpoint in {args.out}."


def finish(out: Path, model: Any, result: Any, settings: dict[str, Any]) -> str:
    """Save the model, the curves and the settings; no checkpoint is needed any more.

    Returns what was written, in words.
    """
    from fusedattn import __version__
    from fusedattn.train import plot_history, remove_checkpoint

    model.save_pretrained(out)
    wrote = "the model, history.jsonl, settings.json"
    with contextlib.suppress(ModuleNotFoundError):  # matplotlib is an extra
        if result.history:
            plot_history(result.history, out / "curves.png")
            wrote += ", curves.png"
    clean = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if k != "func"}
    clean = {"version": __version__, **clean}
    with whole_file(out / "settings.json") as path:
        path.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
    remove_checkpoint(out)
    return wrote
