"""A slot: its matrix view and the inverse, pieces, names; and the registry that finds the class of a float module."""

import pytest
import torch
from torch import nn

from quanto_hf.nn import QLinear, QuantizedWeight, qmodule_for, why_no_qmodule
from quanto_hf.nn import registry as registered
from quanto_hf.nn.registry import LOAD, QMODULES, QUANTIZE, entry_of, register_qmodule, slots_of
from quanto_hf.nn.slots import WEIGHT, Slot, find, label
from quanto_hf.schemes import make_scheme

# name -> slot, and how an element of the matrix is found in the parameter
VIEWS = {
    "linear": (Slot(WEIGHT, (6, 8)), (6, 8), lambda w, r, c: w[r, c]),
    "convolution": (Slot(WEIGHT, (6, 2, 2, 2)), (6, 8), lambda w, r, c: w[r, c // 4, c // 2 % 2, c % 2]),
    "Conv1D of GPT-2": (Slot(WEIGHT, (8, 6), transposed=True), (6, 8), lambda w, r, c: w[c, r]),
    "transposed convolution": (
        Slot(WEIGHT, (4, 6, 2), transposed=True), (6, 8), lambda w, r, c: w[c // 2, r, c % 2],
    ),
    "experts": (Slot("up", (3, 6, 8), leading=1), (3, 6, 8), lambda w, e, r, c: w[e, r, c]),
    "transposed experts": (Slot("up", (3, 8, 6), leading=1, transposed=True), (3, 6, 8), lambda w, e, r, c: w[e, c, r]),
}  # fmt: skip


@pytest.mark.parametrize("kind", VIEWS)
def test_the_matrix_of_a_parameter_and_the_way_back(kind):
    slot, shape, element = VIEWS[kind]
    weight = torch.arange(slot.numel, dtype=torch.float32).view(slot.shape)
    matrix = slot.to_matrix(weight)
    assert slot.matrix_shape == tuple(matrix.shape) == shape
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        assert matrix[tuple(index)] == element(weight, *index)
    back = slot.from_matrix(matrix)
    assert torch.equal(back, weight) and back.is_contiguous()


@pytest.mark.parametrize("kind", VIEWS)
def test_pieces_are_pieces_of_the_matrix_where_a_slot_says_so(kind):
    slot, _, _ = VIEWS[kind]
    weight = torch.randn(slot.shape)
    parts = [weight[:1], weight[1:]]
    views = slot.pieces([tuple(part.shape) for part in parts])
    made = torch.cat([view.to_matrix(part).reshape(-1) for view, part in zip(views, parts, strict=True)])
    assert torch.equal(made, slot.to_matrix(weight).reshape(-1)) == slot.rows_first
    first, *rest = slot.shape
    assert slot.pieces([(1, *rest)]) == [] == slot.pieces([(first, *rest, 1)])


def test_names_and_bytes_of_the_stored_tensors():
    scheme = make_scheme("int4", 32)
    slot = Slot("down", (3, 64, 5), leading=1, transposed=True)
    specs = slot.specs(scheme, torch.float16)
    assert list(specs) == list(slot.names(scheme)) == ["down_packed", "down_scale", "down_zero"]
    assert specs["down_scale"].shape == (3, 5, 2)
    assert Slot(WEIGHT, (2, 64)).names(scheme)[0] == "weight_packed"
    assert Slot(WEIGHT, (2, 64), prefix="").names(scheme)[0] == "packed"


def test_a_weight_is_called_by_its_module_and_others_by_their_own_name():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    assert label("a", "weight") == "a" and label("a", "bias") == "a.bias" and label("", "up") == "up"
    assert find(model, "a") == ("a", "weight") and find(model, "a.bias") == ("a", "bias")


@pytest.fixture
def forget():
    """Registrations of a test end with it."""
    before, others = dict(QMODULES), list(registered._OTHERS)
    yield
    QMODULES.clear()
    QMODULES.update(before)
    registered._OTHERS[:] = others


class Stack(nn.Module):
    """Several matrices, with a method of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 64))

    def forward(self, x):
        return self.twice(x @ self.up[0].T)

    def twice(self, x):
        return 2 * x


class Inherits(Stack):
    pass


class Other(Stack):
    def forward(self, x):
        return x


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("source", [Stack, f"{__name__}.Stack", lambda module: hasattr(module, "up")])
def test_a_class_is_found_by_type_by_path_and_by_a_predicate(source):
    @register_qmodule(source)
    class QStack(QuantizedWeight):
        declared = (Slot("up", leading=1),)

        def forward(self, x):
            return self.twice(x @ self.rounded("up")[0].T)

    for kind in (Stack, Inherits):
        module = kind()
        cls = qmodule_for(module)
        assert issubclass(cls, QStack)
        layer = cls.from_module(module, make_scheme("int8"))
        layer.freeze()
        x = torch.randn(3, 64)
        assert isinstance(layer, kind) and (layer(x) - module(x)).norm() < 0.02 * module(x).norm()
        assert type(layer.to_float()) is kind and entry_of(layer) is None
        assert slots_of(layer)["up"] == slots_of(module)["up"] == Slot("up", (2, 4, 64), leading=1)
    reason = why_no_qmodule(Other())
    # a predicate is asked for each module, and answers for it
    assert reason is None if callable(source) and not isinstance(source, type) else "a forward of its own" in reason


def test_what_is_quantized_unasked_is_said_by_the_registration():
    kinds = {source.__name__: QMODULES[source].by_default for source in QMODULES}
    assert kinds["Linear"] == {LOAD, QUANTIZE} and QLinear.by_default == {LOAD, QUANTIZE}
    assert {name for name, verbs in kinds.items() if verbs == {QUANTIZE}} == {"Conv1d", "Conv2d", "Conv3d"}
    assert not kinds["Embedding"] and not kinds["ConvTranspose2d"]


@pytest.mark.usefixtures("forget")
def test_a_module_with_several_slots_wants_a_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(2, 4, 64)), nn.Parameter(torch.randn(2, 64, 4))

    @register_qmodule(f"{__name__}.{Two.__qualname__}")
    class QTwo(QuantizedWeight):
        declared = (Slot("up", leading=1), Slot("down", leading=1, transposed=True))

    layer = qmodule_for(Two()).from_module(Two(), {"up": make_scheme("int8"), "down": make_scheme("nf4")})
    with pytest.raises(ValueError, match="several quantized parameters: up, down"):
        layer.tensors()
    assert not hasattr(layer, "weight")
    layer.freeze()
    assert [str(layer.scheme_of(slot)) for slot in layer.slots] == ["int8", "nf4 g32"]
    assert layer.dequantized("down").shape == layer.down.shape == (2, 64, 4)
    layer.to(torch.bfloat16)
    assert layer.up.dtype == torch.bfloat16 and layer.up_scale.dtype == torch.float32
