"""The recipe "add a module type": two toy modules with their slots, from quantize() to a model on disk.

The first 60 lines are all that is written for them: a transposed weight as in GPT-2's Conv1D, found by the path of its
class, and stacked experts with two parameters, found by a predicate.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from quanto_hf import QuantoConfig, convert_checkpoint, dequantize, freeze, plan, quantize, report, requantize
from quanto_hf.flow import quantization_map
from quanto_hf.io.inventory import read_inventory
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.registry import LOAD, QUANTIZE, register_qmodule
from quanto_hf.nn.slots import WEIGHT, Slot

EXPERTS, WIDTH, INNER = 3, 64, 96


class Transposed(nn.Module):
    """``x @ weight + bias``, weight of shape (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class ToyExperts(nn.Module):
    """Each row of x through its own expert: ``up`` of shape (experts, inner, width), ``down`` transposed."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, INNER, WIDTH))
        self.act = nn.GELU()

    def forward(self, x, ids):
        return self.multiply(x, ids, self.up, self.down)

    def multiply(self, x, ids, up, down):
        inner = self.act(torch.einsum("tw,tiw->ti", x, up[ids]))
        return torch.einsum("ti,tiw->tw", inner, down[ids])


@register_qmodule(f"{__name__}.Transposed", by_default=[LOAD, QUANTIZE])
class QTransposed(QuantizedWeight):
    declared = (Slot(WEIGHT, transposed=True),)

    def forward(self, x):
        return x @ self.rounded().to(x.dtype) + self.bias


@register_qmodule(lambda module: isinstance(module, ToyExperts), by_default=[LOAD, QUANTIZE])
class QExperts(QuantizedWeight):
    declared = (Slot("up", leading=1), Slot("down", leading=1, transposed=True))

    def forward(self, x, ids):
        return self.multiply(x, ids, self.rounded("up").to(x.dtype), self.rounded("down").to(x.dtype))


# --------------------------------------------------------------------------------------------- a model with them


class ToyConfig(tf.PreTrainedConfig):
    model_type = "quanto_hf_toy_slots"


class ToyModel(tf.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(16, WIDTH)
        self.mix, self.experts, self.out = Transposed(WIDTH, WIDTH), ToyExperts(), nn.Linear(WIDTH, WIDTH)
        self.post_init()

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data.normal_(0, WIDTH**-0.5)

    def forward(self, input_ids):
        x = self.embed(input_ids.reshape(-1))
        x = self.mix(x)
        return self.out(x + self.experts(x, input_ids.reshape(-1) % EXPERTS))


tf.AutoConfig.register("quanto_hf_toy_slots", ToyConfig, exist_ok=True)
tf.AutoModel.register(ToyConfig, ToyModel, exist_ok=True)

IDS = torch.tensor([[1, 5, 9, 2, 14, 0]])
# the two slots of the experts are stored differently
CONFIG = {"weights": "int8", "overrides": {"experts.down": {"weights": "int4"}}}


@torch.no_grad()
def answer(model):
    return model(IDS)


def relative(made, wanted):
    return float((made - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("toy")
    ToyModel(ToyConfig()).save_pretrained(made)
    return made


def load(folder, **options):
    return ToyModel.from_pretrained(folder, quantization_config=QuantoConfig(**CONFIG), **options)


STORED = {"mix.weight": "int8", "experts.up": "int8", "experts.down": "int4 g64 asym", "out.weight": "int8"}


def rows_of(model):
    return {row.name: row.stored for row in report(model).rows if not row.reason}


def test_quantize_freeze_and_dequantize_a_plain_model(folder):
    plain, model = ToyModel.from_pretrained(folder), nn.Sequential(ToyModel.from_pretrained(folder))
    wanted = answer(plain)
    quantize(model, "int8", overrides={"*.down": {"weights": "int4"}})
    assert isinstance(model[0].experts, QExperts) and isinstance(model[0].experts, ToyExperts)
    assert isinstance(model[0].mix, QTransposed) and isinstance(model[0].mix, Transposed)
    prepared = model(IDS)
    prepared.sum().backward()
    assert model[0].experts.up.grad.abs().sum() > 0 < model[0].mix.weight.grad.abs().sum()
    freeze(model)
    assert torch.equal(answer(model), prepared.detach()) and 0 < relative(prepared, wanted) < 0.1
    experts = model[0].experts
    assert {name: tuple(t.shape) for name, t in experts.state_dict().items()} == {
        "up_packed": (EXPERTS, INNER, WIDTH), "up_scale": (EXPERTS, INNER, 1), "down_packed": (EXPERTS, WIDTH, 48),
        "down_scale": (EXPERTS, WIDTH, 2), "down_zero": (EXPERTS, WIDTH, 2),
    }  # fmt: skip
    assert experts.down.shape == (EXPERTS, INNER, WIDTH) and not experts.down.requires_grad
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    errors = {row.name: row.error for row in report(model, nn.Sequential(plain)).rows if not row.reason}
    assert list(errors) == [f"0.{name}" for name in STORED]
    for row in report(model).rows:
        assert row.reason or row.error == pytest.approx(errors[row.name], rel=0.3)

    again = nn.Sequential(ToyModel(ToyConfig()))
    requantize(again, model.state_dict(), quantization_map(model))
    assert torch.equal(answer(again), answer(model))
    with pytest.raises(ValueError, match=r"quantized already: 0\.experts\.up \(int8\)"):
        quantize(model, "nf4", include="experts.up")
    with pytest.raises(RuntimeError, match=r"experts: up = nn\.Parameter"):
        experts.up = nn.Parameter(torch.zeros(EXPERTS, INNER, WIDTH))
    made = answer(model)
    dequantize(model)
    assert type(model[0].experts) is ToyExperts and type(model[0].mix) is Transposed
    assert isinstance(model[0].experts.act, nn.GELU) and relative(answer(model), made) < 1e-5


def test_one_slot_may_stay_float(folder, tmp_path):
    config = QuantoConfig("int8", overrides={"experts.up": {"weights": None}})
    model = ToyModel.from_pretrained(folder, quantization_config=config)
    rows = {row.name: row for row in report(model).rows}
    assert rows["experts.up"].reason == "an override leaves 'experts.up' in float"
    assert rows["experts.down"].stored == "int8"
    planned = plan(folder, config, auto_class=ToyModel)
    assert planned.nbytes == model.get_memory_footprint()
    model.save_pretrained(tmp_path)
    again = ToyModel.from_pretrained(tmp_path)
    assert type(again.experts.up) is nn.Parameter and torch.equal(answer(again), answer(model))


def test_a_model_is_loaded_saved_planned_inspected_converted_and_offloaded(folder, tmp_path):
    model = load(folder)
    assert rows_of(model) == STORED and all(error is not None for error in model.experts.slot_errors.values())
    made = answer(model)
    assert 0 < relative(made, answer(ToyModel.from_pretrained(folder))) < 0.1

    model.save_pretrained(tmp_path / "saved")
    modules = [name for entry in model.config.quantization_config.schemes for name in entry["modules"]]
    assert sorted(modules) == ["experts.down", "experts.up", "mix", "out"]
    assert rows_of(ToyModel.from_pretrained(tmp_path / "saved")) == STORED

    config = QuantoConfig(**CONFIG)
    for planned in (plan(folder, config, auto_class=ToyModel), plan(tmp_path / "saved", auto_class=ToyModel)):
        assert planned.nbytes == model.get_memory_footprint()
    rows = {row.name: row for row in read_inventory(tmp_path / "saved").rows}
    for row in report(model).rows:
        assert (rows[row.name].stored, rows[row.name].nbytes) == (row.stored, row.nbytes)
        assert rows[row.name].parameters == torch.Size(row.shape).numel()

    convert_checkpoint(folder, tmp_path / "converted", config, auto_class=ToyModel)
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("converted", "saved")]
    assert files[0] == files[1]

    for number, source in enumerate((folder, tmp_path / "saved")):
        options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / f"off{number}")}
        disk = load(source, **options) if source == folder else ToyModel.from_pretrained(source, **options)
        assert torch.equal(answer(disk), made)

    config = QuantoConfig(**CONFIG, dequantize=True)
    plain = ToyModel.from_pretrained(folder, quantization_config=config)
    assert not any(isinstance(module, QuantizedWeight) for module in plain.modules())
    assert type(plain.experts) is ToyExperts and relative(answer(plain), made) < 1e-5


def test_a_saved_model_answers_the_same_in_a_new_process(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    torch.save(answer(model), tmp_path / "answer.pt")
    code = (
        "import torch, quanto_hf, test_module as recipe\n"
        f"model = recipe.ToyModel.from_pretrained({str(tmp_path / 'saved')!r})\n"
        f"print(torch.equal(recipe.answer(model), torch.load({str(tmp_path / 'answer.pt')!r})))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.split() == ["True"], done.stderr


def test_training_goes_on_from_a_checkpoint(folder):
    model = ToyModel.from_pretrained(folder, quantization_config=QuantoConfig(**CONFIG, qat=True))
    assert model.experts.up.requires_grad and torch.equal(answer(freeze(model)), answer(load(folder)))


def test_a_wrong_shape_is_named(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "experts.up": tensors["experts.up"][:2]}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.up"):
        load(tmp_path)
