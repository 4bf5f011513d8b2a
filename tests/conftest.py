"""Profiles for hypothesis, and the fixture that runs a test once for each instruction set."""

import os

import hypothesis
import pytest

import fusedattn
from fusedattn import _core

# The default is small and always the same, so that a failure is one for everybody;
# FUSEDATTN_HYPOTHESIS=thorough searches on.
hypothesis.settings.register_profile("default", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=3000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("FUSEDATTN_HYPOTHESIS", "default"))


@pytest.fixture(scope="module", params=fusedattn.cpu_info()["isas"])
def isa(request):
    """Name of the instruction set that the kernel uses during the test; each in turn."""
    before = fusedattn.cpu_info()["isa"]
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)
