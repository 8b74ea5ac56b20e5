"""One contract for every registered scheme, whatever its tensors are; what is of groups is in test_schemes.py."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F

from quanto_hf.fit import Context
from quanto_hf.schemes import SCHEMES, Scheme, TensorSpec, class_of, make_scheme, notes, scheme_from_dict

# in place of the examples of a scheme, where these take long to make; number types have no examples
SMALL = {"aqlm": ("aqlm-2x4", "aqlm-1x5")}
EVERY = [
    make_scheme(name)
    for cls in SCHEMES.values()
    for name in SMALL.get(cls.kind, cls.examples or getattr(cls, "qtypes", tuple)())
]
every_scheme = pytest.mark.parametrize("scheme", EVERY, ids=lambda s: str(s).replace(" ", "-"))
# what all of them can cut
SHAPE = (32, 192)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def specs(tensors):
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_every_registered_scheme_is_under_the_contract():
    assert {scheme.kind for scheme in EVERY} == set(SCHEMES)


@every_scheme
def test_its_name_makes_it_and_no_other_scheme_knows_it(scheme: Scheme):
    asked = scheme.asked()
    assert make_scheme(**asked) == scheme and class_of(asked["weights"]) is type(scheme)
    assert [cls for cls in SCHEMES.values() if cls.knows(asked["weights"])] == [type(scheme)]
    assert type(scheme).refuses_group_size(asked["weights"], asked["group_size"]) is None
    assert "group_size='8'" in type(scheme).refuses_group_size(asked["weights"], "8")


@every_scheme
def test_it_survives_json_and_pickling_and_is_hashable_and_frozen(scheme: Scheme):
    again = scheme_from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert {scheme, again, pickle.loads(pickle.dumps(scheme))} == {scheme} and type(again) is type(scheme)
    with pytest.raises(AttributeError):
        scheme.kind = "other"


@every_scheme
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_tensors_are_those_that_were_announced_and_tell_the_weight(scheme: Scheme, dtype: torch.dtype):
    made, announced = scheme.quantize(torch.randn(SHAPE).to(dtype)), scheme.tensors(SHAPE, dtype)
    assert list(made) == list(announced) == list(scheme.names) and specs(made) == announced
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in made.values())
    assert scheme.nbytes(SHAPE, dtype) == sum(tensor.nbytes for tensor in made.values())
    assert scheme.bits(SHAPE, dtype) == 8 * scheme.nbytes(SHAPE, dtype) / (SHAPE[0] * SHAPE[1])
    found = scheme.weight_of(announced)
    assert found.shape == SHAPE and (found.dtype is dtype or not scheme.float_names)
    assert all(announced[name].dtype is dtype for name in scheme.float_names)


@every_scheme
def test_other_tensors_are_no_weight(scheme: Scheme):
    announced = scheme.tensors(SHAPE, torch.bfloat16)
    assert scheme.weight_of({}) is None
    for name, spec in announced.items():
        others = {part: other for part, other in announced.items() if part != name}
        assert scheme.weight_of(others) is None
        for wrong in (
            TensorSpec(spec.shape, torch.int64),
            TensorSpec((*spec.shape, 1), spec.dtype),
            TensorSpec((), spec.dtype),
        ):
            assert scheme.weight_of({**others, name: wrong}) is None
    assert scheme.weight_of({**announced, "more": TensorSpec((1,), torch.float32)}) is None


@every_scheme
def test_rows_and_products_are_those_of_the_dequantized_weight(scheme: Scheme):
    weight = torch.randn(SHAPE)
    tensors, index = scheme.quantize(weight), torch.tensor([[5, 31], [0, 5]])
    whole = scheme.dequantize(tensors, SHAPE[1], torch.float32)
    assert whole.shape == SHAPE and float((whole - weight).norm() / weight.norm()) < 0.75
    assert torch.equal(scheme.rows(tensors, index, SHAPE[1], torch.float32), whole[index])
    with pytest.raises(IndexError):
        scheme.rows(tensors, torch.tensor([32]), SHAPE[1], torch.float32)
    x, bias = torch.randn(2, 3, SHAPE[1]), torch.randn(SHAPE[0])
    bound = (SHAPE[1] + 8) * 2**-24 * (F.linear(x.abs(), whole.abs()) + bias.abs())
    assert ((scheme.linear(x, tensors, bias) - F.linear(x, whole, bias)).abs() <= bound).all()
    for dtype in FLOATS:
        assert scheme.dequantize(tensors, SHAPE[1], dtype).dtype is dtype


@every_scheme
def test_quantizing_takes_the_weight_as_it_lies_and_changes_nothing(scheme: Scheme):
    weight = torch.randn(SHAPE[::-1], requires_grad=True)
    kept, wanted = weight.detach().clone(), scheme.quantize(weight.detach().T.contiguous())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(scheme.quantize(weight.T), wanted)
    assert torch.equal(weight, kept) and same(scheme.quantize(kept.T, None, Context(seed=0)), wanted)


@every_scheme
def test_what_is_no_weight_is_refused(scheme: Scheme):
    bad = torch.randn(SHAPE)
    bad[3, 100] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        scheme.quantize(bad)
    with pytest.raises(ValueError, match="float dtype"):
        scheme.quantize(torch.zeros(SHAPE, dtype=torch.int32))


@every_scheme
def test_it_says_what_it_takes_before_it_is_asked_to(scheme: Scheme):
    assert scheme.refuses(SHAPE) is None and scheme.refuses_fit() is None
    with pytest.raises(ValueError) as caught:
        scheme.quantize(torch.randn(SHAPE), "no-such-fit")
    assert str(caught.value) == scheme.refuses_fit("no-such-fit")
    if (reason := scheme.refuses_learning()) is not None:
        with pytest.raises(ValueError):
            scheme.encode(torch.randn(SHAPE), torch.ones(1))
        assert str(scheme) in reason
    assert scheme.refuses_training() is None or scheme.refuses_training().strip()


@every_scheme
def test_a_power_of_two_goes_into_the_stored_tensors_and_back(scheme: Scheme):
    tensors = scheme.quantize(torch.randn(SHAPE))
    twice = {**tensors, **scheme.scaled(tensors, 2.0)}
    whole = scheme.dequantize(tensors, SHAPE[1], torch.float32)
    assert torch.equal(scheme.dequantize(twice, SHAPE[1], torch.float32), 2 * whole)
    assert same({**twice, **scheme.scaled(twice, 0.5)}, tensors)


@every_scheme
def test_what_making_takes_is_told_in_numbers_and_notes_in_sentences(scheme: Scheme):
    for device in ("cpu", "cuda"):
        for calibrated in (False, True):
            assert scheme.workspace_bytes(SHAPE, torch.bfloat16, device=device, calibrated=calibrated) >= 0
            assert scheme.work(SHAPE, calibrated) > 0
        assert scheme.workspace_bytes((0, 0), torch.bfloat16, device=device) == 0
    assert scheme.wants_moments() in (True, False)
    said = notes({"layer": (scheme, scheme.tensors(SHAPE, torch.bfloat16))})
    assert all("layer" in note for note in said)


@every_scheme
def test_what_can_be_trained_is_written_back(scheme: Scheme):
    tensors = scheme.quantize(torch.randn(SHAPE))
    if (part := scheme.trainable(tensors)) is None:
        return
    before = scheme.dequantize(tensors, SHAPE[1], torch.float32)
    torch.testing.assert_close(part.weight(), before)
    part.weight().square().sum().backward()
    assert all(value.grad is not None for value in part.values)
    with torch.no_grad():
        part.values[0].mul_(2)
        part.store()
    torch.testing.assert_close(scheme.dequantize(tensors, SHAPE[1], torch.float32), 2 * before)
