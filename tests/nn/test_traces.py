"""torch.jit.trace of quantized modules: exact at other shapes too, and made of torch's own operators once frozen."""

import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import quanto_hf
from quanto_hf.nn import qmodule_for
from quanto_hf.nn.expert_product import ExpertProduct
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import make_scheme

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GROUPED = ["int8", "int4", "int2", "float8_e4m3fn", "float8_e5m2", "nf4", "fp4"]
WEIGHTS = [*GROUPED, "aqlm-2x8"]
INPUTS = {"weight-only": None, "int8": ("int8", None), "int8-static": ("int8", 0.03), "float8": ("float8_e4m3fn", None)}
# 72 columns: a short last group, and of packed codes a short last block
COLUMNS = 72


def quantized(module: nn.Module, weights: str, inputs: Any = None, frozen: bool = True) -> Any:
    cls: Any = qmodule_for(module)
    activations, scale = inputs or (None, None)
    kind = None if activations is None else QTYPES[activations]
    layer = cls.from_module(module, make_scheme(weights), kind, static=scale is not None)
    if scale is not None:
        layer.make_static(scale)
    if frozen:
        layer.freeze()
    return layer.eval()


def check_trace(module: nn.Module, first: Any, *others: Any, rtol: float = 1e-5) -> Any:
    """Trace with ``first`` with and without gradients, and compare with the module itself at all inputs."""
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), warnings.catch_warnings():
            # of a trace that depends on more than the input
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced: Any = torch.jit.trace(module, first)
            for given in (first, *others):
                args = given if isinstance(given, tuple) else (given,)
                torch.testing.assert_close(traced(*args), module(*args), rtol=rtol, atol=rtol)
    return traced


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_traced_linear_layer_serves_every_shape_of_input(weights: str, inputs: str):
    torch.manual_seed(0)
    for columns in (COLUMNS, 256):
        layer = quantized(nn.Linear(columns, 24), weights, INPUTS[inputs])
        shapes = [(1, columns), (17, columns), (2, 5, columns), (columns,), (0, columns)]
        check_trace(nn.Sequential(layer), torch.randn(3, columns), *(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
def test_a_traced_prepared_layer_is_that_layer(weights: str, inputs: str):
    layer = quantized(nn.Linear(COLUMNS, 24), weights, INPUTS[inputs], frozen=False)
    traced = check_trace(nn.Sequential(layer), torch.randn(3, COLUMNS), torch.randn(2, 5, COLUMNS))
    # it follows the float weight, and its gradient reaches it
    with torch.no_grad():
        layer.weight.mul_(2)
    x = torch.randn(4, COLUMNS)
    torch.testing.assert_close(traced(x), layer(x))
    layer(x).sum().backward()
    wanted, layer.weight.grad = layer.weight.grad, None
    traced(x).sum().backward()
    torch.testing.assert_close(traced.get_parameter("0.weight").grad, wanted)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_trace_in_half_precision_has_the_numbers_of_the_reference(weights: str, dtype: torch.dtype, monkeypatch: Any):
    layer = quantized(nn.Linear(256, 24).to(dtype), weights)
    traced = torch.jit.trace(layer, torch.randn(3, 256).to(dtype), check_trace=False)
    monkeypatch.setenv("QUANTO_HF_REFERENCE", "1")
    layer.set_tensors(layer.tensors())
    x = torch.randn(7, 256).to(dtype)
    assert torch.equal(traced(x), layer(x))


@pytest.mark.parametrize("weights", GROUPED)
@pytest.mark.parametrize("inputs", ["weight-only", "int8", "int8-static"])
def test_traced_convolutions_serve_other_batches_and_images(weights: str, inputs: str):
    torch.manual_seed(0)
    for made, shape, other in (
        (nn.Conv1d(8, 16, 3), (2, 8, 20), (5, 8, 33)),
        (nn.Conv2d(8, 16, 3), (2, 8, 10, 10), (1, 8, 13, 9)),
        (nn.ConvTranspose2d(8, 16, 3), (2, 8, 10, 10), (1, 8, 13, 9)),
    ):
        for frozen in (True, False):
            layer = quantized(made, weights, INPUTS[inputs], frozen)
            check_trace(layer, torch.randn(shape), torch.randn(other), rtol=3e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_traced_embeddings_read_other_rows_in_other_shapes(weights: str):
    torch.manual_seed(0)
    draw = lambda *shape: torch.randint(0, 50, shape)  # noqa: E731
    layer = quantized(nn.Embedding(50, COLUMNS), weights)
    traced = check_trace(layer, draw(2, 5), draw(7), draw(), draw(2, 3, 4), draw(4, 1).int(), draw(0, 3))
    for wrong in (-1, 50):
        with pytest.raises(Exception, match="out of range"):
            traced(torch.tensor([wrong]))
    for mode in ("sum", "max"):
        bags = quantized(nn.EmbeddingBag(50, COLUMNS, mode=mode, padding_idx=3), weights)
        check_trace(bags, draw(2, 5), draw(3, 9))
        check_trace(bags, (draw(9), torch.tensor([0, 4])), (draw(12), torch.tensor([0, 1, 7])))


def test_rows_of_aqlm_blocks_of_several_rows_are_traced():
    from quanto_hf.schemes import Aqlm

    scheme = Aqlm(2, 4, out_group=4, in_group=8)
    tensors = scheme.quantize(torch.randn(16, 24))
    rows = lambda index: scheme.rows(tensors, index, 24, torch.float32)  # noqa: E731
    traced: Any = torch.jit.trace(rows, torch.tensor([1, 6]))
    for index in (torch.tensor([[0, 5, 15], [3, 3, 8]]), torch.tensor(7)):
        assert torch.equal(traced(index), rows(index))


@pytest.mark.parametrize("weights", GROUPED)
def test_traced_experts_serve_other_rows(weights: str):
    scheme = make_scheme(weights)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = ExpertProduct(scheme, 64, "up_")
            for name, tensor in scheme.quantize(torch.randn(4, 6, 64)).items():
                self.register_buffer(f"up_{name}", tensor)

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.product(x, ids, self._buffers)

    check_trace(
        Experts(), (torch.randn(3, 64), torch.tensor([2, 0, 2])), (torch.randn(5, 64), torch.tensor([2, 0, 2, 1, 3]))
    )


def test_a_weight_that_is_read_in_a_trace_is_decoded_there():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = quantized(nn.Embedding(50, COLUMNS), "nf4")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.table.weight)

    traced = check_trace(Tied(), torch.randn(3, COLUMNS), torch.randn(2, 2, COLUMNS))
    assert "weight_packed" in str(traced.graph)


class First(nn.Module):
    """The first output of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.model(*args, return_dict=False)[0]  # type: ignore[no-any-return]


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LOADED = """
import sys, torch
for folder in sys.argv[1:]:
    model, (args, wanted) = torch.jit.load(folder + "/model.pt"), torch.load(folder + "/case.pt")
    assert torch.equal(model(*args), wanted), folder
assert "quanto_hf" not in sys.modules
"""


def small_model(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    if name == "bert":
        ids = lambda *shape: (torch.randint(0, 100, shape), torch.ones(shape, dtype=torch.long))  # noqa: E731
        return BertModel(BertConfig(vocab_size=100, torchscript=True, **SMALL)), ids(2, 8), ids(3, 12)
    images = lambda n: (torch.randn(n, 3, 32, 32),)  # noqa: E731
    return ViTModel(ViTConfig(image_size=32, patch_size=8, torchscript=True, **SMALL)), images(2), images(5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")  # of transformers itself
def test_traced_models_are_saved_and_loaded_without_this_library(tmp_path: Path):
    folders = []
    for name, (weights, activations) in product(
        ("bert", "vit"), [("nf4", None), ("float8", "int8"), ("int4", "float8"), ("int8", None)]
    ):
        folder = tmp_path / f"{name}-{weights}-{activations}"
        folder.mkdir()
        model, first, other = small_model(name)
        quanto_hf.quantize(model.eval(), weights=weights, activations=activations)
        quanto_hf.freeze(model)
        whole = First(model)
        traced: Any = torch.jit.trace(whole, first)
        with torch.no_grad():
            made = traced(*other)
            torch.testing.assert_close(made, whole(*other), rtol=1e-4, atol=1e-5)
        torch.jit.save(traced, folder / "model.pt")
        torch.save((other, made), folder / "case.pt")
        # the codes are saved, and not float weights
        stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert (folder / "model.pt").stat().st_size < stored + 150_000, folder.name
        folders.append(str(folder))
    # one process for all of them: to import torch takes longer than to run a model
    run = [sys.executable, "-c", LOADED, *folders]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_a_layer_that_cannot_be_traced_says_so():
    layer = quantized(nn.Linear(64, 8), "int8", ("int8", 0.03), frozen=False)
    layer.start_observing(nn.Identity())
    with pytest.raises(RuntimeError, match="cannot be traced while it is calibrated"):
        torch.jit.trace(layer, torch.randn(2, 64))
    uncalibrated = quantized(nn.Linear(64, 8), "int8", ("int8", 0.03))
    uncalibrated.static_scale.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="never calibrated"):
        torch.jit.trace(uncalibrated, torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., 64\), not \(2, 65\)"):
        torch.jit.trace(quantized(nn.Linear(64, 8), "int8"), torch.randn(2, 65))


def test_scripting_a_quantized_layer_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile QLinear; record the model with"):
        torch.jit.script(nn.Sequential(quantized(nn.Linear(64, 8), "int8")))


@pytest.mark.parametrize("inputs", INPUTS)
def test_make_fx_holds_a_prepared_layer_as_one_operator(inputs: str):
    layer = quantized(nn.Linear(COLUMNS, 24), "int4", INPUTS[inputs], frozen=False)
    graph, x = make_fx(layer)(torch.randn(3, COLUMNS)), torch.randn(3, COLUMNS)
    assert torch.equal(graph(x), layer(x))
    conv = quantized(nn.Conv1d(8, 16, 3), "int4", INPUTS[inputs], frozen=False)
    graph, image = make_fx(conv)(torch.randn(2, 8, 20)), torch.randn(2, 8, 20)
    torch.testing.assert_close(graph(image), conv(image))
    frozen = quantized(nn.Linear(COLUMNS, 24), "int4", INPUTS[inputs])
    torch.testing.assert_close(make_fx(frozen)(torch.randn(3, COLUMNS))(x), frozen(x))
