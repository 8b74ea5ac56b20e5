"""C9, C10 and C12: whole workflows in one call, and that they are no worse than torch's."""

import copy
import warnings

import pytest
import torch
from eager_models import ConvNet, error, images, run, twin, warmed
from tiny_models import build, tokens
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from quanto_hf import eager
from quanto_hf.eager import (
    convert,
    default_dynamic_qconfig,
    default_qconfig,
    fuse_modules,
    get_default_qat_qconfig,
    get_default_qconfig,
    modules,
    prepare,
    quantize,
    quantize_dynamic,
    quantize_qat,
)

# of docs that were measured with torch 2.13: relative errors of static quantization of such a net
STATIC = {"x86": 0.031, "fbgemm": 0.034, "onednn": 0.018, "qnnpack": 0.017}


@pytest.mark.parametrize("backend", STATIC)
def test_c9_static_quantization_is_close(backend):
    net, x = warmed(ConvNet(eager)), images(32)
    fused = fuse_modules(net, ConvNet.fusible)
    fused.qconfig = get_default_qconfig(backend)
    assert error(quantize(fused, run, [x])(x), net(x)) <= 1.1 * STATIC[backend]


@pytest.mark.parametrize("backend", STATIC)
def test_c9_static_quantization_is_no_worse_than_torchs(ao, backend):
    from torch.ao.nn.quantized import FloatFunctional as TorchFunctional

    net, x = warmed(ConvNet(eager)), images(32)
    errors = []
    for mode, model in ((eager, net), (ao, twin(net, ao, TorchFunctional))):
        fused = mode.fuse_modules(model, ConvNet.fusible)
        fused.qconfig = mode.get_default_qconfig(backend)
        try:
            errors.append(error(mode.quantize(fused, run, [x])(x), net(x)))
        except RuntimeError as reason:
            pytest.skip(f"torch has no such engine here: {reason}")
    assert errors[0] <= 1.1 * errors[1]


def test_c9_one_call_is_the_same_as_its_steps():
    net, x = fuse_modules(warmed(ConvNet(eager)), ConvNet.fusible), images()
    net.train().qconfig = default_qconfig
    given = []
    made = quantize(net, lambda model, *args: (given.append((model.training, args)), run(model, *args)), (x, x))
    assert given == [(False, (x, x))]
    steps = prepare(copy.deepcopy(net).eval())
    run(steps, x, x)
    assert torch.equal(made(x), convert(steps)(x))
    # the model itself is as it was
    assert net.training and type(net.fc) is nn.Linear and not hasattr(net.fc, "qconfig")
    assert quantize(net, run, [x], inplace=True) is net and isinstance(net.fc, modules.Linear)


def test_c9_a_bare_leaf_and_a_mapping_of_ones_own():
    layer, x = nn.Linear(4, 4), torch.randn(8, 4)
    layer.qconfig = default_qconfig
    assert isinstance(quantize(layer, run, [x]), modules.Linear)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.qconfig = default_qconfig
    made = quantize(model, run, [x], mapping={nn.LayerNorm: modules.LayerNorm})
    assert type(made[0]) is nn.Linear and isinstance(made[1], modules.LayerNorm)


def test_c9_a_run_that_runs_nothing_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    model.qconfig = default_qconfig
    with pytest.raises(RuntimeError, match=r"^0: .*seen no values"):
        quantize(model, lambda model: None, [])


class Cells(nn.Module):
    """Each type that dynamic quantization knows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.lstm, self.gru = nn.LSTM(16, 16, 2, bidirectional=True), nn.GRU(32, 16, batch_first=True)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(16, 16), nn.GRUCell(16, 16), nn.RNNCell(16, 16)

    def forward(self, x):
        x = self.gru(self.lstm(self.fc(x))[0])[0][-1]
        return self.rnn_cell(self.gru_cell(self.lstm_cell(x)[0]))


class Tables(nn.Module):
    """Both embeddings. torch's quantized bag sums, whatever the mode of the float one is."""

    def __init__(self):
        super().__init__()
        self.embedding, self.bag = nn.Embedding(100, 8), nn.EmbeddingBag(100, 8, mode="sum")

    def forward(self, index):
        return torch.cat([self.embedding(index).sum(1), self.bag(index)], 1)


# relative errors that were measured with torch 2.13
DYNAMIC = {"qint8": 5.6e-3, "float16": 1.2e-4}


@pytest.mark.parametrize("dtype", DYNAMIC)
def test_c10_dynamic_quantization_is_close(dtype):
    model, x = Cells().eval(), torch.randn(7, 5, 16)
    assert error(quantize_dynamic(model, dtype=dtype)(x), model(x)) <= 1.1 * DYNAMIC[dtype]


@pytest.mark.parametrize("dtype", DYNAMIC)
def test_c10_dynamic_quantization_is_no_worse_than_torchs(ao, dtype):
    model, x = Cells().eval(), torch.randn(7, 5, 16)
    mine = error(quantize_dynamic(model, dtype=dtype)(x), model(x))
    try:
        assert mine <= 1.1 * error(ao.quantize_dynamic(model, dtype=getattr(torch, dtype))(x), model(x))
    except RuntimeError as reason:
        pytest.skip(f"torch has no such product here: {reason}")


@pytest.mark.parametrize("dtype,most", [("quint8", 0.0043), ("quint4x2", 0.056)])
def test_c10_embeddings_are_close(dtype, most):
    model, index = Tables().eval(), torch.randint(100, (6, 9))
    made = quantize_dynamic(model, dtype=dtype)
    assert isinstance(made.bag, modules.EmbeddingBag)
    assert isinstance(made.embedding, modules.Embedding) is (dtype == "quint8")
    assert error(made.bag(index), model.bag(index)) <= 1.1 * most


@pytest.mark.parametrize("dtype", ["quint8", "quint4x2"])
def test_c10_embeddings_are_no_worse_than_torchs(ao, dtype):
    model, index = Tables().eval(), torch.randint(100, (6, 9))
    mine = error(quantize_dynamic(model, dtype=dtype).bag(index), model.bag(index))
    assert mine <= 1.1 * error(ao.quantize_dynamic(model, dtype=getattr(torch, dtype)).bag(index), model.bag(index))


@pytest.mark.parametrize(
    "dtype", ["qint8", "int8", torch.int8, "float16", torch.float16, "quint8", "uint8", "quint4x2"]
)
def test_c10_dtypes_have_names(dtype):
    quantize_dynamic(Cells(), dtype=dtype)
    if hasattr(torch, str(dtype)):
        quantize_dynamic(Cells(), dtype=getattr(torch, str(dtype)))


def test_c10_each_type_becomes_its_quantized_one():
    for dtype in ("qint8", "float16"):
        made = quantize_dynamic(Cells(), dtype=dtype)
        kinds = {name: type(module).__name__ for name, module in made.named_children()}
        assert kinds.pop("fc") == ("DynamicLinear" if dtype == "qint8" else "StoredLinear")
        assert kinds == {
            "lstm": "LSTM", "gru": "GRU", "lstm_cell": "LSTMCell", "gru_cell": "GRUCell", "rnn_cell": "RNNCell",
        }  # fmt: skip
        assert not made.training


@pytest.mark.parametrize("spec", [None, {nn.Linear}], ids=["none", "set"])
def test_c10_an_unknown_dtype_is_the_same_error_everywhere(spec):
    with pytest.raises(ValueError, match="int3"):
        quantize_dynamic(Cells(), spec, dtype="int3")
    with pytest.raises(TypeError, match="3"):
        quantize_dynamic(Cells(), spec, dtype=3)


def test_c10_a_spec_says_what_is_quantized():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.LSTM(4, 4))

    def kinds(made):
        return [isinstance(m, modules.DynamicLinear) for m in (made[0], made[1][0], made[1][1])]

    assert kinds(quantize_dynamic(model, {"1.1"})) == [False, False, True]
    assert kinds(quantize_dynamic(model, {"1"})) == [False, True, True]
    assert kinds(quantize_dynamic(model, {nn.Linear})) == [True, True, True]
    assert isinstance(quantize_dynamic(model, {nn.Linear})[2], nn.LSTM)
    # a dict has its own dtypes
    made = quantize_dynamic(model, {nn.Linear: default_dynamic_qconfig, "1.0": None}, dtype="nonsense")
    assert kinds(made) == [True, False, True]
    assert type(model[0]) is nn.Linear
    assert quantize_dynamic(model, inplace=True) is model and kinds(model) == [True] * 3


def test_c10_a_bare_leaf_is_quantized():
    assert isinstance(quantize_dynamic(nn.Linear(4, 4)), modules.DynamicLinear)
    assert isinstance(quantize_dynamic(nn.LSTM(4, 4)), modules.LSTM)


def test_c10_a_fused_layer_and_one_scale_per_row():
    model = nn.Sequential(eager.fuse_modules(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), ["0", "1"])[0])
    x = torch.randn(4, 8)
    spec = {type(model[0]): eager.per_channel_dynamic_qconfig}
    made = quantize_dynamic(model, spec)
    assert isinstance(made[0], modules.DynamicLinearReLU) and made(x).min() == 0 and error(made(x), model(x)) < 0.02
    assert made[0].weight_scale.unique().numel() == 8
    assert quantize_dynamic(nn.Linear(8, 8)).weight_scale.unique().numel() == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "args", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}, {"bias": False}], ids=str
)
def test_c10_recurrent_layers_do_all_that_the_float_ones_do(kind, args):
    layer = kind(6, 8, **args).eval()
    made = quantize_dynamic(layer, dtype="float16")
    long, single = torch.randn(4, 3, 6), torch.randn(5, 6)
    for x in (long, single):
        for mine, theirs in zip(made(x), layer(x), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)
        for mine, theirs in zip(made(x, layer(x)[1]), layer(x, layer(x)[1]), strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)
    packed = pack_padded_sequence(long, [2, 1, 3] if not layer.batch_first else [2, 1, 3, 3], layer.batch_first, False)
    (mine, state), (theirs, expected) = made(packed), layer(packed)
    torch.testing.assert_close(pad_packed_sequence(mine)[0], pad_packed_sequence(theirs)[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(state, expected, atol=2e-3, rtol=0)


def test_c10_an_lstm_with_projections():
    layer, x = nn.LSTM(6, 8, proj_size=3).eval(), torch.randn(4, 2, 6)
    made = quantize_dynamic(layer)
    with warnings.catch_warnings():
        # torch says that oneDNN does not know projections, of the float layer too
        warnings.simplefilter("ignore")
        out, expected = made(x)[0], layer(x)[0]
    assert out.shape == expected.shape and error(out, expected) < 0.02
    layer.qconfig = default_qconfig
    with pytest.raises(ValueError, match="proj_size"):
        prepare(layer)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_c10_cells(kind, bias):
    cell = kind(6, 8, bias)
    made = quantize_dynamic(cell)
    for x in (torch.randn(3, 6), torch.randn(6)):
        first, expected = made(x), cell(x)
        torch.testing.assert_close(first, expected, atol=0.02, rtol=0)
        torch.testing.assert_close(made(x, expected), cell(x, expected), atol=0.02, rtol=0)
    relu = nn.RNNCell(6, 8, nonlinearity="relu")
    assert error(quantize_dynamic(relu)(x), relu(x)) < 0.05


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("args", [{}, {"padding_idx": 2}, {"include_last_offset": True}], ids=str)
def test_c10_bags(mode, args):
    bag = nn.EmbeddingBag(10, 8, mode=mode, **args)
    made = quantize_dynamic(bag, dtype="quint8")
    index, offsets = torch.tensor([1, 2, 4, 2, 2, 9]), torch.tensor([0, 2, 2, 6])
    torch.testing.assert_close(made(index, offsets), bag(index, offsets), atol=0.05, rtol=0)
    torch.testing.assert_close(made(index.view(2, 3)), bag(index.view(2, 3)), atol=0.05, rtol=0)
    if mode == "sum":
        weights = torch.rand(6)
        expected = bag(index, offsets, per_sample_weights=weights)
        torch.testing.assert_close(made(index, offsets, per_sample_weights=weights), expected, atol=0.05, rtol=0)


def test_c10_a_table_that_is_changed_by_reading_it_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        quantize_dynamic(nn.Embedding(4, 4, max_norm=1.0), dtype="quint8")


def test_c10_a_language_model(ao):
    model, ids = build("llama"), tokens()
    made = quantize_dynamic(model)
    assert isinstance(made.model.layers[0].self_attn.q_proj, modules.DynamicLinear)
    mine = error(made(ids).logits, model(ids).logits)
    assert mine <= 1.1 * 0.026
    assert mine <= 1.1 * error(ao.quantize_dynamic(model)(ids).logits, model(ids).logits)


def test_c10_a_language_model_with_static_linear_layers(ao):
    model, ids = build("llama"), tokens()
    errors = []
    for mode in (eager, ao):
        one = copy.deepcopy(model)
        mode.propagate_qconfig_(one, {nn.Linear: mode.get_default_qconfig("x86")})
        prepared = mode.prepare(mode.add_quant_dequant(one), inplace=True)
        run(prepared, ids)
        errors.append(error(mode.convert(prepared, inplace=True)(ids).logits, model(ids).logits))
    assert errors[0] <= 1.1 * errors[1]


def train(model, steps=25):
    x = images(32)
    target = x.mean((1, 2, 3))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(steps):
        loss = (model(x)[:, 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_c12_training_with_quantization_in_one_call():
    net = eager.fuse_modules_qat(ConvNet(eager).train(), ConvNet.fusible)
    net.qconfig = get_default_qat_qconfig()
    before, losses = copy.deepcopy(net.state_dict()), []
    made = quantize_qat(net, lambda model, many: losses.extend(train(model, many)), [25])
    assert losses[-1] < losses[0] / 5
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items()) and net.training
    assert isinstance(made.conv, modules.ConvReLU2d) and not made.training
    assert quantize_qat(net, train, [1], inplace=True) is net


def test_no_function_warns():
    net, x = fuse_modules(warmed(ConvNet(eager)), ConvNet.fusible), images()
    net.qconfig = get_default_qconfig()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(net, run, [x])(x)
        quantize_dynamic(Cells())(torch.randn(3, 2, 16))
        net = eager.fuse_modules_qat(ConvNet(eager).train(), ConvNet.fusible)
        net.qconfig = get_default_qat_qconfig()
        quantize_qat(net, train, [1])(x)
