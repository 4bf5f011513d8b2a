"""``fusedattn quickstart``: train a small text classifier on the standard library's docstrings."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedattn.cli import _out, _threads
from fusedattn.cli._baseline import bag_of_words, tune
from fusedattn.cli._docstrings import Passage, Task, docstring_task, split_by_file

if TYPE_CHECKING:
    from fusedattn.encoder import Encoder, TextClassifier

VOCABULARY = 4000
MAX_LENGTH = 128
# Chosen on a validation part of the training files, never on the test files.
ENCODER = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.3,
    "initializer_range": 0.05,
    "norm_first": True,
}
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
}
HIDDEN_SHARE = 0.3  # of the words, in each training batch: the model must not lean on one of them
WORD_SCALE = 0.5  # of the first word vectors: the larger, the less a step can change them
EPOCHS = 6
PRETRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "max_sentences": 64,
}
PRETRAINING_DROPOUT = 0.1
PRETRAINING_EPOCHS = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train a small text classifier on the standard library's docstrings",
        description="Which package of Python's standard library does a docstring document? Trains "
        "a tokenizer and a two-block encoder, without and with pre-training on the same text, and "
        "compares them with the majority class and a bag-of-words logistic regression on module "
        "files that training has not seen.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart-model"),
        help="where the model and history.jsonl go [%(default)s]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and training [%(default)s]")
    parser.add_argument(
        "--split", type=int, default=0, help="which division of files [%(default)s]"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="[%(default)s]")
    parser.add_argument(
        "--pretrain-epochs", type=int, default=PRETRAINING_EPOCHS, help="[%(default)s]"
    )
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever --out holds")
    _threads.add_option(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do the whole of it; 0."""
    with _threads.limited_to(args.threads):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from fusedattn.encoder import TextClassifier
    from fusedattn.train import remove_checkpoint

    folders = {name: args.out / name for name in ("pretraining", "not-pretrained")}
    if not _out.check_out(args.out, args.restart, list(folders.values())):
        for folder in (args.out, *folders.values()):  # of settings that may be others
            remove_checkpoint(folder)
    started = time.perf_counter()
    task = docstring_task(seed=args.split)
    files = {side: len({p.file for p in getattr(task, side)}) for side in ("train", "test")}
    print(
        f"Which of {len(task.packages)} packages of the standard library is a docstring from?\n"
        f"{len(task.train):,} passages of {files['train']} files to learn from, "
        f"{len(task.test):,} of {files['test']} other files to be tested on.\n",
        flush=True,
    )
    texts, truth = columns(task.test)
    guesses = {}
    try:
        plain = starting_encoder(task, args.seed)
        model = train_classifier(plain, task, args, folders["not-pretrained"])
        guesses["encoder, not pre-trained"] = model.predict(texts)
        encoder = pretrain(starting_encoder(task, args.seed), task, args, folders["pretraining"])
        model = train_classifier(encoder, task, args, args.out)
        guesses["encoder, pre-trained"] = model.predict(texts)
    except KeyboardInterrupt:
        print(_out.interrupted(args), file=sys.stderr)
        raise
    predictions = baselines(task) | guesses
    print("\n" + score_table(task.packages, truth, predictions))
    print(bought(truth, *guesses.values()))
    print("\n" + show_predictions(model, pick_examples(task.test, args.seed)))

    model.save_pretrained(args.out)
    for folder in (args.out, *folders.values()):
        remove_checkpoint(folder)
    same = np.array_equal(
        TextClassifier.from_pretrained(args.out).predict_proba(texts), model.predict_proba(texts)
    )
    if not same:
        raise RuntimeError(f"the model read back from {args.out} gives other probabilities")
    print(f"Saved to {args.out}; read back, it gives the same probabilities.")
    print(f"{time.perf_counter() - started:.0f} s in all.")
    return 0


def starting_encoder(task: Task, seed: int) -> Encoder:
    """A tokenizer and an encoder whose word vectors start from counts of neighbours.

    They are counted in the training passages and in those of the other packages: with a few
    thousand labelled passages, most words are met too seldom to be learnt.
    """
    from fusedattn.encoder import Encoder, EncoderConfig
    from fusedattn.text import cooccurrence_embeddings, tokenize, train_tokenizer

    texts, _ = columns(task.train)
    tokenizer = train_tokenizer(texts, VOCABULARY, max_length=MAX_LENGTH)
    config = EncoderConfig.from_dict(
        {
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": MAX_LENGTH,
            **ENCODER,
        }
    )
    encoder = Encoder(config, tokenizer=tokenizer, seed=seed)
    encoder.params["embeddings"]["word"]["weight"][...] = WORD_SCALE * cooccurrence_embeddings(
        tokenize(tokenizer, texts + columns(task.other)[0]), config.vocab_size, config.hidden_size
    )
    return encoder


def pretrain(encoder: Encoder, task: Task, args: argparse.Namespace, out: Path) -> Encoder:
    """Teach the encoder to predict masked words of the training passages."""
    from fusedattn.encoder import MaskedLM
    from fusedattn.text import Dataset, Masking, tokenize
    from fusedattn.train import Trainer, TrainingConfig

    print(f"Predicting masked words, {args.pretrain_epochs} epochs:", end=" ", flush=True)
    texts, _ = columns(task.train)
    dropout = encoder.config.hidden_dropout_prob
    encoder.config = replace(encoder.config, hidden_dropout_prob=PRETRAINING_DROPOUT)
    trainer = Trainer(
        MaskedLM(encoder, seed=args.seed),
        TrainingConfig(epochs=args.pretrain_epochs, seed=args.seed, **PRETRAINING),
        augment=Masking(encoder.tokenizer, whole_word=True),
        out_dir=out,
    )
    result = trainer.fit(Dataset(tokenize(encoder.tokenizer, texts)), resume=not args.restart)
    if result.interrupted:
        raise KeyboardInterrupt
    losses = [entry["train_loss"] for entry in result.history] or [float("nan")]
    print(
        f"loss from {losses[0]:.2f} to {losses[-1]:.2f} nats, "
        f"{result.tokens_per_second:,.0f} tokens/s.",
        flush=True,
    )
    encoder.config = replace(encoder.config, hidden_dropout_prob=dropout)
    return encoder


def train_classifier(
    encoder: Encoder, task: Task, args: argparse.Namespace, out: Path
) -> TextClassifier:
    """A classifier trained on all of the task's training passages."""
    from fusedattn.encoder import TextClassifier
    from fusedattn.text import Dataset, hide_tokens
    from fusedattn.train import Trainer, TrainingConfig

    print(f"Learning the packages, {args.epochs} epochs:", end=" ", flush=True)
    model = TextClassifier(encoder, task.packages, seed=args.seed)
    trainer = Trainer(
        model,
        TrainingConfig(epochs=args.epochs, seed=args.seed, **TRAINING),
        augment=lambda batch, rng: hide_tokens(batch, HIDDEN_SHARE, encoder.tokenizer, rng),
        out_dir=out,
    )
    learning = Dataset.from_texts(encoder.tokenizer, *columns(task.train), task.packages)
    result = trainer.fit(learning, resume=not args.restart)
    if result.interrupted:
        raise KeyboardInterrupt
    print(f"{result.tokens_per_second:,.0f} tokens/s.", flush=True)
    return model


def bought(truth: Sequence[str], without: Sequence[str], with_it: Sequence[str]) -> str:
    """What pre-training changed, against the standard error of that difference."""
    right = [np.array([a == b for a, b in zip(truth, g, strict=True)]) for g in (without, with_it)]
    change = right[1].astype(float) - right[0]
    error = change.std() / np.sqrt(max(1, len(change)))
    return (
        f"Pre-training bought {100 * change.mean():+.1f} points of accuracy "
        f"(standard error {100 * error:.1f})."
    )


def baselines(task: Task) -> dict[str, list[str]]:
    """What the majority class and the tuned bag of words say of the test passages."""
    texts, labels = columns(task.train)
    majority = Counter(labels).most_common(1)[0][0]
    fit, validation = split_by_file(task.train, 0.2, seed=1)
    print("Tuning the bag of words to compare with:", end=" ", flush=True)
    choice = tune(columns(fit), columns(validation))
    print(f"{'words and pairs' if choice.ngrams > 1 else 'words'}, C = {choice.c:g}.", flush=True)
    bag = bag_of_words(choice).fit(texts, labels)
    return {
        "majority class": [majority] * len(task.test),
        "bag of words, logistic regression": bag.predict([p.text for p in task.test]).tolist(),
    }


def columns(passages: Sequence[Passage]) -> tuple[list[str], list[str]]:
    """The texts and the packages of passages."""
    return [p.text for p in passages], [p.package for p in passages]


def score_table(
    names: Sequence[str], truth: Sequence[str], predictions: dict[str, list[str]]
) -> str:
    """A line for each contender with its accuracy and macro-F1, in percent."""
    from fusedattn.metrics import accuracy, macro_f1

    place = {name: i for i, name in enumerate(names)}
    labels = np.array([place[name] for name in truth])
    lines = [f"{'held-out files':<36}{'accuracy':>9}{'macro-F1':>10}"]
    for contender, predicted in predictions.items():
        guesses = np.array([place[name] for name in predicted])
        scores = 100 * accuracy(labels, guesses), 100 * macro_f1(labels, guesses)
        lines.append(f"{contender:<36}{scores[0]:>7.1f} %{scores[1]:>8.1f} %")
    return "\n".join(lines)


def pick_examples(passages: Sequence[Passage], seed: int, count: int = 5) -> list[Passage]:
    """A few passages at random, none of them very short."""
    worth_reading = [p for p in passages if len(p.text.split()) >= 12]
    chosen = np.random.default_rng(seed).permutation(len(worth_reading))[:count]
    return [worth_reading[i] for i in chosen]


def show_predictions(model: TextClassifier, passages: Sequence[Passage]) -> str:
    """Each passage's beginning, where it is from, and the model's three likeliest packages."""
    lines = []
    for passage, p in zip(passages, model.predict_proba([q.text for q in passages]), strict=True):
        likeliest = ", ".join(f"{model.names[i]} {100 * p[i]:.0f} %" for i in np.argsort(-p)[:3])
        beginning = textwrap.shorten(passage.text, 90, placeholder=" ...")
        lines += [f'"{beginning}"', f"    {passage.file}: {likeliest}"]
    return "\n".join([*lines, ""])
