"""Stored tensors as Parameters: counted as weights, never averaged into others, never converted, never of inference."""

import copy
import doctest
import importlib
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

import quanto_hf
from quanto_hf.nn.codes import Codes
from quanto_hf.nn.stored import Count, StoredParameter, stored_parameter

WEIGHTS = ("int8", "int4", "int2", "nf4", "fp4", "float8", "float8_e5m2", "aqlm-1x4")
every_weight = pytest.mark.parametrize("weights", WEIGHTS)
DECAYS = (0.9, 0.98, 0.999, 0.9999)


def network(weights: str, bias: bool = True):
    """A frozen model, and its float count of parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48, bias), nn.ReLU(), nn.Linear(48, 40, bias))
    count = sum(parameter.numel() for parameter in net.parameters())
    return quanto_hf.freeze(quanto_hf.quantize(net, weights=weights)).requires_grad_(False), count


def stored(net):
    return [tensor.clone() for tensor in net.state_dict().values()]


def averages():
    """Name -> how torch averages, in the two ways in which it takes a function."""
    found = {"default": {}, "swa": {"avg_fn": get_swa_avg_fn()}, "swa-multi": {"multi_avg_fn": get_swa_multi_avg_fn()}}
    for decay in DECAYS:
        found[f"ema-{decay}"] = {"avg_fn": get_ema_avg_fn(decay)}
        found[f"ema-multi-{decay}"] = {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    return found


@every_weight
@pytest.mark.parametrize("name", averages())
def test_an_average_of_a_model_that_does_not_change_has_its_codes(weights, name):
    net, _ = network(weights)
    # with and without buffers in turn: half of the weights meet each of the two in every way to average
    use_buffers = (list(averages()).index(name) + WEIGHTS.index(weights)) % 2 == 1
    averaged, before = AveragedModel(net, use_buffers=use_buffers, **averages()[name]), stored(net)
    for _ in range(20):
        averaged.update_parameters(net)
    for made, wanted in zip(stored(averaged.module), before, strict=True):
        if wanted.is_floating_point():
            # what any float model gets by this sum
            assert torch.allclose(made.float(), wanted.float(), rtol=2e-2, atol=0)
        else:
            assert torch.equal(made, wanted)
    assert all(map(torch.equal, stored(net), before))


@every_weight
@pytest.mark.parametrize("decay", DECAYS)
def test_an_average_by_interpolation_is_bit_for_bit_the_model(weights, decay):
    net, _ = network(weights)
    averaged, before = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay)), stored(net)
    for _ in range(20):
        averaged.update_parameters(net)
    assert all(map(torch.equal, stored(averaged.module), before))


@every_weight
def test_a_loop_over_a_state_dict_that_averages_leaves_codes_alone(weights):
    net, _ = network(weights)
    ema, before = copy.deepcopy(net), stored(net)
    for _ in range(20):
        for mine, other in zip(ema.state_dict().values(), net.state_dict().values(), strict=True):
            mine.copy_(mine * 0.99 + other * (1 - 0.99))
    integers = [(a, b) for a, b in zip(stored(ema), before, strict=True) if not b.is_floating_point()]
    assert integers and all(torch.equal(a, b) for a, b in integers)


def test_floats_are_averaged_as_ever():
    net, _ = network("int8")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].bias.add_(1.0)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(net)
    averaged.update_parameters(other)
    torch.testing.assert_close(averaged.module[0].bias, net[0].bias + 0.5)


@every_weight
def test_a_copy_of_a_state_dict_shares_nothing_with_the_model(weights):
    net, _ = network(weights)
    before = stored(net)
    state = copy.deepcopy(net.state_dict())
    for tensor in state.values():
        tensor.zero_()
    assert all(map(torch.equal, stored(net), before))


def test_codes_that_differ_have_no_average():
    net, _ = network("int4")
    torch.manual_seed(1)
    other = quanto_hf.quantize(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)), weights="int4")
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(net)
    with pytest.raises(ValueError, match="codes of packed weights that differ have no average"):
        averaged.update_parameters(quanto_hf.freeze(other))


@every_weight
def test_parameters_count_weights_and_sizes_count_bytes(weights):
    net, count = network(weights)
    parameters = list(net.parameters())
    assert sum(p.numel() for p in parameters) == sum(p.nelement() for p in parameters) == count
    nbytes = sum(p.untyped_storage().nbytes() for p in parameters)
    assert sum(p.numel() * p.element_size() for p in parameters) == sum(p.nbytes for p in parameters) == nbytes


def copies(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    yield copy.deepcopy(net)
    yield pickle.loads(pickle.dumps(net))
    yield torch.load(buffer, weights_only=False)
    yield copy.deepcopy(net).to("meta").to_empty(device="cpu")


@every_weight
def test_copies_hold_stored_parameters_that_count_the_same(weights):
    net, count = network(weights)
    for other in copies(net):
        assert sum(p.numel() for p in other.parameters()) == count
        assert [type(p) for p in other.parameters()] == [type(p) for p in net.parameters()]


@every_weight
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_saved_as_plain_tensors_and_comes_back(weights, assign):
    net, count = network(weights)
    buffer, before = io.BytesIO(), stored(net)
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    other, _ = network(weights)
    other.load_state_dict(state, assign=assign)
    assert all(map(torch.equal, stored(other), before)) and sum(p.numel() for p in other.parameters()) == count


@every_weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loops_that_change_the_dtype_of_parameters_leave_stored_tensors_as_they_are(weights, dtype):
    net, _ = network(weights, bias=False)
    before, x = stored(net), torch.randn(3, 64)
    wanted = net(x)
    for parameter in net.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    assert all(a.dtype == b.dtype for a, b in zip(stored(net), before, strict=True))
    assert all(map(torch.equal, stored(net), before)) and torch.equal(net(x), wanted)


@every_weight
def test_a_model_that_was_quantized_in_inference_mode_can_be_trained(weights):
    with torch.inference_mode():
        net, _ = network(weights)
    x = torch.randn(3, 64, requires_grad=True)
    net(x).sum().backward()
    same, _ = network(weights)
    other = x.detach().clone().requires_grad_(True)
    same(other).sum().backward()
    assert torch.equal(x.grad, other.grad) and not any(p.is_inference() for p in map(plain_of, net.parameters()))


def plain_of(parameter):
    return parameter if isinstance(parameter, StoredParameter) else torch.zeros(())


@every_weight
def test_sizes_by_itemsize_are_bytes_as_accelerate_and_export_compute_them(weights):
    from accelerate.utils import compute_module_sizes

    net, count = network(weights)
    nbytes = sum(p.untyped_storage().nbytes() for p in net.parameters())
    for other in (net, copy.deepcopy(net).to("meta")):
        assert compute_module_sizes(other)[""] == nbytes
        assert sum(p.numel() * p.dtype.itemsize for p in other.parameters()) == nbytes
        assert all(p.element_size() == p.dtype.itemsize for p in other.parameters())
        assert sum(p.numel() for p in other.parameters()) == count


@every_weight
def test_counts_and_bytes_outlive_offloading(weights, tmp_path):
    from accelerate import cpu_offload, disk_offload

    net, count = network(weights)
    x = torch.randn(3, 64)
    wanted, nbytes = net(x), sum(p.nbytes for p in net.parameters())
    cpu = torch.device("cpu")
    for other in (
        cpu_offload(copy.deepcopy(net), execution_device=cpu),
        disk_offload(copy.deepcopy(net), str(tmp_path), execution_device=cpu),
    ):
        assert torch.equal(other(x), wanted) and torch.equal(other(x), wanted)
        assert sum(p.numel() for p in other.parameters()) == count
        assert sum(p.numel() * p.element_size() for p in other.parameters()) == nbytes


def test_a_count_is_an_int_but_for_the_size_of_its_elements():
    count = Count(64, itemsize=2, nbytes=24)
    assert (count * 2, 2 * count, count * 4, count * True, count * 0.5) == (24, 24, 256, 64, 32.0)
    assert type(pickle.loads(pickle.dumps(count))) is int and torch.zeros(count).shape == (64,)


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4", "aqlm-1x4"])
def test_an_exported_program_is_saved_and_comes_back(weights):
    net, _ = network(weights)
    x, buffer = torch.randn(3, 64), io.BytesIO()
    torch.export.save(torch.export.export(net, (x,)), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), net(x))


@every_weight
def test_a_trace_of_operators_takes_stored_parameters(weights):
    from torch.fx.experimental.proxy_tensor import make_fx

    net, _ = network(weights)
    x = torch.randn(3, 64)
    torch.testing.assert_close(make_fx(net)(x)(x), net(x))


@every_weight
def test_parameters_that_are_saved_alone_are_those_of_torch(weights):
    net, _ = network(weights)
    buffer = io.BytesIO()
    torch.save([dict(net.named_parameters()), net.state_dict(keep_vars=True)], buffer)
    buffer.seek(0)
    for state in torch.load(buffer, weights_only=True):
        assert {type(tensor) for tensor in state.values()} == {nn.Parameter}
        assert all(map(torch.equal, state.values(), stored(net)))


def test_tensors_that_wrap_others_are_ordinary_parameters():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        made = stored_parameter(torch.empty(3, 4), weights=24)
    assert isinstance(made, FakeTensor) and isinstance(made, nn.Parameter) and not made.requires_grad


@every_weight
@pytest.mark.parametrize("unfreeze", ["module", "method", "attribute"])
def test_unfreezing_all_parameters_leaves_stored_ones_without_a_gradient(weights, unfreeze):
    net, _ = network(weights)
    if unfreeze == "module":
        net.requires_grad_(True)
    for parameter in net.parameters():
        if unfreeze == "method":
            parameter.requires_grad_(True)
        elif unfreeze == "attribute":
            parameter.requires_grad = True
    before = stored(net)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == ["0.bias", "2.bias"]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    net(torch.randn(3, 64)).sum().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(stored(net), before, strict=True)]
    assert [name for name, other in zip(net.state_dict(), changed, strict=True) if other] == trained


@every_weight
@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_torch_may_swap_or_overwrite_parameters_on_conversion(weights, way):
    net, count = network(weights)
    x, before = torch.randn(3, 64), stored(net)
    wanted = net(x)
    future = torch.__future__
    change = {"swap": future.set_swap_module_params_on_conversion}.get(
        way, future.set_overwrite_module_params_on_conversion
    )
    change(True)
    try:
        for other in (net.to("cpu"), net.double().float(), copy.deepcopy(net).to("meta").to_empty(device="cpu")):
            other.load_state_dict(dict(zip(net.state_dict(), before, strict=True)))
            assert torch.equal(other(x), wanted) and all(map(torch.equal, stored(other), before))
            assert sum(p.numel() for p in other.parameters()) == count
            kinds = {isinstance(p, StoredParameter) for name, p in other.named_parameters() if "weight" in name}
            assert kinds == {True}
    finally:
        change(False)


def test_other_memory_behind_a_parameter_is_used_at_the_next_call():
    (net, _), x = network("int8"), torch.randn(1, 64)
    (other, _) = network("int8")
    layer, mine, wanted = net[0], net[0].weight_packed, net[0](x)
    flipped = -mine.data
    for put in (
        lambda data: setattr(mine, "data", data),
        lambda data: mine.set_(data),
        lambda data: mine.copy_(data),
    ):
        own = mine.data.clone()
        put(flipped)
        assert not torch.equal(layer(x), wanted)
        put(own)
        assert torch.equal(layer(x), wanted)
    torch.utils.swap_tensors(mine, nn.Parameter(flipped, requires_grad=False))
    assert not torch.equal(layer(x), wanted)
    assert torch.equal(other[0](x), wanted)


@every_weight
def test_a_bias_that_is_pruned_or_parametrized_is_used(weights):
    from torch.nn.utils import parametrize, prune

    net, _ = network(weights)
    x, wanted = torch.randn(3, 64), net[0](torch.zeros(1, 64))
    prune.random_unstructured(net[0], "bias", 1.0)
    assert torch.equal(net[0](torch.zeros(1, 64)), torch.zeros_like(wanted)) and net(x).shape == (3, 40)

    class Twice(nn.Module):
        def forward(self, bias):
            return 2 * bias

    net, _ = network(weights)
    parametrize.register_parametrization(net[0], "bias", Twice())
    assert torch.equal(net[0](torch.zeros(1, 64)), 2 * wanted)


def test_a_packed_weight_cannot_be_pruned():
    from torch.nn.utils import prune

    net, _ = network("int4")
    names = [name for name, _ in net.named_parameters()]
    with pytest.raises(RuntimeError, match=r"held quantized.*dequantize the model first"):
        prune.l1_unstructured(net[0], "weight", 0.5)
    assert [name for name, _ in net.named_parameters()] == names


def test_detached_codes_are_the_same_memory():
    parameter = stored_parameter(torch.arange(6, dtype=torch.uint8), weights=12)
    view = parameter.detach()
    assert type(view) is Codes and type(view.detach()) is Codes and type(view + 1) is torch.Tensor
    view.zero_()
    assert parameter.sum() == 0 and type(parameter.data) is torch.Tensor
    assert type(stored_parameter(torch.zeros(2)).detach()) is torch.Tensor


def test_the_docs_of_this_module():
    assert doctest.testmod(importlib.import_module("quanto_hf.nn.stored")).failed == 0
