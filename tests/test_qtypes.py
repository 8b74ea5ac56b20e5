"""Number types: their names, their ranges, and their tables against the formulas they come from."""

import doctest
import pickle
from statistics import NormalDist

import pytest
import torch

import quanto_hf.qtypes
from quanto_hf.qtypes import FP4_VALUES, NF4_VALUES, QTYPES, QType, qfloat8, qint8, qtype, weight_names

every_qtype = pytest.mark.parametrize("kind", QTYPES.values(), ids=str)


@every_qtype
def test_a_type_is_found_by_its_name_by_the_name_that_quanto_gave_it_and_by_itself(kind: QType):
    assert qtype(kind.name) is kind
    assert qtype("q" + kind.name) is kind
    assert qtype(kind) is kind
    assert str(kind) == kind.name


def test_float8_means_e4m3fn():
    assert qtype("float8") is qtype("qfloat8") is qfloat8 is QTYPES["float8_e4m3fn"]


def test_every_weight_name_is_a_type():
    assert {qtype(name).name for name in weight_names()} == set(QTYPES)


@pytest.mark.parametrize("name", ["int3", "INT4", "qqint4", "", None, 4], ids=repr)
def test_another_name_is_an_error_that_says_what_came_and_what_is_allowed(name):
    with pytest.raises(ValueError) as caught:
        qtype(name)
    assert repr(name) in str(caught.value)
    assert all(allowed in str(caught.value) for allowed in weight_names())


@every_qtype
def test_codes_are_stored_in_bytes_of_an_integer_dtype(kind: QType):
    # a float8 parameter would be upcast by Module.to(dtype) without a word
    assert kind.storage.itemsize == 1
    assert not kind.storage.is_floating_point
    assert kind.is_packed == (kind.bits < 8)
    assert kind.levels == 2**kind.bits


@every_qtype
def test_a_type_is_hashable_and_survives_pickling(kind: QType):
    assert pickle.loads(pickle.dumps(kind)) == kind
    assert len({kind, pickle.loads(pickle.dumps(kind))}) == 1


@pytest.mark.parametrize("name", ["int2", "int4"])
def test_a_packed_integer_uses_every_code(name: str):
    kind = qtype(name)
    assert kind.qmax - kind.qmin + 1 == kind.levels


def test_int8_mirrors_a_weight_and_its_negative():
    assert (qint8.qmin, qint8.qmax, qint8.storage) == (-127, 127, torch.int8)


@pytest.mark.parametrize("kind", [t for t in QTYPES.values() if t.kind == "float"], ids=str)
def test_a_float8_reaches_as_far_as_its_torch_dtype(kind: QType):
    limits = torch.finfo(kind.float_dtype)
    assert (kind.qmin, kind.qmax) == (limits.min, limits.max)


@pytest.mark.parametrize("kind", [t for t in QTYPES.values() if t.kind == "table"], ids=str)
def test_a_table_has_one_value_for_each_code_and_an_exact_zero(kind: QType):
    assert len(kind.values) == kind.levels
    assert (min(kind.values), max(kind.values)) == (kind.qmin, kind.qmax)
    assert 0.0 in kind.values


def test_nf4_holds_the_normal_quantiles_of_the_qlora_paper():
    # 8 steps below and 7 above zero, each between the quantile at the paper's offset and the median
    offset, quantile = 0.9677083, NormalDist().inv_cdf
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    values = sorted([*below, 0.0, *above])
    # the negative half of the table has 7 values and the positive half 8, both scaled by the largest
    expected = [v / max(above) for v in values]
    # the authors computed in float32, with a quantile function of 6 digits
    assert NF4_VALUES == pytest.approx(expected, abs=1e-6)


def test_fp4_holds_the_values_of_its_bit_fields():
    def e2m1(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
        return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))

    # compared as text, since 0.0 == -0.0
    assert [str(v) for v in FP4_VALUES] == [str(e2m1(code)) for code in range(16)]


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(quanto_hf.qtypes)
    assert result.attempted and not result.failed
