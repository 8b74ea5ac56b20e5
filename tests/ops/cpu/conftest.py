"""Each level of instructions in turn."""

import pytest
from native_weights import LEVELS

from quanto_hf.ops.cpu.library import NATIVE


@pytest.fixture(params=LEVELS)
def level(request):
    """A level that this processor offers, in use during the test. (The self-check keeps its results per level.)"""
    NATIVE.use_level(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _level_as_before():
    """A test that fails in the middle of a loop over levels does not hand its level on."""
    before = NATIVE.level() if NATIVE else None
    yield
    if NATIVE:
        NATIVE.use_level(before)
