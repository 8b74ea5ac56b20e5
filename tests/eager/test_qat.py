"""C11: training with quantization."""

import copy

import pytest
import torch
from eager_models import ConvNet, error, images, run
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from quanto_hf import eager
from quanto_hf.eager import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    QConfig,
    convert,
    default_dynamic_qat_qconfig,
    default_embedding_qat_qconfig,
    default_embedding_qat_qconfig_4bit,
    default_qat_qconfig,
    disable_fake_quant,
    disable_observer,
    fuse_modules_qat,
    get_default_qat_module_mappings,
    get_default_qat_qconfig,
    modules,
    prepare_qat,
    qat,
)
from quanto_hf.eager.qat import freeze_bn_stats, update_bn_stats


def trainable(fuse=True, qconfig=None):
    net = ConvNet(eager).train()
    net = fuse_modules_qat(net, ConvNet.fusible) if fuse else net
    net.qconfig = qconfig or get_default_qat_qconfig()
    return net


def step(model, x, optimizer=None):
    loss = model(x).square().mean()
    model.zero_grad()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.item()


def test_c11_the_model_must_be_in_training_mode():
    net = trainable().eval()
    for kind in (AssertionError, ValueError):
        with pytest.raises(kind, match="prepare_qat only works on models in training mode"):
            prepare_qat(net)


def test_c11_modules_are_those_for_training_and_observed():
    net = trainable()
    made = prepare_qat(net)
    assert [type(made.conv), type(made.conv2), type(made.fc)] == [qat.ConvBnReLU2d, qat.ConvBn2d, qat.Linear]
    for module in (made.quant, made.conv, made.conv2, made.skip, made.fc):
        assert isinstance(module.activation_post_process, FakeQuantize)
    assert type(net.fc) is nn.Linear and not hasattr(net.fc, "activation_post_process")
    mapping = get_default_qat_module_mappings()
    del mapping[nn.Linear]
    assert type(prepare_qat(net, mapping).fc) is nn.Linear


def test_c11_parameters_are_those_of_the_model():
    net = trainable()
    parameters = {id(parameter) for parameter in net.parameters()}
    made = prepare_qat(net, inplace=True)
    assert made is net and {id(parameter) for parameter in made.parameters()} == parameters


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "single"])
@pytest.mark.parametrize("version", [0, 1])
def test_c11_gradients_reach_all_weights(fuse, version):
    net = prepare_qat(trainable(fuse, get_default_qat_qconfig(version=version)))
    x = images().requires_grad_()
    step(net, x)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert net.conv.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "single"])
def test_c11_the_converted_model_gives_the_numbers_of_the_trained_one(fuse):
    net = prepare_qat(trainable(fuse))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(5):
        step(net, images(), optimizer)
    net.eval()
    run(net, images())
    net.apply(disable_observer)
    x = images()
    made, trained = convert(net), net(x)
    difference = (made(x) - trained).abs().max().item()
    assert difference <= 1.01 * made.fc.scale.item()
    assert error(made(x), trained) < 0.02


def test_c11_a_fused_module_is_the_float_one_but_for_the_rounding():
    net = trainable()
    made = prepare_qat(net)
    made.apply(disable_fake_quant)
    x = images()
    torch.testing.assert_close(made(x), net(x), atol=1e-5, rtol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(made.conv.bn, name), getattr(net.conv[1], name))
    made.eval(), net.eval()
    torch.testing.assert_close(made(x), net(x), atol=1e-5, rtol=1e-4)


def test_c11_a_channel_that_the_batch_norm_turns_off_stays_finite():
    net = trainable()
    with torch.no_grad():
        net.conv[1].weight[3] = 0
    made = prepare_qat(net)
    step(made, images())
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters())


def test_c11_statistics_can_be_frozen():
    made = prepare_qat(trainable())
    made(images())
    made.apply(freeze_bn_stats)
    before = made.conv.bn.running_mean.clone()
    made.train()(images())
    assert torch.equal(made.conv.bn.running_mean, before) and not made.conv.bn.training
    made.apply(update_bn_stats)
    made(images())
    assert not torch.equal(made.conv.bn.running_mean, before)
    assert not made.eval().conv.bn.training


def test_c11_dynamic_training_needs_an_observer_without_memory():
    mapping = {nn.Linear: qat.DynamicLinear}
    model = nn.Sequential(nn.Linear(8, 4)).train()
    model.qconfig = default_qat_qconfig
    with pytest.raises(ValueError, match="without memory"):
        prepare_qat(model, mapping)
    model.qconfig = default_dynamic_qat_qconfig
    made, x = prepare_qat(model, mapping), torch.randn(5, 8)
    step(made, x)
    converted = convert(made.eval(), eager.get_default_dynamic_quant_module_mappings())
    assert isinstance(converted[0], modules.DynamicLinear) and error(converted(x), made(x)) < 0.02


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("qconfig", [default_embedding_qat_qconfig, default_embedding_qat_qconfig_4bit], ids=["8", "4"])
def test_c11_embeddings(kind, qconfig):
    model = nn.Sequential(kind(20, 8)).train()
    model.qconfig = qconfig
    made = prepare_qat(model, eager.get_embedding_qat_module_mappings())
    index = torch.randint(20, (4, 3))
    step(made, index)
    assert made[0].weight.grad.abs().sum() > 0
    made.eval()
    converted = convert(made, eager.get_embedding_static_quant_module_mappings())
    torch.testing.assert_close(converted(index), made(index), atol=1e-5, rtol=1e-5)
    model.qconfig = default_qat_qconfig
    with pytest.raises(AssertionError, match="embedding_qat"):
        prepare_qat(model, eager.get_embedding_qat_module_mappings())


def test_c11_torch_trains_the_same(ao):
    from eager_models import twin
    from torch.ao.nn.quantized import FloatFunctional as TorchFunctional

    net, batches = ConvNet(eager).train(), [images() for _ in range(5)]
    errors, losses = [], []
    for mode, one in ((eager, net), (ao, twin(net, ao, TorchFunctional))):
        one = mode.fuse_modules_qat(one, ConvNet.fusible)
        one.qconfig = mode.get_default_qat_qconfig("x86")
        made = mode.prepare_qat(one)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
        losses.append([step(made, x, optimizer) for x in batches])
        made.eval()
        made.apply(mode.disable_observer)
        errors.append(error(mode.convert(made)(batches[0]), made(batches[0])))
    # one step of a grid is a part in 127: roundings that fall differently move the loss by less than a percent
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert errors[0] <= 1.1 * errors[1]


def test_c11_a_parametrized_weight_is_trained_as_one():
    model = nn.Sequential(weight_norm(nn.Linear(4, 4))).train()
    model.qconfig = default_qat_qconfig
    made = prepare_qat(model)
    step(made, torch.randn(3, 4))
    assert type(made[0]) is qat.Linear and torch.equal(made[0].weight, model[0].weight)
    assert isinstance(convert(made.eval())[0], modules.Linear)


def test_c11_scales_are_learned_on_request():
    activation = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, learnable=True)
    weight = eager.default_weight_fake_quant.with_args(learnable=True)
    model = nn.Sequential(nn.Linear(4, 4)).train()
    model.qconfig = QConfig(activation, weight)
    made, x = prepare_qat(model), torch.randn(16, 4)
    made(x)
    names = {name for name, _ in made.named_parameters() if "scale" in name}
    assert names == {"0.weight_fake_quant.scale", "0.activation_post_process.scale"}
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    first = [parameter.detach().clone() for parameter in made.parameters()]
    for _ in range(3):
        step(made, x, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(first, made.parameters(), strict=True))
    converted = convert(made.eval())
    assert torch.equal(converted[0].scale, made[0].activation_post_process.scale.detach())
    torch.testing.assert_close(converted(x), made(x), atol=1e-6, rtol=0)


def test_c11_training_goes_on_from_a_state_dict():
    net = prepare_qat(trainable())
    for _ in range(2):
        net(images())
    fresh = prepare_qat(trainable())
    fresh.load_state_dict(net.state_dict())
    x = images()
    assert torch.equal(net.eval()(x), fresh.eval()(x))
    assert torch.equal(convert(net)(x), convert(fresh)(x))


def test_c11_hooks_stay():
    net, calls = trainable(), []
    net.fc.register_forward_hook(lambda *args: calls.append("post"))
    net.conv.register_forward_pre_hook(lambda *args: calls.append("pre"))
    made = prepare_qat(net)
    made(images())
    assert calls == ["pre", "post"]
    convert(made.eval())(images())
    assert calls == ["pre", "post"] * 2


def test_c11_float_modules_come_back():
    net = trainable()
    made = prepare_qat(net)
    x = images()
    for name in ("conv", "conv2", "fc"):
        mine, theirs = getattr(made, name).eval().to_float(), getattr(net, name).eval()
        shape = x if name == "conv" else torch.randn(2, 8, 6, 6) if name == "conv2" else torch.randn(2, 288)
        torch.testing.assert_close(mine.eval()(shape), theirs(shape))


def test_c11_the_copy_of_a_prepared_model_trains_on_its_own():
    net = prepare_qat(trainable())
    net(images())
    other = copy.deepcopy(net)
    before = net.conv.weight.clone()
    step(other, images(), torch.optim.SGD(other.parameters(), lr=0.1))
    assert torch.equal(net.conv.weight, before) and not torch.equal(other.conv.weight, before)


LAYERS = {
    "linear-relu": (lambda: [nn.Linear(6, 6), nn.ReLU()], (4, 6), modules.LinearReLU),
    "linear-bn": (lambda: [nn.Linear(6, 6), nn.BatchNorm1d(6)], (4, 6), modules.Linear),
    "conv1d-bn-relu": (lambda: [nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6), nn.ReLU()], (4, 6, 7), modules.ConvReLU1d),
    "conv1d-relu": (lambda: [nn.Conv1d(6, 6, 3), nn.ReLU()], (4, 6, 7), modules.ConvReLU1d),
    "conv3d-bn": (lambda: [nn.Conv3d(6, 6, 2, bias=False), nn.BatchNorm3d(6)], (4, 6, 3, 3, 3), modules.Conv3d),
    "conv3d-relu": (lambda: [nn.Conv3d(6, 6, 2), nn.ReLU()], (4, 6, 3, 3, 3), modules.ConvReLU3d),
}


@pytest.mark.parametrize("name", LAYERS)
def test_c11_each_fused_row(name):
    make, shape, kind = LAYERS[name]
    modules = make()
    model = fuse_modules_qat(nn.Sequential(*modules).train(), [str(i) for i in range(len(modules))])
    model.qconfig = get_default_qat_qconfig("onednn")
    made, x = prepare_qat(model), torch.randn(shape)
    step(made, x, torch.optim.SGD(made.parameters(), lr=0.01))
    made.eval()
    run(made, x)
    made.apply(disable_observer)
    converted = convert(made)
    assert type(converted[0]) is kind
    assert (converted(x) - made(x)).abs().max().item() <= 1.01 * converted[0].scale.item()


def test_c11_functions_of_a_known_range_stay_on_their_grid():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Tanh()).train()
    model.qconfig = get_default_qat_qconfig()
    made, x = prepare_qat(model), torch.randn(8, 4)
    step(made, x)
    converted = convert(made.eval())
    assert [type(converted[1]), type(converted[3])] == [modules.Sigmoid, modules.Tanh]
    assert torch.equal(converted[:2](x) * 256, (converted[:2](x) * 256).round())
    assert converted[3].scale.item() == 2 / 256 and converted[3].zero_point.item() == 128
