"""C4 to C7: what is observed, how, and in which order."""

import pytest
import torch
from eager_models import ConvNet, images, run
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from quanto_hf import eager
from quanto_hf.eager import (
    FloatFunctional,
    QConfig,
    QuantStub,
    default_dynamic_qat_qconfig,
    default_qat_qconfig,
    default_qconfig,
    fuse_modules,
    prepare,
    prepare_qat,
)
from quanto_hf.eager.fake_quantize import FixedQParamsFakeQuantize
from quanto_hf.eager.fused import LinearReLU
from quanto_hf.eager.hooks import observe_output

OBSERVER = "activation_post_process"


def observed(model):
    """Names of the modules that are observed."""
    return sorted(
        name
        for name, module in model.named_modules()
        if not name.endswith(OBSERVER)
        and hasattr(module, OBSERVER)
        and not isinstance(getattr(module, OBSERVER), nn.Identity)
    )


def ready(model, qconfig=default_qconfig):
    model.eval().qconfig = qconfig
    return model


def test_c4_the_model_stays_as_it_is_unless_inplace():
    model = ready(ConvNet(eager))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = prepare(model)
    run(made, images())
    assert made is not model and list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not observed(model)
    # the keys of the model are in those of the prepared one
    assert set(before) < set(made.state_dict())
    assert prepare(model, inplace=True) is model and observed(model)


def test_c4_the_same_modules_are_observed_as_in_torch(ao):
    from torch.ao.nn.quantized import FloatFunctional as TorchFunctional

    for fuse in (False, True):
        mine, theirs = ready(ConvNet(eager)), ready(ConvNet(ao, TorchFunctional), ao.default_qconfig)
        if fuse:
            mine, theirs = fuse_modules(mine, ConvNet.fusible), ao.fuse_modules(theirs, ConvNet.fusible)
        assert observed(prepare(mine)) == observed(ao.prepare(theirs))


def test_c4_allow_list_and_blocks():
    model = ready(ConvNet(eager))
    assert observed(prepare(model, allow_list={nn.Conv2d})) == ["conv", "conv2", "skip"]
    nested = ready(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ModuleList([nn.Linear(2, 2)])))
    made = prepare(nested, observer_non_leaf_module_list=[nn.ModuleList])
    assert observed(made) == ["0.0", "1"]


def test_c4_a_model_without_a_qconfig_warns():
    with pytest.warns(UserWarning, match="None of the submodule got qconfig applied"):
        prepare(nn.Linear(2, 2))


KINDS = {
    "linear": (lambda: nn.Linear(4, 4), True),
    "conv": (lambda: nn.Conv1d(4, 4, 1), True),
    "norm": (lambda: nn.LayerNorm(4), True),
    "hardswish": (nn.Hardswish, True),
    "quant-stub": (QuantStub, True),
    "dequant-stub": (eager.DeQuantStub, False),
    "dropout": (nn.Dropout, False),
    "relu": (nn.ReLU, False),
    "sigmoid": (nn.Sigmoid, False),
    "sequential": (nn.Sequential, False),
    "fused": (lambda: LinearReLU(nn.Linear(4, 4), nn.ReLU()), True),
    "functional": (FloatFunctional, True),
    "weight-norm": (lambda: weight_norm(nn.Linear(4, 4)), True),
    "batch-norm-1d": (lambda: nn.BatchNorm1d(4), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_c5_a_module_is_observed_by_its_type(kind):
    make, expected = KINDS[kind]
    for model in (ready(nn.ModuleDict({"one": make()})), ready(make())):
        name = "one" if isinstance(model, nn.ModuleDict) else ""
        assert (name in observed(prepare(model))) is expected


def test_c5_functions_with_a_known_range_are_rounded_in_training_only():
    for kind, zero in ((nn.Sigmoid, 0), (nn.Hardsigmoid, 0), (nn.Softmax, 0), (nn.Tanh, 128)):
        model = nn.ModuleDict({"f": kind(), "g": nn.Linear(2, 2)}).train()
        model.qconfig = default_qat_qconfig
        fake = prepare_qat(model)["f"].activation_post_process
        assert isinstance(fake, FixedQParamsFakeQuantize) and int(fake.zero_point) == zero
        assert observed(prepare(ready(nn.ModuleDict({"f": kind()})))) == []


def test_c5_a_functional_without_its_observer_is_an_error():
    class Broken(FloatFunctional):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(AssertionError, match="activation_post_process"):
        prepare(ready(nn.ModuleDict({"f": Broken()})))


def test_c5_prepare_twice_adds_one_hook():
    model = prepare(ready(ConvNet(eager)))
    seen = model.conv.activation_post_process
    again = prepare(model, inplace=True)
    assert again.conv.activation_post_process is seen and len(again.conv._forward_hooks) == 1


def test_c6_the_observer_comes_before_the_hooks_of_the_user():
    model, order = ready(nn.Sequential(nn.Linear(2, 2))), []
    model[0].register_forward_hook(lambda module, args, out: order.append(("user", out.clone())))
    made = prepare(model)
    assert next(iter(made[0]._forward_hooks.values())) is observe_output
    out = made(torch.randn(3, 2))
    assert [name for name, _ in order] == ["user"] and torch.equal(order[0][1], out)


def test_c6_an_observer_without_memory_sees_the_input():
    model = nn.Sequential(nn.Linear(2, 2)).train()
    model.qconfig = default_dynamic_qat_qconfig
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    made = prepare_qat(model, {nn.Linear: eager.get_default_qat_module_mappings()[nn.Linear]})
    assert len(made[0]._forward_pre_hooks) == 2 and not made[0]._forward_hooks
    x = torch.randn(3, 2)
    made(x)
    # the hook of the user comes after, and sees the rounded input
    assert torch.equal(seen[0], made[0].activation_post_process(x)) and not torch.equal(seen[0], x)


def test_c6_the_other_inputs_of_a_module_stay():
    class Two(nn.Linear):
        def forward(self, x, y, z=0):
            return super().forward(x) + y + z

    model = Two(2, 2).train()
    model.qconfig = default_dynamic_qat_qconfig
    made = prepare(model, allow_list={Two})
    assert made(torch.ones(1, 2), torch.ones(1, 2), z=1).shape == (1, 2)


def test_c6_of_several_outputs_the_first_is_observed():
    model = ready(nn.GRU(2, 3))
    made = prepare(model)
    out, state = made(torch.randn(4, 1, 2))
    assert float(made.activation_post_process.max_val) == pytest.approx(out.max().item()) and state.shape == (1, 1, 3)


def test_c7_a_model_on_two_devices_is_an_error_that_names_them():
    model = ready(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    with pytest.raises(AssertionError, match="cpu, meta"):
        prepare(model)
    assert not observed(model)
    assert observed(prepare(model, allow_meta=True)) == ["0", "1"]

    class Elsewhere(nn.Linear):
        """A layer with a tensor that says it is on a GPU."""

        def parameters(self, recurse=True):
            yield self.weight
            yield type("Fake", (), {"device": torch.device("cuda", 1)})()

    with pytest.raises(AssertionError, match=r"cpu, cuda:1"):
        prepare(ready(Elsewhere(2, 2)), allow_meta=True)


def test_c7_observers_are_made_where_the_model_is():
    made = prepare(ready(nn.Sequential(nn.Linear(2, 2, device="meta"))))
    assert {buffer.device.type for buffer in made.buffers()} == {"meta"}


def test_c7_observers_may_be_any_module():
    class Own(nn.Module):
        def forward(self, x):
            return x

    assert type(prepare(ready(nn.Linear(2, 2), QConfig(Own, None))).activation_post_process) is Own
