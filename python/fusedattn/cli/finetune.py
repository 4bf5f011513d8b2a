"""``fusedattn finetune``: train a text classifier, from scratch or from a pre-trained encoder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedattn.cli import _encoders, _out, _reading, _threads, _training

if TYPE_CHECKING:
    from fusedattn.text import Examples


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "finetune",
        description="Train a text classifier on labelled texts (csv, tsv, JSON lines, a folder a "
        "class, text<TAB>label, TREC). Started again with the same options after Ctrl-C or worse, "
        "it goes on from its last checkpoint to the same result.",
    )
    add_options(parser, "classifier")
    parser.set_defaults(func=run)


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """All the options; `out` is where it goes by default."""
    parser.add_argument("data", metavar="DATA", help="labelled texts: a file, or a folder a class")
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="MODEL", help="an encoder to tune"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="[%(default)s]")
    parser.add_argument("--validation", metavar="DATA", help="labelled texts to choose the best by")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        metavar="X",
        help="of DATA, without --validation; 0 keeps the last epoch [%(default)s]",
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="of that share [0]")
    parser.add_argument("--test", metavar="DATA", help="labelled texts to report on at the end")
    parser.add_argument("--pooling", choices=("mean", "cls", "max"), default="mean")
    parser.add_argument(
        "--hide-words", type=float, metavar="X", help="share to mask in training [0.2 from scratch]"
    )
    parser.add_argument("--class-weights", choices=("balanced",))
    parser.add_argument("--monitor", choices=("accuracy", "macro_f1", "loss"), default="accuracy")
    _encoders.add_options(parser)
    _training.add_options(parser, label_smoothing=0.1)
    _reading.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, save, report; 130 after Ctrl-C."""
    with _threads.limited_to(args.threads):
        resume = _out.check_out(args.out, args.restart)
        model, result, report = train(args, read(args), resume=resume)
        if result.interrupted:
            print(_out.interrupted(args))
            return 130
        print(json.dumps({name: round(value, 4) for name, value in report.items()}))
        wrote = _out.finish(args.out, model, result, vars(args) | {"result": report})
    print(f"Wrote {wrote} to {args.out}.")
    return 0


def read(args: argparse.Namespace) -> tuple[Examples, Examples]:
    """The texts to learn from and those to choose the best by."""
    from fusedattn.text import split_examples

    examples = _reading.read(args.data, args)
    if args.validation:
        return examples, _reading.read(args.validation, args)
    return split_examples(examples, args.validation_share, args.split_seed)


def train(
    args: argparse.Namespace, examples: tuple[Examples, Examples], *, resume: bool
) -> tuple[Any, Any, dict[str, float]]:
    """The classifier that the options ask for, the `TrainingResult`, and figures to report."""
    from fusedattn.encoder import Encoder, TextClassifier
    from fusedattn.nn import leaves
    from fusedattn.text import Dataset, Examples, hide_tokens, label_names
    from fusedattn.train import Trainer, evaluate

    train, held = examples
    names = label_names(train.labels if args.validation else train.labels + held.labels)
    if args.start:
        encoder = _encoders.adapt(Encoder.from_pretrained(args.start), args)
    else:
        encoder = _encoders.new_encoder(args, train.texts, dropout=0.3)
    tokenizer = encoder.tokenizer
    model = TextClassifier(encoder, names, seed=args.seed, pooling=args.pooling)
    learning = Dataset.from_texts(tokenizer, train.texts, train.labels, names)
    validation = Dataset.from_texts(tokenizer, held.texts, held.labels, names)
    # read now: what is wrong with it should not be found out after hours of training
    test = _reading.read(args.test, args) if args.test else Examples()
    tested = Dataset.from_texts(tokenizer, test.texts, test.labels, names)
    size = sum(p.size for _, p in leaves(model.params))
    print(
        f"{len(names)} labels, {len(learning):,} texts to learn from, {len(validation):,} to "
        f"choose by; {size:,} parameters.",
        flush=True,
    )
    hidden = (0.0 if args.start else 0.2) if args.hide_words is None else args.hide_words
    trainer = Trainer(
        model,
        _training.training_config(args),
        augment=(lambda b, rng: hide_tokens(b, hidden, tokenizer, rng)) if hidden else None,
        out_dir=args.out,
        settings=_training.settings(args),
    )
    result = trainer.fit(learning, validation if len(validation) else None, resume=resume)
    report: dict[str, float] = {"parameters": size, "best_epoch": result.best_epoch}
    report["tokens_per_second"] = round(result.tokens_per_second)
    report["seconds"] = round(result.seconds, 1)
    if len(validation):
        report |= {f"validation_{k}": v for k, v in evaluate(model, validation).items()}
    if len(tested):
        report |= {f"test_{k}": v for k, v in evaluate(model, tested).items()}
    return model, result, report
