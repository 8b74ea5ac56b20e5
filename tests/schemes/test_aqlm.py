"""The AQLM scheme: what it stores, what it refuses, its rows."""

import doctest
import importlib
import json

import pytest
import torch

from quanto_hf.ops import code_dtype
from quanto_hf.schemes import Aqlm, make_scheme, scheme_from_dict

LAYOUTS = [Aqlm(2, 8), Aqlm(1, 16), Aqlm(1, 8, 2, 4), Aqlm(3, 5, 4, 16), Aqlm(1, 20)]
every_layout = pytest.mark.parametrize("scheme", LAYOUTS, ids=lambda s: str(s).replace(" ", "-"))


def draw(scheme, rows=16, columns=64):
    """Random stored tensors."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, spec in scheme.tensors((rows, columns), torch.float16).items():
        if name == "codes":
            half = 1 << (scheme.nbits - 1)
            made[name] = torch.randint(-half, half, spec.shape, generator=generator).to(spec.dtype)
        else:
            made[name] = torch.rand(spec.shape, generator=generator).to(spec.dtype)
    return made


@every_layout
def test_the_tensors_are_those_of_the_format(scheme):
    specs = scheme.tensors((16, 64), torch.float16)
    assert list(specs) == list(scheme.names) == ["codes", "codebooks", "scales"]
    lines, groups = 16 // scheme.out_group, 64 // scheme.in_group
    assert specs["codes"].shape == (lines, groups, scheme.num_codebooks)
    assert specs["codes"].dtype == code_dtype(scheme.nbits)
    assert specs["codebooks"].shape == (scheme.num_codebooks, 2**scheme.nbits, scheme.out_group, scheme.in_group)
    assert specs["scales"].shape == (lines, 1, 1, 1) and specs["scales"].dtype == torch.float16


@every_layout
@pytest.mark.parametrize("index", [[2, 0, 15, 2], [[1, 3], [0, 0]], [], 3], ids=["1d", "2d", "empty", "0d"])
def test_rows_are_those_of_the_whole_weight(scheme, index):
    tensors, chosen = draw(scheme), torch.tensor(index, dtype=torch.long)
    whole = scheme.dequantize(tensors, 64, torch.float32)
    assert torch.equal(scheme.rows(tensors, chosen, 64, torch.float32), whole[chosen])


def test_there_is_no_row_behind_the_last_one():
    with pytest.raises(IndexError, match="row 16 does not exist"):
        LAYOUTS[2].rows(draw(LAYOUTS[2]), torch.tensor([16]), 64, torch.float32)


@every_layout
def test_a_scheme_survives_json(scheme):
    again = scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme and hash(again) == hash(scheme)


def test_every_layout_has_a_name_of_its_own():
    assert len({str(scheme) for scheme in LAYOUTS}) == len(LAYOUTS)
    assert make_scheme("aqlm-2x8") == Aqlm(2, 8) and make_scheme("aqlm-1x16", 16) == Aqlm(1, 16, 1, 16)


def test_b10_bits_per_weight_are_those_of_the_papers_layouts():
    sizes = {"aqlm-1x16": 2.5039, "aqlm-2x8": 2.0078, "aqlm-1x8": 1.0059}
    for name, bits in sizes.items():
        assert make_scheme(name).bits((4096, 4096)) == pytest.approx(bits, abs=1e-4)
    assert make_scheme("aqlm-1x16").bits((1024, 1024)) == pytest.approx(10.016, abs=1e-3)
    # codes of 12 bits take 16
    assert make_scheme("aqlm-1x12").bits((1 << 14, 1 << 14)) == pytest.approx(2.0, abs=0.01)


def test_b12_a_weight_that_cannot_be_cut_is_refused_with_its_sizes():
    assert Aqlm(2, 8).refuses((3, 16)) is None
    assert (
        Aqlm(2, 8).refuses((3, 12))
        == "in_features=12 is not a multiple of the 8 that share a code of aqlm 2x8 g8 weights"
    )
    assert "out_features=3" in Aqlm(2, 8, 2).refuses((3, 16))
    assert "2 dimensions" in Aqlm(2, 8).refuses((2, 3, 16))
    with pytest.raises(ValueError, match="in_features=12"):
        Aqlm(2, 8).tensors((3, 12), torch.float16)


@pytest.mark.parametrize("values", [(0, 8), (2, 25), (2, 8.0), (2, 8, 0), (True, 8), ("2", 8)], ids=str)
def test_b12_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="does not work for AQLM weights; choose a whole number"):
        Aqlm(*values)


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(importlib.import_module("quanto_hf.schemes.aqlm"), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
