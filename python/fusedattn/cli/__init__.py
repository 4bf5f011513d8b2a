"""The command line: ``fusedattn COMMAND``.

Each command is a module of this package with ``add_parser(subparsers)``, which sets ``func`` to a
function from the parsed arguments to an exit status. Only the module of the command that was named
is imported, so that no command pays for, or needs, what another one uses.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

__all__ = ["main"]

COMMANDS = {
    "info": "show the version, the instruction sets, the threads and the build",
    "bench": "measure attention against NumPy and PyTorch on this machine",
    "pretrain": "pre-train an encoder on texts without labels",
    "finetune": "train a text classifier, from scratch or from a pre-trained encoder",
    "evaluate": "measure a classifier on labelled texts",
    "predict": "label texts, with probabilities, as JSON lines",
    "encode": "turn texts into vectors, as a NumPy array",
    "sweep": "train classifiers of several widths and compare them",
    "quickstart": "train a small text classifier on the standard library's docstrings",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit status: 0 for success, 130 after Ctrl-C, 141 for a closed pipe. Wrong arguments end
        in ``SystemExit(2)``, as argparse has it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(chosen=arguments[0] if arguments else None)
        options = parser.parse_args(arguments)
        status: int = options.func(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fusedattn":
            raise
        _fail(f"this command needs the package {error.name!r}: {_HINT}")
    # What the user gave: an environment variable, a file, a learning rate too high.
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(str(error))
    return status


def _fail(message: str) -> NoReturn:
    print(f"fusedattn: {message}", file=sys.stderr)
    raise SystemExit(1)


_HINT = "pip install 'fusedattn[train,bench]' installs all that the commands use"


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, complete for the chosen command and only names and summaries for the others."""
    parser = argparse.ArgumentParser(
        prog="fusedattn", description="Fused attention for NumPy arrays on CPUs."
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="show the version and exit",
    )
    subparsers = parser.add_subparsers(
        metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for name, summary in COMMANDS.items():
        if name == chosen:
            importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


class _CommandParser(argparse.ArgumentParser):
    """Takes files before and after options: argparse alone gives the first that come all or none.

    ``predict MODEL --out RESULTS FILE`` would otherwise end in "unrecognized arguments: FILE".
    """

    _parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._parsing:  # as parse_known_intermixed_args calls it
            return super().parse_known_args(args, namespace)
        self._parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._parsing = False


class _Version(argparse.Action):
    """Looks the version up only when asked: it lives in the extension module."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fusedattn import __version__

        print(f"fusedattn {__version__}")
        parser.exit()
