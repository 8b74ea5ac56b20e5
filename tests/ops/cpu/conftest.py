"""Each level of instructions in turn."""

import pytest
from native_weights import LEVELS

from quanto_hf.ops.cpu.library import NATIVE


@pytest.fixture(params=LEVELS)
def level(request):
    """A level that this processor offers, in use during the test. (The self-check keeps its results per level.)"""
    before = NATIVE.level()
    NATIVE.use_level(request.param)
    yield request.param
    NATIVE.use_level(before)
