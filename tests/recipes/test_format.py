"""The recipe "add a format" works: a format in this file alone is loaded, reported, planned, inspected, saved, reloaded
in another process and used from disk. One line registers it: the decorator of its config."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from tiny_models import output, save, tokens

import quanto_hf
from quanto_hf import CheckpointError
from quanto_hf.flow import Choice
from quanto_hf.hf import register_format
from quanto_hf.hf.config.base import FormatConfig
from quanto_hf.io.formats import Format
from quanto_hf.io.inventory import read_inventory
from quanto_hf.io.verify import verify
from quanto_hf.nn import QLinear
from quanto_hf.nn.slots import WEIGHT, Slot
from quanto_hf.schemes import make_scheme

# ------------------------------------------------------------------------------------------------------- the format


class ToyLinear(QLinear):
    """The tensors of a layer are toy_packed and toy_scale."""

    declared: ClassVar[tuple[Slot, ...]] = (Slot(WEIGHT, prefix="toy_"),)


class ToyFormat(Format):
    """int8 in groups, all of one size; the config names the layers."""

    method: ClassVar[str] = "toy"
    keys: ClassVar[frozenset[str]] = frozenset({"toy_columns"})
    prefix: ClassVar[str] = "toy_"
    layer: ClassVar[type[QLinear]] = ToyLinear

    def schemes(self, config, headers):
        return dict.fromkeys(config["toy_layers"], make_scheme("int8", config["toy_columns"]))

    def describe(self, model, loaded):
        return {"toy_layers": [name for name, module in model.named_modules() if isinstance(module, ToyLinear)]}


@register_format
class ToyConfig(FormatConfig):
    """The config of the format."""

    format: ClassVar[Format] = ToyFormat()

    def __init__(self, toy_columns: int = 32, toy_layers: Any = None, quant_method: str = "toy"):
        self.toy_columns, self.toy_layers, self.quant_method = toy_columns, toy_layers, quant_method

    @property
    def weights(self):
        return f"toy {self.toy_columns}"

    def choice(self):
        return Choice("int8", self.toy_columns)


# ------------------------------------------------------------------------------------------------------- what works


def load(folder, **kwargs):
    return tf.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def made(floats):
    return load(floats, quantization_config=ToyConfig())


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    made.save_pretrained(out)
    return out


def test_a_float_model_is_quantized_on_loading(floats, made):
    assert sum(isinstance(module, ToyLinear) for module in made.modules()) == 14
    ours = load(floats, quantization_config=quanto_hf.QuantoConfig("int8", group_size=32))
    assert torch.equal(output(made, "llama"), output(ours, "llama"))
    assert "model.layers.0.mlp.up_proj" in str(quanto_hf.report(made))


def test_a_checkpoint_is_recognised_and_reloads_to_the_same_logits(made, folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(config) == {"quant_method", "toy_columns", "toy_layers"} and len(config["toy_layers"]) == 14
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.up_proj.toy_packed" in file.keys()
        assert file.metadata() == {"format": "pt", "written_by": "quanto_hf"}
    again = load(folder)
    assert torch.equal(output(again, "llama"), output(made, "llama"))
    assert torch.equal(output(load(folder, quantization_config=ToyConfig()), "llama"), output(made, "llama"))


RELOAD = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import test_format
torch.save(test_format.load(sys.argv[1])(test_format.tokens()).logits, sys.argv[1] + "/logits.pt")
"""


def test_another_process_reads_it(made, folder):
    here = Path(__file__).parent
    command = [sys.executable, "-c", RELOAD, str(folder), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(folder / "logits.pt"), made(tokens()).logits)


def test_a_checkpoint_is_converted_to_it_file_by_file(floats, folder, tmp_path):
    assert not quanto_hf.convert_checkpoint(floats, tmp_path / "out", ToyConfig()).not_streamed
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_it_is_inspected_and_verified(made, folder):
    found = read_inventory(folder)
    assert found.method == "toy" and sum(row.stored == "int8 g32" for row in found.rows) == 14
    assert found.total().nbytes == sum(tensor.nbytes for tensor in made.state_dict().values())
    checked = verify(folder)
    assert not checked.problems and checked.tensors == len(made.state_dict())


def test_it_is_planned(floats, made, folder):
    nbytes = {quanto_hf.plan(what, config).nbytes for what, config in [
        (floats, ToyConfig()), (folder, None), (made, None), (load(floats), ToyConfig()),
    ]}  # fmt: skip
    held = [*made.state_dict().values(), *made.buffers()]
    assert nbytes == {sum(tensor.nbytes for tensor in held)}


def test_a_model_that_does_not_fit_is_tried_with_our_types(floats):
    assert set(quanto_hf.plan(floats, ToyConfig(), "1KB").others) == {"int8", "int4", "int2"}


@pytest.mark.parametrize("what", ["float", "quantized"])
def test_it_is_used_from_disk(what, floats, made, folder, tmp_path):
    source, config = (floats, ToyConfig()) if what == "float" else (folder, None)
    given = {} if config is None else {"quantization_config": config}
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    model = load(source, device_map=places, offload_folder=tmp_path, **given)
    assert torch.equal(output(model, "llama"), output(made, "llama"))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_what_does_not_fit_is_refused(floats, folder, tmp_path):
    with pytest.raises(ValueError, match="quantized already, with toy; load it without a QuantoConfig"):
        load(folder, quantization_config=quanto_hf.QuantoConfig("int8"))
    with pytest.raises(ValueError, match="quantized already, with weights='toy 32'"):
        load(folder, quantization_config=ToyConfig(64))
    with pytest.raises(CheckpointError, match="missing"):
        made = load(floats, quantization_config=ToyConfig())
        made.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["toy_layers"].append("lm_head")
        (tmp_path / "config.json").write_text(json.dumps(config))
        load(tmp_path)
    del config["quantization_config"]["quant_method"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="by its other keys it is 'toy'"):
        load(tmp_path)
