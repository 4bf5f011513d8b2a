"""``fusedattn pretrain``: a masked language model of any text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusedattn.cli import _encoders, _out, _reading, _threads, _training


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "pretrain",
        description="Pre-train an encoder on texts without labels: predict masked tokens. What it "
        "writes is for finetune --from. Started again with the same options after Ctrl-C or worse, "
        "it goes on from its last checkpoint to the same result.",
    )
    parser.add_argument(
        "data", nargs="+", metavar="CORPUS", help="a text a line, csv, tsv, jsonl, or a folder"
    )
    parser.add_argument("--from", dest="start", type=Path, metavar="MODEL", help="go on from this")
    parser.add_argument("--out", type=Path, default=Path("pretrained"), help="[%(default)s]")
    parser.add_argument(
        "--validation-share", type=float, default=0.05, metavar="X", help="[%(default)s]"
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="of that share [0]")
    parser.add_argument("--mask", type=float, default=0.15, metavar="X", help="share [%(default)s]")
    parser.add_argument("--whole-words", action="store_true", help="mask all of a word's pieces")
    _encoders.add_options(parser)
    _training.add_options(parser, max_sentences=64)
    _reading.add_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Train, save, report; 130 after Ctrl-C."""
    with _threads.limited_to(args.threads):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from fusedattn.encoder import Encoder, MaskedLM
    from fusedattn.text import Dataset, Examples, Masking, split_examples, tokenize_pieces
    from fusedattn.train import Trainer, evaluate_masked

    resume = _out.check_out(args.out, args.restart)
    texts = [t for path in args.data for t in _reading.read(path, args, labelled=False).texts]
    train, held = split_examples(Examples(texts), args.validation_share, args.split_seed)
    if args.start:
        encoder = _encoders.adapt(Encoder.from_pretrained(args.start), args)
        model = masked_lm(args.start, encoder, args.seed)
    else:
        encoder = _encoders.new_encoder(args, train.texts, dropout=0.1)
        model = MaskedLM(encoder, seed=args.seed)
    masking = Masking(encoder.tokenizer, args.mask, args.whole_words)
    learning = Dataset(tokenize_pieces(encoder.tokenizer, train.texts))
    validation = Dataset(tokenize_pieces(encoder.tokenizer, held.texts))
    print(
        f"{len(train.texts):,} texts ({sum(map(len, learning.sequences)):,} tokens) to learn from, "
        f"{len(held.texts):,} to choose by; a vocabulary of {encoder.config.vocab_size:,}.",
        flush=True,
    )
    trainer = Trainer(
        model,
        _training.training_config(args, monitor="loss"),
        augment=masking,
        evaluate=lambda m, data: evaluate_masked(m, data, masking),
        out_dir=args.out,
        settings=_training.settings(args),
    )
    result = trainer.fit(learning, validation if len(validation) else None, resume=resume)
    if result.interrupted:
        print(_out.interrupted(args))
        return 130
    report: dict[str, float] = {"best_epoch": result.best_epoch}
    if len(validation):
        found = evaluate_masked(model, validation, masking)
        report |= {f"validation_{name}": value for name, value in found.items()}
    print(json.dumps({name: round(value, 4) for name, value in report.items()}))
    wrote = _out.finish(args.out, model, result, vars(args) | {"result": report})
    print(f"Wrote {wrote} to {args.out}.")
    return 0


def masked_lm(path: Path, encoder: Any, seed: int) -> Any:
    """The masked language model of a folder; an encoder alone gets a new head."""
    from fusedattn.encoder import MaskedLM

    try:
        head = MaskedLM.from_pretrained(path).params["head"]
    except ValueError:
        head = None
    return MaskedLM(encoder, head, seed=seed)
