"""Options of the encoder that a training starts from: a new one, or a pre-trained one adapted."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedattn.encoder import Encoder


def add_options(parser: argparse.ArgumentParser) -> None:
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
