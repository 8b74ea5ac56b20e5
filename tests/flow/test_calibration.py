"""Calibration: static scales of inputs from data that passes, or nothing is changed."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from quanto_hf import Calibration, calibrate, freeze, quantization_map, quantize, requantize
from quanto_hf.nn.observers import PerChannelMinMaxObserver

KINDS = {"int8": 127.0, "float8": 448.0}
every_kind = pytest.mark.parametrize("activations", KINDS)


def net(activations: str | None = "int8", weights: str = "int8", **kwargs) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    return quantize(model, weights, activations=activations, **kwargs)


def data(count: int = 4) -> list[torch.Tensor]:
    """Batches that differ in their range."""
    draw = torch.Generator().manual_seed(6)
    return [(i + 1.0) * torch.randn(8, 16, generator=draw) for i in range(count)]


def scales(model: nn.Module) -> list[float]:
    return [layer.input_scale.item() for layer in (model[0], model[2])]


def inputs(model: nn.Module, batches: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each of the two layers sees, of a model that rounds no input."""
    weight_only = freeze(quantize(nn.Sequential(*[copy.deepcopy(m) for m in float_net()]), "int8"))
    with torch.no_grad():
        return [batches, [weight_only[1](weight_only[0](x)) for x in batches]]


def float_net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


# ------------------------------------------------------------------------------------------------------ which scale


@every_kind
def test_the_scale_of_minmax_is_the_largest_value_over_the_largest_number(activations):
    model = calibrate(freeze(net(activations)), data(), "minmax", progress=False)
    for scale, seen in zip(scales(model), inputs(model, data()), strict=True):
        assert scale == pytest.approx(max(float(x.abs().max()) for x in seen) / KINDS[activations], rel=1e-5)


@every_kind
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9])
def test_the_moving_average_keeps_the_share_of_the_old_value_that_momentum_says(activations, momentum):
    model = calibrate(freeze(net(activations)), data(), momentum=momentum, progress=False)
    for scale, seen in zip(scales(model), inputs(model, data()), strict=True):
        low, high = float(seen[0].min()), float(seen[0].max())
        for x in seen[1:]:
            low = momentum * low + (1 - momentum) * float(x.min())
            high = momentum * high + (1 - momentum) * float(x.max())
        assert scale == pytest.approx(max(-low, high) / KINDS[activations], rel=1e-4)


def test_momentum_matters():
    fast, slow = (calibrate(net(), data(), momentum=m, progress=False) for m in (0.1, 0.9))
    assert all(a > 1.5 * b for a, b in zip(scales(fast), scales(slow), strict=True))


def test_an_outlier_does_not_decide_about_the_scale_of_a_percentile():
    batch = torch.randn(1000, 16)
    batch[0, 0] = 1e3
    model = calibrate(net(), [batch], "percentile", percentile=99.9, progress=False)
    assert scales(model)[0] < 0.01 * 1e3 / 127


def test_the_scale_of_least_squared_error_rounds_better_than_that_of_the_largest_value():
    batch = torch.distributions.Laplace(0.0, 1.0).sample((4000, 16))
    errors = {}
    for observer in ("mse", "minmax"):
        model = calibrate(net(), [batch], observer, progress=False)
        rounded = model[0].round_input(batch, model[0].input_scale)
        errors[observer] = float((rounded - batch).square().mean())
    assert errors["mse"] < 0.9 * errors["minmax"]


def test_layers_see_inputs_that_no_layer_before_them_has_rounded():
    rough = calibrate(net("float8", "int2"), data(1), "minmax", progress=False)
    fine = calibrate(net("int8", "int2"), data(1), "minmax", progress=False)
    assert scales(rough)[1] * 448 == pytest.approx(scales(fine)[1] * 127, rel=1e-5)


def test_calibrating_again_starts_anew():
    model = calibrate(net(), [100 * x for x in data()], "minmax", progress=False)
    calibrate(model, data(), "minmax", progress=False)
    assert scales(model) == scales(calibrate(net(), data(), "minmax", progress=False))


@every_kind
def test_prepared_and_frozen_models_find_the_same_scales_with_gradients_or_without(activations):
    found = []
    for model, grad in ((net(activations), True), (net(activations), False), (freeze(net(activations)), True)):
        with Calibration(model), torch.set_grad_enabled(grad):
            for x in data():
                model(x)
        found.append(scales(model))
    assert found[0] == found[1] == found[2]


def test_a_step_of_training_inside_of_the_block_counts_its_data_once():
    one, two = net(), net()
    with Calibration(one):
        for x in data():
            one(x)
    with Calibration(two):
        for x in data():
            two(x).sum().backward()
    assert scales(one) == scales(two)


def test_keyword_calls_count():
    model = net()
    with Calibration(model):
        model[2](input=model[1](model[0](input=data()[0])))
    assert scales(model) == scales(calibrate(net(), data(1), progress=False))


def test_batches_are_dicts_tuples_or_one_argument():
    found = {
        scales(calibrate(net(), [batch], progress=False))[0]
        for batch in ({"input": data()[0]}, (data()[0],), [data()[0]], data()[0])
    }
    assert len(found) == 1


# ------------------------------------------------------------------------------------------------------ what then


@every_kind
def test_a_calibrated_model_is_near_the_float_one(activations):
    model, x = freeze(net(activations)), data()[0]
    calibrate(model, [x], "minmax", progress=False)
    assert repr(model[0]).endswith("activations=int8 static)" if activations == "int8" else "e4m3fn static)")
    wanted = float_net()(x)
    assert (model(x) - wanted).norm() / wanted.norm() < 0.05


@every_kind
def test_an_uncalibrated_static_model_refuses_to_run_in_every_state_and_says_what_to_do(activations):
    model = net(activations, static_activations=True)
    for _ in range(2):
        assert "not calibrated" in repr(model)
        with pytest.raises(RuntimeError, match=r"was never calibrated. Run some real data .*Calibration"):
            model(data()[0])
        with torch.no_grad(), pytest.raises(RuntimeError, match="was never calibrated"):
            model(data()[0])
        freeze(model)


def test_a_calibrated_model_can_be_trained_also_if_it_was_calibrated_with_gradients():
    model, x = net(), data()[0]
    with Calibration(model):
        model(x)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        wanted = model(x)
    assert torch.equal(freeze(model)(x), wanted)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "share_memory": lambda model: copy.deepcopy(model).share_memory(),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["prepared", "frozen"])
def test_a_calibrated_model_is_a_normal_module(copied, frozen):
    model = calibrate(net(), data(), progress=False)
    model = freeze(model) if frozen else model
    made, x = copied(model), data()[0]
    assert torch.equal(made(x), model(x)) and scales(made) == scales(model)


def test_casts_keep_the_scale():
    model = calibrate(freeze(net()), data(), progress=False)
    kept = scales(model)
    assert scales(model.half()) == kept and model[0].input_scale.dtype == torch.float32
    assert model(data()[0].half()).dtype == torch.float16


def test_a_state_dict_carries_the_scales_into_a_dynamic_model_and_not_the_other_way_round():
    model, x = calibrate(freeze(net()), data(), progress=False), data()[0]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    dynamic = freeze(net())
    dynamic(x)
    state = torch.load(buffer, weights_only=True)
    dynamic.load_state_dict(state, strict=True)
    assert torch.equal(dynamic(x), model(x))
    static = freeze(net(static_activations=True))
    static.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(static(x), model(x))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"0.input_scale", "2.input_scale"'):
        model.load_state_dict(freeze(net()).state_dict(), strict=True)
    with torch.device("meta"):
        empty = float_net()
    assert torch.equal(requantize(empty, state, quantization_map(model))(x), model(x))


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta:UserWarning")
def test_a_scale_that_is_loaded_lies_where_the_layer_lies():
    state = calibrate(freeze(net()), data(), progress=False).state_dict()
    empty = freeze(net()).to("meta")
    empty.load_state_dict(state, strict=True)
    assert empty[0].input_scale.device.type == "meta"


def test_a_scale_that_is_replaced_or_written_counts_at_once():
    model, x = calibrate(freeze(net()), data(), progress=False), data()[0]
    layer, before = model[0], scales(model)[0]
    with torch.no_grad():
        wanted = layer(x)
        layer.input_scale = torch.tensor([10 * before])
        assert not torch.equal(layer(x), wanted)
        layer.input_scale.fill_(before)
        assert torch.equal(layer(x), wanted)
        layer.input_scale.fill_(torch.nan)
        layer._bound = None
        with pytest.raises(RuntimeError, match="never calibrated"):
            layer(x)


# ------------------------------------------------------------------------------------------------------ errors


def unchanged(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    observing = any(name.endswith("input_observer") for name, _ in model.named_modules())
    return not observing and now.keys() == state.keys() and all(torch.equal(now[n], state[n]) for n in state)


@pytest.mark.parametrize("calibrated", [False, True], ids=["dynamic", "calibrated"])
def test_an_error_in_the_block_changes_nothing(calibrated):
    model = net()
    if calibrated:
        calibrate(model, data(), progress=False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(KeyError), Calibration(model):
        model(100 * data()[0])
        raise KeyError("interrupted")
    assert unchanged(model, state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_no_number_names_the_layer_and_changes_nothing(bad):
    model = calibrate(net(), data(), progress=False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    batch = data()[0]
    batch[0, 0] = bad
    with pytest.raises(ValueError, match=r"^0: .*has seen values that are NaN or infinite: look at the data"):
        calibrate(model, [batch], progress=False)
    assert unchanged(model, state)


def test_an_observer_that_fails_or_finds_several_scales_changes_nothing():
    model = net()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    made = []

    def second_fails(kind):
        made.append(kind)
        if len(made) == 2:
            raise KeyError(kind.name)
        return PerChannelMinMaxObserver(dtype="qint8", ch_axis=1)

    with pytest.raises(KeyError), Calibration(model, second_fails):
        pass
    assert unchanged(model, state)
    with pytest.raises(ValueError, match=r"^0: PerChannelMinMaxObserver finds 16 scales, and an input has one"):
        calibrate(model, data(), lambda kind: PerChannelMinMaxObserver(dtype="qint8", ch_axis=1), progress=False)
    assert unchanged(model, state)


def test_layers_that_no_data_reached_are_named_and_refuse_to_run():
    model = net()
    with pytest.warns(UserWarning, match=r"no data reached 1 of 2 layers to calibrate: 2; they refuse"):
        with Calibration(model):
            model[0](data()[0])
            # nothing is no data
            model[2](torch.zeros(0, 32))
    assert model[0](data()[0]).isfinite().all()
    with pytest.raises(RuntimeError, match="never calibrated"):
        model(data()[0])


def test_no_data_at_all_is_an_error_and_modes_come_back():
    model = net()
    model[0].train()
    modes = [m.training for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="there is no batch to calibrate with"):
            calibrate(model, iter(()), progress=False)
    assert [m.training for m in model.modules()] == modes and not model[0].is_static
    calibrate(model, data(), progress=False)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"momentum": 1.0}, r"momentum=1.0 is not in 0 <= momentum < 1"),
        ({"momentum": -0.1}, r"momentum=-0.1 is not in"),
        ({"observer": "guess"}, r"observer='guess' is not known; choose one of .*minmax"),
        ({"observer": "percentile", "percentile": 300.0}, "percentile=300"),
    ],
)
def test_arguments_that_are_not_allowed(kwargs, text):
    with pytest.raises(ValueError, match=text):
        Calibration(net(), **kwargs)


def test_a_model_that_rounds_no_input_has_nothing_to_calibrate():
    with pytest.raises(ValueError, match="nothing to calibrate; quantize it with activations="):
        Calibration(net(activations=None))
    with pytest.raises(ValueError, match=r"Calibration takes the model first: Calibration\(model\)"):
        Calibration(0.9)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), [1.0, 2.0]], ids=str)
def test_a_scale_given_by_hand_is_one_positive_number(scale):
    layer = net()[0]
    with pytest.raises(ValueError, match="the scale of an input is one positive number"):
        layer.make_static(torch.tensor(scale))
    assert not layer.is_static
    layer.make_static(0.5)
    assert layer.input_scale.tolist() == [0.5] and layer.input_scale.dtype == torch.float32


def test_one_graph_under_torch_compile():
    torch._dynamo.reset()
    model, x = calibrate(freeze(net()), data(), progress=False), data()[0]
    with torch.no_grad():
        made = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(made, model(x), rtol=1e-5, atol=1e-5)
