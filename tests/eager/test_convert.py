"""C13 to C15: conversion, single modules, hooks, aliases, ties, custom classes."""

import copy

import pytest
import torch
from eager_models import ConvNet, error, images, run, warmed
from torch import nn

from quanto_hf import eager
from quanto_hf.eager import (
    FloatFunctional,
    MinMaxObserver,
    QConfig,
    QuantWrapper,
    convert,
    default_per_channel_qconfig,
    default_qconfig,
    fuse_modules,
    get_default_qconfig,
    modules,
    prepare,
    prepare_qat,
    swap_module,
)
from quanto_hf.eager.hooks import observe_input, observe_output
from quanto_hf.nn import QLinear
from quanto_hf.nn.activation import fake_quantize_input
from quanto_hf.qtypes import qint8

OBSERVER = "activation_post_process"


def calibrated(model, *batches, qconfig=default_per_channel_qconfig):
    model = copy.deepcopy(model).eval()
    model.qconfig = qconfig
    made = prepare(model, inplace=True)
    run(made, *batches)
    return made


def seen(layer, x):
    """A leaf that was prepared and has seen x."""
    return calibrated(layer, x)


@pytest.fixture
def net():
    return warmed(ConvNet(eager))


# --------------------------------------------------------------------------------------------------- C13: conversion


def test_c13_nothing_of_the_preparation_is_left(net):
    made = convert(calibrated(fuse_modules(net, ConvNet.fusible), images()))
    assert not any(hasattr(m, "qconfig") or hasattr(m, OBSERVER) for m in made.modules())
    hooks = [hook for m in made.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert observe_output not in hooks and observe_input not in hooks
    kinds = {name: type(module) for name, module in made.named_children()}
    assert kinds == {
        "quant": modules.Quantize, "dequant": modules.DeQuantize, "conv": modules.ConvReLU2d, "bn": nn.Identity,
        "relu": nn.Identity, "conv2": modules.Conv2d, "bn2": nn.Identity, "skip": modules.QFunctional,
        "fc": modules.Linear,
    }  # fmt: skip
    kept = convert(calibrated(net, images()), remove_qconfig=False)
    assert kept.qconfig == default_per_channel_qconfig


def test_c13_every_activation_lies_on_its_grid(net):
    made = convert(calibrated(fuse_modules(net, ConvNet.fusible), images()))
    outs = {}
    for name, module in made.named_modules():
        if isinstance(module, modules.OnGrid) and not isinstance(module, modules.QFunctional):
            module.register_forward_hook(lambda module, args, out, name=name: outs.update({name: (module, out)}))
    made(images())
    assert len(outs) == 4
    for module, out in outs.values():
        codes = out / module.scale + module.zero_point
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert codes.min() >= module.quant_min - 1e-3 and codes.max() <= module.quant_max + 1e-3


def test_c13_the_prepared_model_stays_unless_inplace(net):
    prepared = calibrated(net, images())
    x, before = images(), prepared(images()).shape
    assert convert(prepared) is not prepared and prepared(x).shape == before
    assert hasattr(prepared.conv, OBSERVER) and type(prepared.conv) is nn.Conv2d
    assert convert(prepared, inplace=True) is prepared and isinstance(prepared.conv, modules.Conv2d)


def test_c13_references_keep_their_weight_and_give_the_same_numbers(net):
    prepared = calibrated(fuse_modules(net, ConvNet.fusible), images())
    fast, reference = convert(prepared), convert(prepared, is_reference=True)
    x = images()
    torch.testing.assert_close(reference(x), fast(x), atol=1e-5, rtol=0)
    assert torch.equal(reference.fc.weight_float, net.fc.weight)
    assert reference.fc.weight_float.is_floating_point() and "weight_packed" not in dict(
        reference.fc.named_parameters()
    )
    assert float((reference.fc.weight - fast.fc.weight).abs().max()) < 1e-6


def test_c13_an_uncalibrated_model_is_an_error_that_names_the_module_and_changes_nothing(net):
    net.qconfig = default_qconfig
    prepared = prepare(net)
    kinds = [type(module) for module in prepared.modules()]
    with pytest.raises(RuntimeError, match=r"^(quant|conv|skip): .*seen no values"):
        convert(prepared, inplace=True)
    assert [type(module) for module in prepared.modules()] == kinds
    eager.propagate_qconfig_(net)
    with pytest.raises(ValueError, match="call prepare"):
        convert(net)
    # a conversion that fails late takes no hook away
    x = images()
    run(prepared, x)
    prepared.fc.activation_post_process.reset()
    with pytest.raises(RuntimeError, match=r"^fc: "):
        convert(prepared, inplace=True)
    before = float(prepared.conv.activation_post_process.max_val)
    run(prepared, 2 * x)
    assert float(prepared.conv.activation_post_process.max_val) > before
    convert(prepared)
    # one module that no data has reached
    prepared.fc.activation_post_process.reset()
    run(prepared, images())
    prepared.skip.activation_post_process.reset()
    with pytest.raises(RuntimeError, match=r"^skip: "):
        convert(prepared)


def test_c13_a_dynamic_qconfig_needs_no_data_in_a_static_conversion():
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    model.qconfig = eager.default_dynamic_qconfig
    made = convert(prepare(model))
    x = torch.randn(5, 8)
    assert made[0].activations is not None and error(made(x), model(x)) < 0.02


def test_c13_precomputed_scales_do_not_follow_the_weight():
    model = nn.Sequential(nn.Linear(4, 4)).train()
    model.qconfig = eager.default_qat_qconfig
    made = prepare_qat(model)
    with pytest.raises(RuntimeError, match="seen no values"):
        convert(made, use_precomputed_fake_quant=True)
    made(torch.randn(8, 4))
    scale = made[0].weight_fake_quant.scale.clone()
    with torch.no_grad():
        made[0].weight.mul_(100)
    fixed = convert(made, use_precomputed_fake_quant=True)
    assert torch.equal(fixed[0].weight_scale, scale.expand(4, 1))
    assert float(convert(made)[0].weight_scale[0]) > float(scale)


def test_c13_a_bare_leaf_is_replaced_itself():
    layer, x = nn.Linear(8, 4), torch.randn(5, 8)
    made = convert(seen(layer, x))
    assert isinstance(made, modules.Linear) and isinstance(made, QLinear) and error(made(x), layer(x)) < 0.02
    prepared = seen(layer, x)
    assert isinstance(convert(prepared, inplace=True), modules.Linear)


def test_c13_weights_and_grids_are_those_of_torch(ao, net):
    from eager_models import twin
    from torch.ao.nn.quantized import FloatFunctional as TorchFunctional

    theirs = twin(net, ao, TorchFunctional)
    x, mine = images(), fuse_modules(net, ConvNet.fusible)
    theirs = ao.fuse_modules(theirs, ConvNet.fusible)
    theirs.qconfig = ao.default_per_channel_qconfig
    theirs = ao.prepare(theirs)
    run(theirs, x)
    theirs, mine = ao.convert(theirs), convert(calibrated(mine, x))
    for name in ("quant", "conv", "conv2", "skip", "fc"):
        ours, other = getattr(mine, name), getattr(theirs, name)
        assert float(ours.scale) == pytest.approx(float(other.scale), rel=1e-5)
        assert int(ours.zero_point) == int(other.zero_point)
    for name in ("conv", "conv2", "fc"):
        weight = getattr(theirs, name).weight()
        step = weight.q_per_channel_scales().float().view(-1, *[1] * (weight.dim() - 1))
        distance = (getattr(mine, name).weight - weight.dequantize()).abs() / step
        # the largest of a row is at 127.5 steps, a tie, which rounding errors decide
        assert float(distance.max()) < 1.001
        assert float((distance > 0.001).float().mean()) <= 1 / weight[0].numel()
    # requantization rounds in another order: an output may be a step away
    assert float((mine(x) - theirs(x)).abs().max()) < 3.1 * float(mine.fc.scale)


# ----------------------------------------------------------------------------------------------- C14: single modules


def test_c14_without_a_qconfig_or_a_counterpart_a_module_stays():
    mapping = eager.get_default_static_quant_module_mappings()
    layer = nn.Linear(2, 2)
    assert swap_module(layer, mapping, {}) is layer
    layer.qconfig = None
    assert swap_module(layer, mapping, {}) is layer
    pool = nn.MaxPool2d(2)
    pool.qconfig = default_qconfig
    assert swap_module(pool, mapping, {}) is pool


class Observed(nn.Module):
    pass


class FromObserved(nn.Module):
    @classmethod
    def from_observed(cls, mod):
        return cls()


class TakesPrecomputed(nn.Module):
    @classmethod
    def from_float(cls, mod, use_precomputed_fake_quant=False):
        new = cls()
        new.given = use_precomputed_fake_quant
        return new


class TakesNothing(nn.Module):
    @classmethod
    def from_float(cls, mod):
        return cls()


def test_c14_custom_classes_count_first_and_get_what_they_take():
    mod = Observed()
    mod.qconfig = default_qconfig
    assert type(swap_module(mod, {Observed: TakesNothing}, {Observed: FromObserved})) is FromObserved
    assert type(swap_module(mod, {Observed: TakesNothing}, {}, True)) is TakesNothing
    assert swap_module(mod, {Observed: TakesPrecomputed}, {}, True).given is True
    with pytest.raises(TypeError, match="from_float"):
        swap_module(mod, {Observed: nn.Linear}, {})


def test_c14_all_hooks_move_along_in_their_order():
    layer, calls = nn.Linear(4, 4), []

    def note(name):
        return lambda *args, **kwargs: calls.append((name, len(args)))

    layer.register_forward_pre_hook(note("pre"))
    layer.register_forward_pre_hook(note("pre-kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("post"))
    layer.register_forward_hook(note("post-kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("always"), always_call=True)
    layer.register_full_backward_hook(note("backward"))
    layer.register_full_backward_pre_hook(note("backward-pre"))
    x = torch.randn(3, 4)
    made = convert(seen(layer, x))
    calls.clear()
    made(x.requires_grad_()).sum().backward()
    assert calls == [
        ("pre", 2), ("pre-kwargs", 3), ("post", 3), ("post-kwargs", 4), ("always", 3), ("backward-pre", 2),
        ("backward", 3),
    ]  # fmt: skip
    calls.clear()
    with pytest.raises(ValueError, match="4"):
        made(torch.randn(3, 5))
    assert ("always", 3) in calls


def test_c14_the_handle_of_a_hook_still_removes_it():
    layer = nn.Linear(4, 4)
    layer.qconfig = default_qconfig
    prepared = prepare(layer, inplace=True)
    handle = prepared.register_forward_hook(lambda *args: None)
    run(prepared, torch.randn(3, 4))
    made = convert(prepared, inplace=True)
    assert len(made._forward_hooks) == 1
    handle.remove()
    assert not made._forward_hooks


def test_c14_aliases_stay_aliases():
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.alias, model.box = model.a, nn.ModuleList([model.a])
    model.forward = lambda x: model.a(x)
    model.qconfig = default_qconfig
    prepared = prepare(model, inplace=True)
    run(prepared, torch.randn(2, 4))
    made = convert(prepared, inplace=True)
    assert isinstance(made.a, modules.Linear) and made.a is made.alias and made.a is made.box[0]


def test_c14_tied_weights_stay_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    made = convert(calibrated(model, torch.randn(8, 4)))
    assert made[0].weight_packed is made[2].weight_packed and made[0].weight_scale is made[2].weight_scale
    assert made[0].bias is not made[2].bias
    tables = nn.ModuleList([nn.Embedding(10, 4), nn.Embedding(10, 4)])
    tables[1].weight = tables[0].weight
    made = eager.quantize_dynamic(tables, dtype="quint8")
    assert made[0].weight_packed is made[1].weight_packed and made[0].weight_zero is made[1].weight_zero


def test_c14_a_module_on_two_devices_is_an_error():
    layer = nn.Linear(2, 2)
    layer.qconfig = eager.default_dynamic_qconfig
    layer.bias = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(AssertionError, match="cpu, meta"):
        swap_module(layer, eager.get_default_dynamic_quant_module_mappings(), {})


def test_c14_new_modules_move_to_the_device_of_the_old():
    mod = nn.Linear(2, 2, device="meta")
    mod.qconfig = default_qconfig

    class OnCpu(nn.Linear):
        @classmethod
        def from_float(cls, mod):
            return cls(2, 2)

    assert swap_module(mod, {nn.Linear: OnCpu}, {}).weight.device.type == "meta"


# ----------------------------------------------------------------------------------------------- C15: custom modules


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


class ObservedCustom(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x).relu()

    @classmethod
    def from_float(cls, mod):
        new = cls(mod.linear)
        new.qconfig = mod.qconfig
        return prepare(new.eval(), inplace=True)


class QuantizedCustom(ObservedCustom):
    @classmethod
    def from_observed(cls, mod):
        # as in torch's own classes: the same function, called with the module that is being converted
        return cls(convert(mod, inplace=False).linear)


CONFIGS = {
    "float_to_observed_custom_module_class": {Custom: ObservedCustom},
    "observed_to_quantized_custom_module_class": {ObservedCustom: QuantizedCustom},
}


@pytest.mark.parametrize("bare", [False, True], ids=["inside", "bare"])
def test_c15_a_custom_module_goes_there_and_back(bare):
    model = Custom() if bare else nn.Sequential(Custom(), nn.Linear(4, 2))
    x = torch.randn(16, 4)
    model.eval().qconfig = default_qconfig
    prepared = prepare(model, prepare_custom_config_dict=CONFIGS)
    custom = prepared if bare else prepared[0]
    assert type(custom) is ObservedCustom and hasattr(custom, OBSERVER) and hasattr(custom.linear, OBSERVER)
    run(prepared, x)
    made = convert(prepared, convert_custom_config_dict=CONFIGS)
    custom = made if bare else made[0]
    assert type(custom) is QuantizedCustom and isinstance(custom.linear, modules.Linear)
    assert error(made(x), model(x)) < 0.04
    assert not any(hasattr(m, "qconfig") or hasattr(m, OBSERVER) for m in made.modules())


def test_c15_classes_without_the_method_are_refused():
    model = nn.Linear(2, 2)
    model.qconfig = default_qconfig
    with pytest.raises(TypeError, match="from_float"):
        prepare(model, prepare_custom_config_dict={"float_to_observed_custom_module_class": {Custom: nn.ReLU}})
    with pytest.raises(TypeError, match="from_observed"):
        convert(model, convert_custom_config_dict={"observed_to_quantized_custom_module_class": {Custom: nn.ReLU}})


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("both", [False, True], ids=["one-way", "two-ways"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_c15_an_lstm_is_quantized_inside(batch_first, both, bias):
    layer = nn.LSTM(6, 8, 2, bidirectional=both, batch_first=batch_first, bias=bias)
    x = torch.randn(5, 3, 6)
    state = (torch.randn(4 if both else 2, 5 if batch_first else 3, 8) * 0.1,) * 2
    prepared = seen(layer, x)
    out, (h, c) = layer(x, state)
    prepared_out, (prepared_h, prepared_c) = prepared(x, state)
    for mine, theirs in ((prepared_out, out), (prepared_h, h), (prepared_c, c)):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    made = convert(prepared)
    assert isinstance(made, eager.QuantizedLSTM) and error(made(x)[0], layer(x)[0]) < 0.06
    assert sum(isinstance(module, modules.Linear) for module in made.modules()) == (8 if both else 4)


def test_c15_an_lstm_is_no_worse_than_torchs(ao):
    layer, x = nn.LSTM(16, 32, 1), torch.randn(8, 4, 16)

    def model(mode):
        return mode.QuantWrapper(Only(copy.deepcopy(layer))).eval()

    class Only(nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x)[0]

    errors = []
    for mode in (eager, ao):
        one = model(mode)
        one.qconfig = mode.get_default_qconfig("x86")
        prepared = mode.prepare(one)
        run(prepared, x)
        errors.append(error(mode.convert(prepared)(x), layer(x)[0]))
    assert errors[0] <= errors[1] * 1.1


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 6, "vdim": 5},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
    ],
    ids=str,
)
def test_c15_attention_is_quantized_inside(args):
    layer = nn.MultiheadAttention(8, 2, **args).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    q, k, v = torch.randn(4, 3, 8), torch.randn(4, 3, args.get("kdim", 8)), torch.randn(4, 3, args.get("vdim", 8))
    batch = 4 if layer.batch_first else 3
    masks = {
        "attn_mask": torch.ones(q.numel() // 8 // batch, k.numel() // k.shape[-1] // batch).triu(1).bool(),
        "key_padding_mask": torch.arange(k.numel() // k.shape[-1] // batch).ge(2).expand(batch, -1),
    }
    prepared = seen_by_keywords(layer, (q, k, v))
    for keywords in ({}, masks, {"average_attn_weights": False}, {"need_weights": False}):
        expected, mine = layer(q, k, v, **keywords), prepared(q, k, v, **keywords)
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
    made = convert(prepared)
    assert isinstance(made, eager.QuantizedMultiheadAttention)
    assert error(made(q, k, v)[0], layer(q, k, v)[0]) < 0.1


def seen_by_keywords(layer, inputs):
    layer = copy.deepcopy(layer)
    layer.qconfig = get_default_qconfig("onednn")
    prepared = prepare(layer)
    with torch.no_grad():
        prepared(*inputs)
    return prepared


def test_c15_attention_inside_of_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    made = convert(calibrated(layer, x, qconfig=get_default_qconfig("onednn")))
    assert isinstance(made.self_attn, eager.QuantizedMultiheadAttention)
    assert error(made(x), layer(x)) < 0.05


# ------------------------------------------------------------------------------------------------- each module type

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding="same", padding_mode="reflect"), (2, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 1), stride=2, groups=2, bias=False), (2, 6, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, dilation=2), (1, 6, 4, 5, 6)),
    "elu": (nn.ELU, (4, 6)),
    "hardswish": (nn.Hardswish, (4, 6)),
    "leaky-relu": (lambda: nn.LeakyReLU(0.2), (4, 6)),
    "relu6": (nn.ReLU6, (4, 6)),
    "prelu": (lambda: nn.PReLU(6), (4, 6)),
    "layer-norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 3)),
    "batch-norm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
    "batch-norm3d": (lambda: nn.BatchNorm3d(6), (4, 6, 3, 3, 3)),
    "instance-norm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 7)),
    "instance-norm2d": (lambda: nn.InstanceNorm2d(6), (4, 6, 5, 5)),
    "instance-norm3d": (lambda: nn.InstanceNorm3d(6), (4, 6, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@pytest.mark.parametrize("backend", ["x86", "onednn", "qnnpack"])
def test_each_module_is_close_to_its_float_one(name, backend):
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape) * 2
    made = convert(calibrated(layer, x, qconfig=get_default_qconfig(backend)))
    assert type(made).__module__.startswith("quanto_hf.eager.modules")
    assert made(x).shape == layer(x).shape and error(made(x), layer(x)) < (0.03 if backend == "x86" else 0.015)
    assert torch.equal(made(x), convert(calibrated(layer, x, qconfig=get_default_qconfig(backend)))(x))


def test_products_with_the_lowest_code_are_right():
    # what a scale of absmax / 127.5 gives: the other writers of int8 weights stop at -127
    layer, x = nn.Linear(64, 8), torch.randn(5, 64)
    made = eager.quantize_dynamic(layer)
    made.weight_packed.data[:, ::3] = -128
    rounded = fake_quantize_input(x, qint8)
    torch.testing.assert_close(made(x), nn.functional.linear(rounded, made.dequantized(), layer.bias))


@every_layer
def test_each_reference_gives_the_numbers_of_the_fast_one(name):
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    prepared = calibrated(layer, x, qconfig=get_default_qconfig("onednn"))
    torch.testing.assert_close(convert(prepared, is_reference=True)(x), convert(prepared)(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheme", ["per_tensor_affine", "per_channel_affine"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_weights_may_have_a_zero_point(name, scheme):
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.rand(shape)
    with torch.no_grad():
        layer.weight.add_(1)
    observer = eager.PerChannelMinMaxObserver if "channel" in scheme else MinMaxObserver
    qconfig = QConfig(MinMaxObserver, observer.with_args(dtype="qint8", qscheme=scheme))
    made = convert(calibrated(layer, x, qconfig=qconfig))
    assert made.weight_zero.abs().sum() > 0 and error(made(x), layer(x)) < 0.02
    assert (made.weight - layer.weight).abs().max().item() <= made.weight_scale.max().item() * 0.51


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_float16_weights(name):
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(shape)
    made = convert(calibrated(layer, x, qconfig=eager.float16_static_qconfig))
    assert made.weight_half.dtype == torch.float16 and error(made(x), layer(x)) < 1e-3
    assert torch.equal(made(x), made(x).half().float())


def test_weights_alone_and_activations_alone():
    layer, x = nn.Linear(6, 5), torch.randn(8, 6)
    weights = convert(calibrated(layer, x, qconfig=QConfig(None, eager.default_weight_observer)))
    assert weights.output_dtype is None and error(weights(x), layer(x)) < 0.02
    for key in ("scale", "zero_point"):
        assert key not in weights.state_dict()
    with pytest.raises(ValueError, match="weights are not stored as"):
        convert(calibrated(layer, x, qconfig=QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype="int16"))))


def test_dropout_is_nothing_once_it_is_converted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    made = convert(calibrated(model, torch.randn(3, 4))).train()
    x = torch.randn(3, 4)
    assert torch.equal(made(x), made[0](x))


def test_functions_of_a_functional_are_on_the_grid_but_for_scalars():
    f = FloatFunctional()
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    operations = {
        "add": lambda f: f.add(a, b), "mul": lambda f: f.mul(a, b), "add_relu": lambda f: f.add_relu(a, b),
        "cat": lambda f: f.cat([a, b], 1), "matmul": lambda f: f.matmul(a, b),
    }  # fmt: skip
    for operation in operations.values():
        prepared = calibrated(f)
        exact = operation(prepared)
        made = convert(prepared)
        codes = operation(made) / made.scale
        assert torch.allclose(codes, codes.round(), atol=1e-4) and error(operation(made), exact) < 0.02
    assert torch.equal(made.add_scalar(a, 2.0), a + 2) and torch.equal(made.mul_scalar(a, 2.0), a * 2)
    with pytest.raises(RuntimeError, match="call its add"):
        f(a)


def test_a_wrapped_model_converts_to_what_its_parts_do():
    layer, x = nn.Linear(6, 5), torch.randn(8, 6)
    model = QuantWrapper(layer)
    made = convert(calibrated(model, x))
    assert torch.equal(made(x), made.dequant(made.module(made.quant(x))))
    assert not torch.equal(made.quant(x), x) and made.dequant(x) is x


def test_a_quantized_model_becomes_float_again():
    import quanto_hf

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    fused = fuse_modules(model, ["0", "1"])
    made = quanto_hf.dequantize(convert(calibrated(fused, torch.randn(4, 6))))
    x = torch.randn(3, 6)
    assert type(made[0]) is nn.Sequential and error(made(x), model(x)) < 0.02


def test_shapes_that_hurt():
    for name in ("linear", "conv2d", "layer-norm", "hardswish"):
        make, shape = LAYERS[name]
        layer = make().eval()
        made = convert(calibrated(layer, torch.randn(shape)))
        for count in (0, 1, 33):
            x = torch.randn(count, *shape[1:]) * 1e4
            assert made(x).shape == layer(x).shape and torch.isfinite(made(x)).all()
        if name != "layer-norm":
            # what is beyond the range is at its end
            assert made(torch.full(shape, 1e30)).abs().max() <= 256 * made.scale
    tiny = nn.Linear(1, 1)
    assert convert(calibrated(tiny, torch.randn(4, 1)))(torch.randn(2, 1)).shape == (2, 1)


def test_weights_of_zero_and_constant_activations():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 0.5)
    made = convert(calibrated(layer, torch.randn(4, 4)))
    torch.testing.assert_close(made(torch.randn(2, 4)), torch.full((2, 4), 0.5))


def test_the_report_knows_the_modules():
    import quanto_hf

    rows = quanto_hf.report(convert(calibrated(nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)))).rows
    assert "int8" in str([row.stored for row in rows])


def test_weights_are_observed_where_they_are():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    assert eager.quantize_dynamic(model)[0].weight_packed.device.type == "meta"


def test_a_converted_functional_that_met_no_data_takes_scalars_and_tensors():
    functional = FloatFunctional()
    functional.qconfig = QConfig(None, default_qconfig.weight)
    made = modules.QFunctional.from_float(functional)
    x = torch.randn(3)
    assert torch.equal(made.add(x, x), x + x) and torch.equal(made.add_scalar(x, 2.0), x + 2)
    assert torch.equal(made.add(x, x), x + x)


def test_an_image_without_a_batch_is_rounded_as_one_item():
    conv = nn.Conv2d(3, 4, 3)
    affine = MinMaxObserver.with_args(dtype="qint8", qscheme="per_tensor_affine")
    conv.qconfig = QConfig(eager.default_dynamic_qconfig.activation, affine)
    made = modules.Conv2d.from_float(conv)
    assert made.is_dynamic and made.weight_zero is not None
    image = torch.randn(3, 8, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    torch.testing.assert_close(made(image), made(image[None])[0])
