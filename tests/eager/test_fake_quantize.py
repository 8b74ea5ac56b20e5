"""Fake quantization: torch's numbers, straight-through gradients, learned scales."""

import pytest
import torch

from quanto_hf.eager.fake_quantize import (
    FakeQuantize,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from quanto_hf.eager.grid import round_to_grid, round_with_learned_scale
from quanto_hf.nn.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PlaceholderObserver,
)

SETTINGS = {
    "tensor-affine": ("MovingAverageMinMaxObserver", {"dtype": "quint8", "qscheme": "per_tensor_affine"}),
    "tensor-symmetric": ("MovingAverageMinMaxObserver", {"dtype": "qint8", "qscheme": "per_tensor_symmetric"}),
    "channel-symmetric": (
        "MovingAveragePerChannelMinMaxObserver", {"dtype": "qint8", "qscheme": "per_channel_symmetric", "ch_axis": 1}),
    "channel-affine": ("PerChannelMinMaxObserver", {"dtype": "quint8", "qscheme": "per_channel_affine", "ch_axis": 0}),
    "histogram": ("HistogramObserver", {"dtype": "quint8", "qscheme": "per_tensor_affine", "reduce_range": True}),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_numbers_and_gradients_are_those_of_torch(ao, setting):
    from quanto_hf.nn import observers

    name, args = SETTINGS[setting]
    mine = FakeQuantize(getattr(observers, name), **args)
    objects = {key: getattr(torch, value) if key in ("dtype", "qscheme") else value for key, value in args.items()}
    theirs = ao.FakeQuantize(getattr(ao, name), **objects)
    for step in range(3):
        a = torch.randn(5, 7).mul(3 - step).requires_grad_()
        b = a.detach().clone().requires_grad_()
        out, expected = mine(a), theirs(b)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        assert torch.equal(a.grad, b.grad)


def test_observing_and_rounding_are_switched_one_by_one():
    model = torch.nn.Sequential(FakeQuantize(), torch.nn.ReLU())
    x = torch.randn(10)
    model(x)
    scale = model[0].scale.clone()
    model.apply(disable_observer)
    model(x * 100)
    assert torch.equal(model[0].scale, scale)
    model.apply(disable_fake_quant)
    assert torch.equal(model[0](x), x)
    model.apply(enable_fake_quant)
    assert not torch.equal(model[0](x), x)
    model.apply(enable_observer)
    model(x * 100)
    assert float(model[0].scale) > float(scale)


def test_the_same_number_comes_out_with_and_without_a_gradient():
    fake = FakeQuantize()
    x = torch.randn(1000)
    fake(x)
    fake.disable_observer()
    assert torch.equal(fake(x), fake(x.clone().requires_grad_()))
    learned = FakeQuantize(learnable=True)
    learned(x)
    assert torch.equal(learned(x), fake(x))


def test_gradients_stop_outside_of_the_range_only():
    x = torch.tensor([-1.2, -0.7, 0.4, 6.9, 8.0], requires_grad=True)
    out = round_to_grid(x, torch.tensor([1.0]), torch.tensor([1]), 0, 8)
    out.sum().backward()
    assert out.tolist() == [-1, -1, 0, 7, 7]
    assert x.grad.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_out_as_they_went_in(dtype):
    fake = FakeQuantize().to(dtype)
    x = torch.randn(64).to(dtype)
    out = fake(x)
    assert out.dtype == dtype and fake.scale.dtype == torch.float32
    exact = round_to_grid(x.float(), fake.scale, fake.zero_point, 0, 255)
    torch.testing.assert_close(out, exact.to(dtype))


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats(kind):
    fake = FakeQuantize(dtype=kind, qscheme="per_tensor_symmetric")
    x = torch.randn(256)
    out = fake(x)
    assert torch.equal(out, (x / fake.scale).to(getattr(torch, kind)).float() * fake.scale)
    assert float((out - x).norm() / x.norm()) < 0.1


def test_the_gradient_of_a_learned_scale_is_the_one_of_the_paper():
    scale = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([0.3, 0.6, 9.0, -9.0], requires_grad=True)
    out = round_with_learned_scale(x, scale, torch.tensor([0]), -4, 3, None, "qint8")
    out.sum().backward()
    assert out.tolist() == [0.5, 0.5, 1.5, -2.0]
    steps = [0.6, 1.2]
    expected = sum(round(v) - v for v in steps) + 3 - 4
    assert scale.grad.item() == pytest.approx(expected / (4 * 4) ** 0.5, abs=1e-6)
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("observer", [MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver])
def test_a_learned_scale_gets_better(observer):
    scheme = "per_channel_symmetric" if "Channel" in observer.__name__ else "per_tensor_symmetric"
    fake = FakeQuantize(observer, dtype="qint8", qscheme=scheme, quant_min=-2, quant_max=1, learnable=True)
    x = torch.randn(4, 256)
    optimizer = torch.optim.Adam(fake.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (fake(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert fake.scale.numel() == (4 if "channel" in scheme else 1)
    fresh = FakeQuantize(observer, dtype="qint8", qscheme=scheme, quant_min=-2, quant_max=1, learnable=True)
    fresh.load_state_dict(fake.state_dict())
    assert torch.equal(fresh(x), fake(x))


def test_fixed_and_fused():
    fixed = FixedQParamsFakeQuantize(FixedQParamsObserver.with_args(scale=1 / 256, zero_point=0))
    assert fixed(torch.tensor([0.5, 2.0])).tolist() == [0.5, 255 / 256]
    with pytest.raises(ValueError, match="FixedQParamsObserver"):
        FixedQParamsFakeQuantize(MovingAverageMinMaxObserver)
    fused = FusedMovingAvgObsFakeQuantize()
    assert (fused.quant_min, fused.quant_max) == (0, 255)
    with pytest.raises(ValueError, match="moving average"):
        FusedMovingAvgObsFakeQuantize(HistogramObserver)
    with pytest.raises(ValueError, match="no range"):
        FakeQuantize(PlaceholderObserver)


def test_an_empty_tensor_passes():
    assert FakeQuantize()(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("learnable", [False, True])
def test_what_has_seen_nothing_does_not_round(learnable):
    fake = FakeQuantize(learnable=learnable)
    for use in (fake.calculate_qparams, lambda: (fake.disable_observer(), fake(torch.randn(4)))):
        with pytest.raises(RuntimeError, match="seen no values"):
            use()
    fake.enable_observer()
    fake(torch.randn(4))
    fresh = FakeQuantize(learnable=learnable)
    fresh.load_state_dict(fake.state_dict())
    fresh.disable_observer()
    x = torch.randn(4)
    assert torch.equal(fresh(x), round_to_grid(x, *fake.calculate_qparams(), 0, 255))
