"""`tests.bits` itself: its inputs never change, it leaves no rule out, a changed bit shows."""

import inspect
import itertools
import json

import ml_dtypes
import numpy as np
import pytest

import fusedattn
from tests.bits import attention, layers
from tests.bits.__main__ import FUSED, digest, main
from tests.bits.draw import DTYPES, MEMORY, Draw, in_memory
from tests.bits.rules import RULES, Call


def test_inputs_are_the_same_for_ever():
    draw = Draw(1, 2)
    assert draw.below(1000, (4,)).tolist() == [448, 430, 419, 277]
    floats, doubles = (draw.numbers((2,), dtype).tolist() for dtype in (np.float32, np.float64))
    assert [x.hex() for x in floats] == ["0x1.49a3740000000p+0", "-0x1.cd0e600000000p+0"]
    assert [x.hex() for x in doubles] == ["-0x1.a0cb706f75408p+0", "0x1.7feb6d014d84ap+0"]


@pytest.mark.parametrize("how", MEMORY)
def test_places_keep_shape_dtype_and_values(how):
    x = Draw(3).numbers((2, 3, 4, 5), np.float32)
    y = in_memory(x, how)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if not how.startswith("repeated"):
        np.testing.assert_array_equal(y, x)


def test_digest_sees_all_but_which_nan():
    x = np.array([0.0, np.nan, 1.0], np.float32)
    other = x.copy()
    other.view(np.uint32)[1] ^= 0x80000001
    assert np.isnan(other[1])
    assert digest(other) == digest(x)
    changed = [x.astype(np.float64), x[:, None], x[::-1], np.nextafter(x, np.float32(2))]
    changed.append(np.array([-0.0, np.nan, 1.0], np.float32))
    halves = [np.zeros(3, np.float16), np.zeros(3, ml_dtypes.bfloat16)]
    assert len({digest(y) for y in (x, *changed, *halves)}) == 8


def test_every_case_has_a_name_of_its_own():
    names = [name for name, _ in itertools.chain(attention.cases(), layers.cases())]
    assert len(names) > 3000
    assert len(set(names)) == len(names)
    assert {name.split("/")[1] for name in names} == set(DTYPES)
    assert {len(name.split("/")) for name in names} == {3}


def test_every_rule_of_attention_is_called():
    given = {"q", "k", "v", "layout", "out", "num_threads", "return_lse"}
    rules = set(inspect.signature(fusedattn.attention).parameters) - given
    call = Call(4, 5, 8, DTYPES["float32"])
    assert rules <= {name for rule in RULES.values() for name in rule(call)}


def test_a_changed_bit_is_found(tmp_path, capsys):
    path, some = tmp_path / "bits.json", ["--only", "rules/float32/softcap", "--isa"]
    some.append(fusedattn.cpu_info()["isas"][0])
    assert main(["write", str(path), *some]) == 0
    assert main(["compare", str(path), *some]) == 0
    hashes = json.loads(path.read_text())
    found = next(iter(hashes.values()))
    name = next(name for name in found if name.endswith("/dq"))
    found[name] = "0"
    path.write_text(json.dumps(hashes))
    capsys.readouterr()
    assert main(["compare", str(path), *some]) == 1
    assert "rules/float32: dq 1 of 9" in capsys.readouterr().out


def test_instruction_sets_with_multiply_add_agree():
    """Promise 4 across CPUs, for a seventh of the calls; NEON has tests/cpp/bits.txt."""
    if len([isa for isa in fusedattn.cpu_info()["isas"] if isa in FUSED]) < 2:
        pytest.skip("needs a CPU with two instruction sets that fuse multiplication and addition")
    assert main(["across", "--every", "7"]) == 0
