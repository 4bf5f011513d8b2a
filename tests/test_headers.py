"""The kernel's headers have doors: each parses alone, includes what it uses, and arrows go down."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.test_codebase import ARM, CSRC, ROOT, STRUCTS, X86, included

KERNEL = CSRC / "kernel"
HEADERS = {str(p.relative_to(CSRC)): p for p in sorted(KERNEL.rglob("*.h"))}
TOP = {"kernel/tables.h", "kernel/amx/tables.h"}  # what an instruction set offers

# Which room of the kernel may know which. Everybody knows the plain structs.
MAY_INCLUDE = {
    "structs": set(),
    "vector": set(),
    "rules": {"vector"},
    "attention": {"vector", "rules"},
    "layers": {"vector"},
    "amx": {"vector", "rules", "attention", "layers"},
    "tables": {"vector", "rules", "attention", "layers"},
}

# Which instruction set it is, is asked in vector/ alone, but for these.
ASKS_FOR_THE_SET = {
    "kernel/attention/backward_pairs.h": "bfloat16 in pairs is AVX512-BF16's alone",
    "kernel/attention/forward_pairs.h": "bfloat16 in pairs is AVX512-BF16's alone",
    "kernel/attention/few_rows.h": "bfloat16 in pairs is AVX512-BF16's alone",
    "kernel/attention/pages.h": "bfloat16 in pairs is AVX512-BF16's alone",
    "kernel/layers/columns.h": "whether a row's last vector is a masked one or a loop of elements",
    "kernel/rules/dropout.h": "how to multiply 32-bit words into 64 bits",
}


def room(name):
    """Room of a header: its folder in the kernel, ``structs`` or ``tables`` beside them."""
    if name in STRUCTS or name == "kernel/tables.h":
        return "structs" if name in STRUCTS else "tables"
    return name.split("/")[1]


def code(path):
    """A source without its comments and strings."""
    return re.sub(r'//[^\n]*|"[^"\n]*"', "", path.read_text(encoding="utf-8"))


def reached(name, so_far):
    """Adds a header and all that it includes to ``so_far``."""
    if name not in so_far:
        so_far.add(name)
        for below in included(HEADERS[name]):
            reached(below, so_far)
    return so_far


@pytest.mark.parametrize("name", HEADERS)
def test_arrows_go_down(name):
    """amx/tables.h alone is above the tables; nobody but the instruction sets is above that."""
    for below in included(HEADERS[name]):
        if name == "kernel/amx/tables.h" and below == "kernel/tables.h":
            continue
        assert below not in TOP, f"{name} includes {below}"
        assert room(below) in MAY_INCLUDE[room(name)] | {"structs", room(name)}, below


def test_only_instruction_sets_include_the_tables():
    users = {p.name for p in CSRC.rglob("*.cpp") if TOP & set(included(p))}
    assert users == {p.name for p in (CSRC / "isa").glob("*.cpp")} - {"dispatch.cpp"}


def test_no_header_includes_itself_round_about():
    for name in HEADERS:
        for below in included(HEADERS[name]):
            assert name not in reached(below, set()), f"{name} and {below} include each other"


def test_only_vectors_ask_for_the_instruction_set():
    asks = {
        name
        for name, path in HEADERS.items()
        if room(name) != "vector" and re.search(r"^\s*#\s*(if|elif)", code(path), re.MULTILINE)
    }
    assert asks == set(ASKS_FOR_THE_SET)


# What a header defines at namespace scope: functions, and names of any other kind.
DEFINES = re.compile(
    r"""^(?:template\s*<[^;{]*?>\s*)?(?:
      FA_(?:INLINE|NOINLINE|ENTRY)\s+(?:[\w:<>,&*\s]|\([^()]*\))*?\b(?P<function>\w+)\(
    | (?:struct|class|enum(?:\s+class)?)\s+(?P<type>\w+)
    | using\s+(?P<alias>\w+)\s*=
    | (?:inline\s+)?constexpr\s+[\w:<>*&\s]+?\b(?P<constant>\w+)\s*(?:=|\{)
    | \#define\s+(?P<macro>\w+) )""",
    re.MULTILINE | re.VERBOSE,
)
# A local variable or a member of that name.
DECLARES = r"(?:\bauto|\w\s*[*&]|\w\s)\s*\b{}(?:\[\w*\])?\s*(?:=|;|\{{)"


def test_headers_include_what_they_use():
    """A template finds a function that is defined later, by lookup when it is instantiated.

    The compiler is content then and the order of other files is what holds it together. So every
    name of the kernel is looked for in what the header that uses it includes.
    """
    sources = {name: code(path) for name, path in HEADERS.items()}
    homes, functions = {}, set()
    for name, text in sources.items():
        for m in DEFINES.finditer(text):
            homes.setdefault(m[m.lastgroup], set()).add(name)
            functions |= {m["function"]} - {None}
    missing = [
        f"{name} uses {word} of {', '.join(sorted(homes[word]))}"
        for name, text in sources.items()
        for below in [reached(name, set())]
        for word in sorted(homes.keys() & set(re.findall(r"\w+", text)))
        if not homes[word] & below
        and re.search(
            rf"(?<![\w.>:]){word}\b" + (r"\s*(<[^;=()]*>)?\(" if word in functions else ""), text
        )
        and not re.search(DECLARES.format(word), text)
    ]
    assert len(homes) > 300, "DEFINES no longer sees the kernel's definitions"
    assert not missing, "\n".join(missing)


COMPILERS = {isa: shutil.which("c++") for isa in (X86 | ARM).get(platform.machine(), ("baseline",))}
COMPILERS.setdefault("neon", shutil.which("aarch64-linux-gnu-g++"))


def complaints(isa, folder):
    """What the compiler says of every header of an instruction set, each a unit of its own.

    The compiler's own header of intrinsics, two thirds of the time of each, is compiled once.
    """
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    flags = re.search(rf"^\s*fusedattn_isa\({isa}\b([^)]*)\)", cmake, re.MULTILINE)[1].split()
    flags += ["-std=c++20", f"-I{CSRC}", "-ffp-contract=off", "-fno-math-errno"]
    flags += ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unused-function"]
    folder.mkdir()
    intrinsics = folder / "intrinsics.h"
    either = "#if __has_include(<{0}>)\n#include <{0}>\n#endif\n"  # a compiler has its own alone
    intrinsics.write_text(either.format("immintrin.h") + either.format("arm_neon.h"))
    compiled = [*flags, "-x", "c++-header", intrinsics, "-o", f"{intrinsics}.gch"]
    subprocess.run([COMPILERS[isa], *compiled], check=True)
    units = []
    for name in HEADERS:
        if room(name) != "amx" or isa == "amx":
            units.append(folder / (name.replace("/", "-") + ".cpp"))
            units[-1].write_text(f'#include "{name}"\n')
    alone = [*flags, "-fsyntax-only", "-include", intrinsics, *units]
    return subprocess.run([COMPILERS[isa], *alone], capture_output=True, text=True).stderr


@pytest.fixture(scope="module")
def all_complaints(tmp_path_factory):
    """Of every instruction set that can be compiled here, at once; longest first."""
    folder = tmp_path_factory.mktemp("headers")
    isas = [isa for isa in reversed(COMPILERS) if COMPILERS[isa]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip(isas, pool.map(lambda isa: complaints(isa, folder / isa), isas), strict=True)
        )


@pytest.mark.parametrize("target", COMPILERS)
def test_every_header_parses_alone(target, all_complaints):
    if not COMPILERS[target]:
        pytest.skip(f"no compiler for {target} here")
    assert all_complaints[target] == ""
