"""The quickstart's task: which package of the standard library does a docstring document?

Every Python installation carries this text. Passages are divided by module file, so that no file
has passages on both sides; a passage that occurs twice is kept once, and one that occurs in two
packages not at all. A package that is one file, or almost, cannot be divided so and is no class.

It is not an easy task: a test file is about something that no training file is about, and a third
of the passages are a single line.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Code that is not the library's own, or tests it. Names of folders, anywhere in a path.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
MIN_WORDS = 5
MIN_PASSAGES = 20  # a package with fewer is left out
TEST_SHARE = 0.2


class Passage(NamedTuple):
    """A docstring, the file it is in, and the top-level package of that file."""

    text: str
    file: str
    package: str


class Task(NamedTuple):
    """The two parts of the passages, the packages to tell apart, sorted, and more text.

    `other` holds the passages of the remaining packages: text of the same kind to learn words from.
    """

    train: list[Passage]
    test: list[Passage]
    packages: list[str]
    other: list[Passage]


def read_docstrings(library: Path | None = None) -> Iterator[Passage]:
    """Yield the docstrings of modules, classes and functions under `library`.

    Parameters
    ----------
    library : Path, optional
        By default, where this Python keeps its standard library.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if SKIPPED.intersection(inside.parts):
            continue
        try:
            with warnings.catch_warnings():  # of invalid escapes in old sources
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of bad syntax
            continue
        package = inside.parts[0].removesuffix(".py")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text.split()) >= MIN_WORDS:
                    yield Passage(text, inside.as_posix(), package)


def without_duplicates(passages: list[Passage]) -> list[Passage]:
    """Keep the first of equal texts, and none of those that several packages share.

    Texts are equal if they differ in case and white space alone.
    """
    packages = defaultdict(set)
    first: dict[str, Passage] = {}
    for passage in passages:
        key = " ".join(passage.text.lower().split())
        packages[key].add(passage.package)
        first.setdefault(key, passage)
    return [passage for key, passage in first.items() if len(packages[key]) == 1]


def split_by_file(
    passages: list[Passage], share: float, seed: int
) -> tuple[list[Passage], list[Passage]]:
    """Set whole files aside, in each package those that hold about `share` of its passages.

    Files are taken in a random order, one that would exceed 1.5 times the share being passed over.
    A package of which no file fits stays whole in the first part.
    """
    rng = np.random.default_rng(seed)
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for passage in passages:
        sizes[passage.package][passage.file] += 1
    aside = set()
    for package in sorted(sizes):
        files = sizes[package]
        wanted, taken = share * files.total(), 0
        for file in rng.permutation(sorted(files)).tolist():
            if taken < 0.8 * wanted and taken + files[file] <= 1.5 * wanted:
                aside.add(file)
                taken += files[file]
    kept = [p for p in passages if p.file not in aside]
    return kept, [p for p in passages if p.file in aside]


def docstring_task(max_packages: int = 20, seed: int = 0, library: Path | None = None) -> Task:
    """The packages with the most passages among those whose files can be divided.

    Parameters
    ----------
    max_packages : int, default 20
    seed : int, default 0
        Of the division.
    library : Path, optional
        By default, this Python's standard library.
    """
    passages = without_duplicates(list(read_docstrings(library)))
    train, test = split_by_file(passages, TEST_SHARE, seed)
    sizes = Counter(p.package for p in passages)
    divided = {p.package for p in test}
    largest = [name for name, n in sizes.most_common() if n >= MIN_PASSAGES and name in divided]
    packages = sorted(largest[:max_packages])
    return Task(
        [p for p in train if p.package in packages],
        [p for p in test if p.package in packages],
        packages,
        [p for p in passages if p.package not in packages],
    )
