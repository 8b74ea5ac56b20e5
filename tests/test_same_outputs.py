"""What is computed stays the same to the bit: everything that this machine can compute has the digests that are stored.

Where other bits are wanted, or something new is computed, `tests/fixtures/make_outputs.py` writes them. Which output it
is that differs shows a `diff` of what it writes with `--all`, from the tree before and from this one.
"""

import json

import pytest
import torch
from fixtures.make_outputs import FILE, compute, different, finish, fold, start
from fixtures.outputs.library import levels

STORED = json.loads(FILE.read_text(encoding="utf-8"))
IN_TORCH = ("reference", "torch")
# The longest part is started first, on the other core.
SETTINGS = sorted({*STORED, *levels()} - set(IN_TORCH)) + list(IN_TORCH)


@pytest.fixture(scope="module")
def torch_process():
    process = start("torch")
    yield process
    process.kill()
    process.wait()


def compare(setting, found):
    here, stored = fold(found), STORED[setting]
    changed, lost = different(here, stored), different(stored, here)
    new = [name for name in changed if name not in lost]
    assert not new, "not in the file; run tests/fixtures/make_outputs.py"
    gone = [name for name in lost if name not in changed]
    assert not gone, "no longer computed"
    assert not changed, "other bits"


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_bits_are_those_that_are_stored(setting, torch_process):
    if setting == "torch":
        return compare(setting, finish(torch_process))
    if setting not in (*levels(), "reference"):
        pytest.skip(f"this machine has no level {setting}")
    if setting not in STORED:
        pytest.skip(f"nobody has run tests/fixtures/make_outputs.py on a machine with {setting}")
    # what comes out does not depend on it; tiny products are faster
    torch.set_num_threads(1)
    compare(setting, compute(setting))


def test_a_digest_that_differs_is_named():
    stored = {"int4": {"rows": "1", "linear": "2"}, "int8": {"rows": "3"}}
    assert different(stored, stored) == []
    assert different(stored, {"int4": {"rows": "0", "linear": "2"}}) == ["int4: rows", "int8: rows"]
    assert different({}, stored) == []
    # the order in which outputs are computed does not matter, each of them does
    one, other = {"a": {"b": {"x": "1", "y": "2"}}}, {"a": {"b": {"y": "2", "x": "1"}}}
    assert fold(one) == fold(other) != fold({"a": {"b": {"x": "2", "y": "1"}}})
