"""Subclasses of nn.Linear and of convolutions: those that compute what their base does have a quantized module."""

import copy
import functools
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from quanto_hf import QLinear, QuantoConfig, dequantize, freeze, quantize, replace_with_quanto_layers, report
from quanto_hf.flow import Choice, assign, float_weights
from quanto_hf.nn import qmodule_for, why_no_qmodule


class Inherits(nn.Linear):
    """With a constructor, methods and attributes of its own."""

    factor = 3

    def __init__(self, size_in, size_out, label="a"):
        super().__init__(size_in, size_out)
        self.label = label

    def describe(self):
        return f"{self.label} {self.out_features}"


class Falcon(nn.Linear):
    def forward(self, input):
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Named(nn.Linear):
    def forward(self, hidden_states):
        return F.linear(hidden_states, self.weight, self.bias)


class Super(nn.Linear):
    def forward(self, input):
        return super().forward(input)


class Helper(nn.Linear):
    def multiply(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight)

    @property
    def offset(self):
        return 0 if self.bias is None else self.bias

    def forward(self, x):
        if x.shape[-1] != self.in_features:
            raise ValueError
        return self.multiply(x) + self.offset


class Checked(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float()).to(
            input.dtype
        )


EQUIVALENT = [Inherits, Falcon, Named, Super, Helper, Checked]


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, input):
        return super().forward(input) * self.scale


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class NoBias(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T


class Dropping(nn.Linear):
    def forward(self, input):
        return super().forward(F.dropout(input, 0.5, self.training))


class Activated(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class TwoInputs(nn.Linear):
    def forward(self, input, other=None):
        return super().forward(input)


class Tuple(nn.Linear):
    def forward(self, input):
        return super().forward(input), None


class Grouped(nn.Linear):
    groups = 2

    def forward(self, x):
        weight = self.weight.view(self.groups, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


class InPlace(nn.Linear):
    def forward(self, input):
        made = super().forward(input)
        input.zero_()
        return made


class Lora(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.lora = nn.Linear(args[0], 2)

    def forward(self, input):
        return super().forward(input)


class Table(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("table", torch.zeros(3))


class Enabled(nn.Linear):
    enabled = False

    def forward(self, input):
        return super().forward(input) if not self.enabled else input


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + 1


OTHERS = {
    Scaled: "reads scale",
    Twice: "not that of Linear",
    NoBias: "not that of Linear",
    Dropping: "not that of Linear",
    Activated: "not that of Linear",
    TwoInputs: "more than one input",
    Tuple: "not that of Linear",
    Grouped: "does not run on a small weight|reads groups",
    InPlace: "not that of Linear",
    Lora: "more than a weight and a bias: lora",
    Table: "more than a weight and a bias: table",
    Enabled: "reads enabled",
    Called: "__call__ of its own",
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", EQUIVALENT)
def test_a_subclass_that_computes_the_same_is_quantized_and_stays_a_module_of_its_class(kind, bias):
    layer = kind(64, 16)
    if not bias:
        layer.bias = None
    x = torch.randn(5, 64)
    wanted = freeze(quantize(nn.Sequential(plain(layer)), "int4"))(x)
    model = freeze(quantize(nn.Sequential(layer), "int4"))
    made = model[0]
    assert isinstance(made, QLinear) and isinstance(made, kind) and torch.equal(model(x), wanted)
    dequantize(model)
    assert type(model[0]) is kind and torch.allclose(model(x), wanted, atol=1e-5)


def plain(layer):
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made


@pytest.mark.parametrize(("kind", "reason"), OTHERS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_any_other_subclass_stays_float_and_says_why(kind, reason):
    model = nn.Sequential(kind(64, 16), nn.Linear(16, 16))
    assignment = assign(model, Choice("int8"))
    assert list(assignment.chosen) == (["0.lora", "1"] if kind is Lora else ["1"])
    quantize(model, "int8")
    assert type(model[0]) is kind
    row = next(row for row in report(model).rows if row.name == "0.weight")
    assert re.search(reason, row.reason), row.reason
    left = float_weights(model, {}, {})
    assert {weight.kind for weight in left} <= {kind.__name__, "Linear"} and left[0].kind == kind.__name__
    assert re.search(reason, left[0].reason) and not left[0].named


def test_nothing_is_decided_from_the_weight_itself():
    # of a model that is not loaded yet
    with torch.device("meta"):
        for kind in EQUIVALENT:
            assert qmodule_for(kind(2**20, 2**20)) is not None
        assert why_no_qmodule(Scaled(2**20, 2**20)) == "the forward of Scaled reads scale"


def test_trying_it_out_leaves_everything_as_it_was():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, input):
            type(self).calls += 1
            return super().forward(input)

    layer, state = Falcon(8, 8), torch.get_rng_state()
    parameters = dict(layer.named_parameters())
    with torch.autocast("cpu"), torch.device("meta"), torch.inference_mode():
        assert why_no_qmodule(layer) is None
    assert torch.equal(torch.get_rng_state(), state) and layer.training
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    why_no_qmodule(Counting(8, 8))
    assert Counting.calls == 0


def test_methods_and_attributes_of_the_class_and_of_the_module_are_kept():
    model = nn.Sequential(Inherits(8, 4, "first"), nn.Linear(4, 4))
    model[0].note, model[1].note = [1], "second"
    note = model[0].note
    freeze(quantize(model, "int8"))
    assert model[0].describe() == "first 4" and model[0].factor == 3
    assert model[0].note is note and model[1].note == "second"
    model[0].label = "later"
    dequantize(model)
    assert model[0].describe() == "later 4" and model[0].note is note and model[1].note == "second"


def test_the_input_may_have_another_name():
    model = freeze(quantize(nn.Sequential(Named(8, 4)), "int8"))
    x = torch.randn(2, 8)
    assert torch.equal(model[0](hidden_states=x), model[0](x))


def test_copies_and_pickles_are_of_the_same_class():
    model = freeze(quantize(nn.Sequential(Falcon(64, 8)), "int4"))
    x = torch.randn(2, 64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(other[0]) is type(model[0]) and torch.equal(other(x), model(x))


def test_a_state_dict_and_the_compiler_see_a_quantized_linear_layer():
    model = freeze(quantize(nn.Sequential(Named(64, 8)), "int4"))
    assert list(model.state_dict()) == ["0.weight_packed", "0.weight_scale", "0.weight_zero", "0.bias"]
    x = torch.randn(2, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_a_layer_whose_forward_is_replaced_stays_float():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].forward = functools.partial(torch.mul, torch.ones(8))
    assert assign(model, Choice("int8")).left == {"0": "its forward is replaced, by an attribute of the module"}


def test_a_parametrized_weight_and_a_parametrized_bias_stay_float():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), Falcon(8, 8))
    parametrize.register_parametrization(model[1], "bias", Double())
    parametrize.register_parametrization(model[2], "weight", Double())
    assignment = assign(model, Choice("int8"))
    assert not assignment.chosen and list(assignment.left) == ["0", "1", "2"]
    assert "computed from other parameters" in assignment.left["0"] and "parametrizations" in assignment.left["1"]


def test_a_lazy_layer_stays_float():
    assignment = assign(nn.Sequential(nn.LazyLinear(4)), Choice("int8"))
    assert not assignment.chosen and "not known" in assignment.left["0"]


def test_a_convolution_subclass_is_quantized_if_it_inherits_its_forward():
    class Depthwise(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, groups=channels)

    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    class Causal(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(F.pad(x, (2, 0)), weight, bias)

    model = nn.ModuleList([Depthwise(4), Standardized(3, 3, 3), Causal(4, 4, 3)])
    quantize(model, "int8")
    assert isinstance(model[0], Depthwise) and type(model[0]).__name__ == "QDepthwise"
    assert [type(m).__name__ for m in model[1:]] == ["Standardized", "Causal"]
    x = torch.randn(1, 4, 8, 8)
    assert model[0](x).shape == (1, 4, 6, 6)


def test_the_functions_for_empty_models_take_subclasses_too():
    with torch.device("meta"):
        model = nn.Sequential(Falcon(64, 8), Scaled(8, 8))
    replace_with_quanto_layers(model, QuantoConfig("int4"))
    assert isinstance(model[0], Falcon) and isinstance(model[0], QLinear) and type(model[1]) is Scaled
