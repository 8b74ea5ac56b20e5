"""Recipe: add a scheme, with a scale type of its own: fp4 codes, of which 32 columns share a power of two (MXFP4).

OCP Microscaling Formats (MX) Specification 1.0.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from recipes import journey

from quanto_hf.fit import ScaleType
from quanto_hf.schemes import SCHEMES, Lookup, make_scheme, register_scheme, scheme_from_dict


class E8m0(ScaleType):
    """Powers of two: the exponent plus 127 in a byte; 255 is NaN."""

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        """See :class:`ScaleType`: the exponent that is nearest."""
        exponent = torch.log2(scale.float()).round().clamp(-127, 127) + 127
        return torch.where(scale.isfinite() & (scale > 0), exponent, 255.0 * ~scale.isfinite()).to(self.dtype)

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """See :class:`ScaleType`."""
        scale = torch.exp2(stored.float() - 127)
        return torch.where(stored == 255, torch.full_like(scale, torch.nan), scale)


E8M0 = E8m0("e8m0", torch.uint8)


@dataclass(frozen=True)
class Mx(Lookup):
    """Table values times a power of two."""

    kind: ClassVar[str] = "mx"
    examples: ClassVar[tuple[str, ...]] = ("mxfp4",)

    @classmethod
    def knows(cls, name):
        return name == "mxfp4"

    @classmethod
    def named(cls, name, group_size=None, symmetric=None):
        return cls("fp4", 32 if group_size is None else group_size, True if symmetric is None else symmetric)

    @property
    def scale_type(self):
        return E8M0

    def asked(self):
        return {**super().asked(), "weights": "mxfp4"}

    def __str__(self):
        return f"mxfp4 g{self.group_size}"


def add():
    return register_scheme(Mx)


@pytest.fixture(autouse=True)
def _mx():
    with journey.added(add):
        yield


def test_a_plain_model_is_quantized():
    # 4 bits, and a byte for 32 columns
    journey.plain_model({"weights": "mxfp4"}, 0.15, 4.25)


def test_scales_are_learned():
    model = torch.nn.Sequential(torch.nn.Linear(128, 8))
    journey.quantize(model, "mxfp4", learn_scales=True)
    model(torch.randn(3, 128)).sum().backward()
    assert model[0].learned_scale.grad is not None
    assert journey.freeze(model)[0].tensors()["scale"].dtype is torch.uint8


def test_a_model_of_transformers_takes_the_whole_journey(tmp_path):
    journey.transformers_model("recipes.test_scheme", {"weights": "mxfp4"}, tmp_path, "mxfp4 g32")


def test_it_is_found_by_its_name_and_its_kind_and_fp4_stays_what_it_was():
    assert make_scheme("mxfp4") == Mx("fp4", 32) == scheme_from_dict(Mx("fp4", 32).to_dict())
    assert type(make_scheme("fp4")) is Lookup and SCHEMES["mx"] is Mx
    with pytest.raises(ValueError, match="mxfp4"):
        journey.QuantoConfig("fp5")


def test_the_scales_are_powers_of_two_and_chosen_before_the_codes():
    scheme, weight = make_scheme("mxfp4"), torch.randn(16, 256) * torch.logspace(-9, 9, 16)[:, None]
    tensors = scheme.quantize(weight)
    assert tensors["scale"].dtype is torch.uint8 and tensors["scale"].shape == (16, 8)
    made = scheme.dequantize(tensors, 256, torch.float32)
    assert journey.relative(made, weight) < 0.15
    scale = torch.exp2(tensors["scale"].float() - 127).repeat_interleave(32, 1)
    # no number of the table is nearer than the stored one
    table = torch.tensor(scheme.type.values)
    best = (weight / scale)[..., None].sub(table).abs().amin(-1) * scale
    assert ((made - weight).abs() <= best * 1.001 + scale * 1e-3).all()
    doubled = scheme.scaled(tensors, 2.0)["scale"]
    assert torch.equal(scheme.dequantize({**tensors, "scale": doubled}, 256, torch.float32), 2 * made)
    weight[3, 7] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        scheme.quantize(weight)


def test_experts_rows_and_rounded_inputs_are_multiplied():
    scheme, weight = make_scheme("mxfp4"), torch.randn(3, 8, 64)
    tensors = scheme.quantize(weight)
    dense = scheme.dequantize(tensors, 64, torch.float32)
    x, ids = torch.randn(5, 64), torch.tensor([0, 2, 2, 1, 0])
    wanted = torch.stack([dense[e] @ row for row, e in zip(x, ids, strict=True)])
    torch.testing.assert_close(scheme.expert_linear(x, ids, tensors, None), wanted)
    flat = scheme.quantize(weight[0])
    assert torch.equal(scheme.rows(flat, torch.tensor([5]), 64, torch.float32), dense[0][[5]])
