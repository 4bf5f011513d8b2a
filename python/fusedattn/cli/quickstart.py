"""``fusedattn quickstart``: train a small text classifier on the standard library's docstrings."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedattn.cli._baseline import bag_of_words, tune
from fusedattn.cli._docstrings import Passage, Task, docstring_task, split_by_file

if TYPE_CHECKING:
    from fusedattn.encoder import TextClassifier
    from fusedattn.train import TrainingResult

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
EPOCHS = 8


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train a small text classifier on the standard library's docstrings",
        description="Which package of Python's standard library does a docstring document? Trains "
        "a tokenizer and a two-block encoder, and compares it with the majority class and a "
        "bag-of-words logistic regression on module files that training has not seen.",
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
    parser.add_argument("--threads", type=int, help="of the kernel and of NumPy's BLAS [all cores]")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do the whole of it; 0."""
    from fusedattn import set_num_threads

    if args.threads is None:
        return _run(args)
    from threadpoolctl import threadpool_limits

    set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from fusedattn.encoder import TextClassifier
    from fusedattn.train import remove_checkpoint

    started = time.perf_counter()
    task = docstring_task(seed=args.split)
    files = {side: len({p.file for p in getattr(task, side)}) for side in ("train", "test")}
    print(
        f"Which of {len(task.packages)} packages of the standard library is a docstring from?\n"
        f"{len(task.train):,} passages of {files['train']} files to learn from, "
        f"{len(task.test):,} of {files['test']} other files to be tested on.\n",
        flush=True,
    )
    model, training = train_encoder(task, args.seed, args.epochs, args.out)
    if training.interrupted:
        print("Interrupted: going on with what has been learnt so far.", file=sys.stderr)
    print(f"Trained at {training.tokens_per_second:,.0f} tokens/s.\n", flush=True)

    truth = [p.package for p in task.test]
    predictions = baselines(task)
    predictions["two-block encoder"] = model.predict([p.text for p in task.test])
    print(score_table(task.packages, truth, predictions))
    print("\n" + show_predictions(model, pick_examples(task.test, args.seed)))

    model.save_pretrained(args.out)
    remove_checkpoint(args.out)
    texts = [p.text for p in task.test]
    same = np.array_equal(
        TextClassifier.from_pretrained(args.out).predict_proba(texts), model.predict_proba(texts)
    )
    if not same:
        raise RuntimeError(f"the model read back from {args.out} gives other probabilities")
    print(f"Saved to {args.out}; read back, it gives the same probabilities.")
    print(f"{time.perf_counter() - started:.0f} s in all.")
    return 0


def train_encoder(
    task: Task, seed: int, epochs: int, out: Path | None = None
) -> tuple[TextClassifier, TrainingResult]:
    """A tokenizer and a classifier trained on all of the task's training passages.

    Word vectors start from counts of neighbours in the training passages and in those of the other
    packages: with a few thousand labelled passages, most words are met too seldom to be learnt.

    Parameters
    ----------
    task : Task
    seed : int
        Of the starting weights, the order of the batches and dropout.
    epochs : int
    out : Path, optional
        Where history.jsonl goes.
    """
    from fusedattn.encoder import Encoder, EncoderConfig, TextClassifier
    from fusedattn.text import (
        Dataset,
        cooccurrence_embeddings,
        hide_tokens,
        tokenize,
        train_tokenizer,
    )
    from fusedattn.train import Trainer, TrainingConfig

    texts, labels = columns(task.train)
    tokenizer = train_tokenizer(texts, VOCABULARY, max_length=MAX_LENGTH)
    config = EncoderConfig.from_dict(
        {
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": MAX_LENGTH,
            **ENCODER,
        }
    )
    encoder = Encoder(config, tokenizer=tokenizer, seed=seed)
    learning = Dataset.from_texts(tokenizer, texts, labels, task.packages)
    encoder.params["embeddings"]["word"]["weight"][...] = WORD_SCALE * cooccurrence_embeddings(
        learning.sequences + tokenize(tokenizer, [p.text for p in task.other]),
        config.vocab_size,
        config.hidden_size,
    )
    model = TextClassifier(encoder, task.packages, seed=seed)
    trainer = Trainer(
        model,
        TrainingConfig(epochs=epochs, seed=seed, **TRAINING),
        augment=lambda batch, rng: hide_tokens(batch, HIDDEN_SHARE, tokenizer, rng),
        out_dir=out,
    )
    return model, trainer.fit(learning)


def baselines(task: Task) -> dict[str, list[str]]:
    """What the majority class and the tuned bag of words say of the test passages."""
    texts, labels = columns(task.train)
    majority = Counter(labels).most_common(1)[0][0]
    fit, validation = split_by_file(task.train, 0.2, seed=1)
    choice = tune(columns(fit), columns(validation))
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
