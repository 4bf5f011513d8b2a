"""Profiles for hypothesis, and the fixture that runs a test once for each instruction set."""

import os
import signal

import hypothesis
import pytest

import fusedattn
from fusedattn import _core

# A shell that starts pytest in the background has it ignore Ctrl-C, and all processes below it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The default is small and always the same, so that a failure is one for everybody;
# FUSEDATTN_HYPOTHESIS=thorough searches on. One test, one instruction set: `isa` may be a fixture.
hypothesis.settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("default"), max_examples=3000, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("FUSEDATTN_HYPOTHESIS", "default"))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """Instruction sets vary fastest, so that `tests.accuracy` knows the next one's answers."""
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", fusedattn.cpu_info()["isas"], indirect=True)


@pytest.fixture
def isa(request):
    """Name of the instruction set that the kernel uses during the test; each in turn."""
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa("")
