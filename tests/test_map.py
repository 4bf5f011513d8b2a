"""csrc/README.md is true: its rooms, files and words. Promises are counted right, links lead on."""

import re

import pytest

from tests.test_codebase import ARM, CSRC, ROOT, SOURCES, X86

PAGE = CSRC / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
PARTS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
ROOMS = sorted(
    str(p.relative_to(CSRC)) + "/" for p in CSRC.rglob("*") if p.is_dir() and any(p.glob("*.*"))
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", PAGE, *sorted((ROOT / "docs").glob("*.md"))]


def paths(text):
    """What the page writes like a file or a folder; NAME stands for any."""
    quoted = re.findall(r"`([\w/.]+)`", text)
    return {q for q in quoted if re.fullmatch(r"[\w./]+/|[\w./]+\.(?:h|cpp|py|pyi|md|txt)", q)}


def exists(name):
    """A path of the project or of csrc; a bare name of a file is one somewhere in csrc."""
    return (ROOT / name).exists() or (CSRC / name).exists() or any(CSRC.rglob(name))


def test_what_the_map_names_exists():
    named = {name for name in paths(TEXT) if "NAME" not in name}
    assert len(named) > 60, "paths() no longer sees what the page names"
    assert {name for name in named if not exists(name)} == set()


def test_every_room_is_on_the_map():
    """And the structs and tables of the kernel, which stand beside its rooms."""
    rooms = set(re.findall(r"^\| (`.*?`) \|", PARTS["The rooms"], re.MULTILINE))
    named = {name for cell in rooms for name in re.findall(r"`([^`]+)`", cell)}
    beside = {str(p.relative_to(CSRC)) for p in (CSRC / "kernel").glob("*.h")}
    assert named == {*ROOMS, "kernel/amx/tables.h", *beside} | {"kernel/"}


def test_instruction_sets_agree():
    """A file each, a line of CMake's each, a line of dispatch's each, and the tests know them."""
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    dispatch = (CSRC / "isa" / "dispatch.cpp").read_text(encoding="utf-8")
    built = set(re.findall(r"^\s*fusedattn_isa\((\w+)", cmake, re.MULTILINE))
    assert {p.stem for p in (CSRC / "isa").glob("*.cpp")} - {"dispatch"} == built
    assert set(re.findall(r"&table_(\w+)", dispatch)) == built
    assert {name for sets in (X86 | ARM).values() for name in sets} == built


COMMENTS = re.compile(r"\s*\n\s*//\s*|\s+")
KERNEL = COMMENTS.sub(
    " ",
    "\n".join(p.read_text(encoding="utf-8") for p in SOURCES if "bindings" not in p.parts).lower(),
)
WORDS = [
    word
    for cell in re.findall(r"^\| (\*\*.*?) \|", PARTS["The words"], re.MULTILINE)
    for word in re.findall(r"\*\*(.+?)\*\*", cell)
]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_glossary_is_used(word):
    """As a word, or a part of a name: sub-block is sub_blocks too."""
    pattern = re.sub(r"[ -]", "[ _-]", word.lower())
    assert re.search(rf"(?<![a-z]){pattern}", KERNEL), "used nowhere: leave it out of the glossary"


def test_words_are_explained_once():
    assert len(WORDS) == len(set(WORDS)) > 40


def test_promises_are_counted_right():
    """Those of design.md, and the names and the number that CONTRIBUTING gives them."""
    numbers = "zero one two three four five six seven eight nine ten".split()
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    promises = re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", design.partition("## Promises")[2], re.M)
    contributing = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    number, names = re.search(r"The (\w+) promises of .*?: (.*?)\. ", contributing).groups()
    assert [int(n) for n, _ in promises] == list(range(1, 1 + numbers.index(number)))
    assert [name.lower() for _, name in promises] == names.split(", ")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"
