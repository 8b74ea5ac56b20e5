"""C16: the names and values of defaults and mappings are those of torch."""

import importlib

import pytest
import torch
from torch import nn

from quanto_hf import eager
from quanto_hf.eager import (
    QConfig,
    get_default_qat_qconfig,
    get_default_qconfig,
    get_dynamic_quant_module_class,
    get_quantized_operator,
    get_static_quant_module_class,
    modules,
    qconfig_equals,
)

QCONFIGS = sorted(name for name in eager.__all__ if isinstance(getattr(eager, name), QConfig))
OBSERVERS = sorted(
    name
    for name in eager.__all__
    if name.endswith(("_observer", "_observer_4bit", "127_to_127", "_fake_quant", "_fake_quant_4bit"))
    and not isinstance(getattr(eager, name), QConfig)
    and name.split("_")[0] not in ("enable", "disable")
)
FIELDS = ("dtype", "qscheme", "quant_min", "quant_max", "reduce_range", "averaging_constant", "ch_axis", "is_dynamic")


def facts(made):
    """What decides about the scales of an observer or a fake quantization."""
    if made is None or isinstance(made, nn.Identity):
        return None
    inner = getattr(made, "activation_post_process", made)
    found = {field: getattr(inner, field) for field in FIELDS if hasattr(inner, field)}
    found.update({field: str(found[field]).removeprefix("torch.") for field in ("dtype", "qscheme") if field in found})
    found["eps"] = float(inner.eps) if hasattr(inner, "eps") else None
    return type(made).__name__, type(inner).__name__, found


# for script modules, graph mode and other packages, or that torch itself warns about
ELSEWHERE = {
    "QConfigDynamic", "QConfigAny", "get_default_qconfig_dict", "get_default_qat_qconfig_dict", "get_fuser_method_new",
}  # fmt: skip


@pytest.mark.parametrize("part", ["qconfig", "fake_quantize", "quantize", "fuse_modules", "stubs"])
def test_c16_all_names_of_torch_are_there(ao, part):
    names = importlib.import_module(f"{ao.__name__}.{part}").__all__
    assert [name for name in names if not hasattr(eager, name) and name not in ELSEWHERE] == []


@pytest.mark.parametrize("name", OBSERVERS)
def test_c16_observers_have_the_values_of_torch(ao, name):
    theirs = getattr(ao, name, None)
    if theirs is None:
        theirs = getattr(importlib.import_module(f"{ao.__name__}.fake_quantize"), name)
    assert facts(getattr(eager, name)()) == facts(theirs())


@pytest.mark.parametrize("name", QCONFIGS)
def test_c16_qconfigs_have_the_observers_of_torch(ao, name):
    module = importlib.import_module(f"{ao.__name__}.qconfig")
    mine, theirs = getattr(eager, name), getattr(module, name)
    for part in ("activation", "weight"):
        assert facts(getattr(mine, part)()) == facts(getattr(theirs, part)())


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
def test_c16_qconfigs_of_backends(ao, backend):
    pairs = [(get_default_qconfig(backend), ao.get_default_qconfig(backend))]
    pairs += [(get_default_qat_qconfig(backend, v), ao.get_default_qat_qconfig(backend, v)) for v in (0, 1)]
    for mine, theirs in pairs:
        for part in ("activation", "weight"):
            assert facts(getattr(mine, part)()) == facts(getattr(theirs, part)())


def test_c16_backends_and_versions_that_are_not_known():
    for get in (get_default_qconfig, get_default_qat_qconfig):
        with pytest.raises(ValueError, match="x86"):
            get("tpu")
        with pytest.raises(ValueError, match="version"):
            get("x86", 7)


def test_c16_qconfigs_are_compared_by_what_they_make():
    assert qconfig_equals(get_default_qconfig(), get_default_qconfig()) and qconfig_equals(None, None)
    assert not qconfig_equals(get_default_qconfig(), get_default_qconfig("qnnpack"))
    assert not qconfig_equals(None, get_default_qconfig())


# what torch has for one processor library only: fused with an addition, a leaky ReLU or a tanh
SPECIAL = {"ConvAdd2d", "ConvAddReLU2d", "LinearLeakyReLU", "LinearTanh"}


@pytest.mark.parametrize("name", ["static_quant", "dynamic_quant", "qat", "static_quant_reference"])
def test_c16_mappings_have_the_modules_of_torch(ao, name):
    mine = {kind.__name__ for kind in getattr(eager, f"get_default_{name}_module_mappings")()}
    theirs = {kind.__name__ for kind in getattr(ao, f"get_default_{name}_module_mappings", lambda: {})()}
    assert theirs - SPECIAL <= mine


def test_c16_the_propagation_list_has_the_types_of_torch(ao):
    mine = {kind.__name__ for kind in eager.get_default_qconfig_propagation_list()}
    assert {kind.__name__ for kind in ao.get_default_qconfig_propagation_list()} - SPECIAL <= mine
    assert nn.Sigmoid not in eager.get_default_qconfig_propagation_list()


def test_c16_classes_are_found_by_the_float_one():
    assert get_static_quant_module_class(nn.Linear) is modules.Linear
    assert get_static_quant_module_class(nn.Linear, is_reference=True).is_reference
    assert get_static_quant_module_class(nn.Linear, {nn.Linear: nn.Identity}) is nn.Identity
    assert get_dynamic_quant_module_class(nn.LSTM) is modules.LSTM
    assert get_quantized_operator(nn.functional.elu) is modules.ELU
    for find in (get_static_quant_module_class, get_dynamic_quant_module_class, get_quantized_operator):
        with pytest.raises(AssertionError, match="no quantized counterpart"):
            find(nn.MaxPool2d)


def test_c16_mappings_are_copies():
    eager.get_default_static_quant_module_mappings().clear()
    eager.get_default_dynamic_quant_module_mappings().clear()
    assert nn.Linear in eager.get_default_static_quant_module_mappings()
    assert nn.Linear in eager.get_default_dynamic_quant_module_mappings()
    custom = eager.get_default_custom_config_dict()
    assert custom["float_to_observed_custom_module_class"][nn.LSTM] is eager.ObservedLSTM
    assert custom["observed_to_quantized_custom_module_class"][eager.ObservedLSTM] is eager.QuantizedLSTM


def test_c16_what_observers_have_seen_moves_between_models():
    def prepared():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
        model.qconfig = get_default_qconfig()
        return eager.prepare(model)

    one, other = prepared(), prepared()
    one(torch.randn(8, 4))
    state = eager.get_observer_state_dict(one)
    assert state and all("activation_post_process" in key for key in state)
    eager.load_observer_state_dict(other, state)
    assert torch.equal(eager.convert(one)[1].scale, eager.convert(other)[1].scale)
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="missing"):
        eager.load_observer_state_dict(other, state)


def test_c16_torchs_observer_states_are_read(ao):
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.qconfig = ao.get_default_qconfig()
    theirs = ao.prepare(model)
    theirs(torch.randn(8, 4))
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model.qconfig = get_default_qconfig()
    mine = eager.prepare(model)
    mine.load_state_dict(theirs.state_dict())
    scale, zero = theirs[0].activation_post_process.calculate_qparams()
    made = eager.convert(mine)[0]
    assert float(made.scale) == pytest.approx(float(scale), rel=1e-6) and int(made.zero_point) == int(zero)
