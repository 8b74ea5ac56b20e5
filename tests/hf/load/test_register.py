"""What ``import quanto_hf`` does, what it does not do, and how given and saved configs meet."""

import json
import os
import shutil
import warnings

import pytest
import torch
import transformers
from forked import Program, run_all
from tiny_models import output, qlinears, save

import quanto_hf
from quanto_hf import QuantoConfig

QUIET = """
import torch, transformers, sys
import quanto_hf
import torch
assert not torch.cuda.is_initialized()
assert 'transformers.quantizers.auto' not in sys.modules
assert 'accelerate' not in sys.modules and 'torch._inductor' not in sys.modules
"""
TIME = """
import time, torch, transformers
start = time.process_time()
import quanto_hf
print(time.process_time() - start)
"""
ADDED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
print(AUTO_QUANTIZER_MAPPING['quanto_hf'].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING['quanto_hf'].__name__)
import sys; print([type(f).__name__ for f in sys.meta_path if 'quanto_hf' in type(f).__module__])
"""
# quantize, generate, save
USE = """
import sys, quanto_hf, transformers, torch
config = quanto_hf.QuantoConfig(weights='int4')
m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
print(m.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[0])
m.save_pretrained(sys.argv[2])
"""
INSTALL = """
import sys, quanto_hf, transformers
quanto_hf.install(override='quanto')
config = transformers.QuantoConfig(weights='int4', modules_to_not_convert=['down_proj'])
m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
m.save_pretrained(sys.argv[2])
mlp = m.model.layers[0].mlp
print(mlp.up_proj, type(mlp.down_proj).__name__, type(m.lm_head).__name__)
"""
# a transformers that no longer has AQLM
WITHOUT_AQLM = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import quanto_hf, transformers
from transformers.quantizers import auto
folder, when = sys.argv[1:]
def forget():
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        del table["aqlm"]
forget()
if when == "registered":
    quanto_hf.hf.register()
config = quanto_hf.QuantoConfig("int4")
load = transformers.AutoModelForCausalLM.from_pretrained
print(len(quanto_hf.quantization_map(load(folder, quantization_config=config))))
aqlm = quanto_hf.AqlmConfig(num_codebooks=1, nbits_per_codebook=4)
model = load(folder, quantization_config=aqlm)
print(type(model.model.layers[0].mlp.up_proj).__name__)
if when == "registered":
    model.save_pretrained(folder + "/saved")
    again = load(folder + "/saved")
    print(type(again.model.layers[0].mlp.up_proj).__name__, quanto_hf.plan(folder + "/saved").nbytes > 0)
"""
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping
assert mapping['quanto_hf'] is quanto_hf.QuantoHfQuantizer
"""
FIRST = (
    "from quanto_hf import QuantoHfQuantizer",
    "from quanto_hf.hf.load.quantizer import QuantoHfQuantizer",
    "from quanto_hf import replace_with_quanto_layers, convert_checkpoint",
    "import transformers.quantizers.auto",
    "from transformers import AutoModelForCausalLM",
)
PROGRAMS = {
    "quiet": QUIET,
    **{f"time {i}": TIME for i in range(3)},
    "before": "import quanto_hf, transformers.quantizers.auto" + ADDED,
    "after": "import transformers.quantizers.auto, quanto_hf" + ADDED,
    "no compiler": USE,
    "install": INSTALL,
    **{first: f"import quanto_hf\n{first}{REGISTERED}" for first in FIRST},
    "gone": WITHOUT_AQLM,
    "registered": WITHOUT_AQLM,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder for each program."""
    return {name: tmp_path_factory.mktemp("program") for name in PROGRAMS}


@pytest.fixture(scope="module")
def done(llama, places):
    """Standard output and standard error of a program, which must end well. Each has a process of its own."""
    for when in ("gone", "registered"):
        shutil.copytree(llama, places[when], dirs_exist_ok=True)
    words = {name: (str(llama), str(place)) for name, place in places.items()}
    words |= {when: (str(places[when]), when) for when in ("gone", "registered")}
    # a path without gcc, ninja or nvcc
    values = {"no compiler": {"PATH": str(places["no compiler"] / "nothing")}}
    programs = [Program(code, values.get(name, {}), words[name]) for name, code in PROGRAMS.items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    results = dict(zip(PROGRAMS, run_all(programs, flags=["-W", "default"], environment=environment), strict=True))

    def of(name):
        assert results[name].returncode == 0, results[name].stderr
        return results[name].stdout, results[name].stderr

    return of


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    load(llama, QuantoConfig(weights="int4")).save_pretrained(folder)
    return folder


def load(folder, config=None, **kwargs):
    given = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **given, **kwargs)


def test_the_import_says_nothing_and_starts_nothing(done):
    out, err = done("quiet")
    assert (out, err) == ("", "")


def test_the_import_takes_less_than_300_ms_of_cpu_beyond_torch_and_transformers(done):
    assert min(float(done(f"time {i}")[0]) for i in range(3)) < 0.3


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_import_adds_the_method_whenever_the_quantizers_are_imported(order, done):
    out, _ = done(order)
    assert out.split("\n")[:2] == ["QuantoHfQuantizer QuantoConfig", "['_Finder']"]


def test_no_compiler_is_needed(done, places):
    out, _ = done("no compiler")
    assert out.split() == ["1"] and (places["no compiler"] / "model.safetensors").exists()


def test_all_public_names_can_be_had_and_others_cannot():
    assert all(getattr(quanto_hf, name) is not None for name in quanto_hf.__all__)
    for module in (quanto_hf, quanto_hf.hf):
        with pytest.raises(AttributeError, match="no attribute 'quantise'"):
            _ = module.quantise


def test_install_lets_the_config_of_transformers_quantize_with_quanto_hf(done, places):
    out, _ = done("install")
    assert out.split("\n")[0] == (
        "QLinear(in_features=64, out_features=128, bias=False, weights=int4 g64 asym) Linear Linear"
    )
    # without install the saved model is one of quanto_hf
    assert len(qlinears(load(places["install"]))) == 12


def test_install_of_anything_else_is_refused():
    with pytest.raises(ValueError, match="override='gptq' is not possible; choose one of 'quanto'"):
        quanto_hf.install(override="gptq")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (QuantoConfig("int8"), r"weights='int4' \(you gave 'int8'\)"),
        (QuantoConfig("int4", group_size=32), r"group_size=None \(you gave 32\)"),
        (QuantoConfig("int4", activations="int8"), r"activations=None \(you gave 'int8'\)"),
    ],
    ids=["weights", "group_size", "activations"],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(config, text, saved):
    with pytest.raises(ValueError, match=rf"quantized already, with {text}\. Load it without a quantization_config"):
        load(saved, config)


@pytest.mark.parametrize(
    "config", [QuantoConfig("int4"), QuantoConfig("int4", group_size=64)], ids=["same", "written-out"]
)
def test_the_same_config_changes_nothing_and_does_not_warn(config, saved):
    wanted = output(load(saved), "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(saved, config)
    assert torch.equal(output(model, "llama"), wanted)


def test_a_checkpoint_of_another_method_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp_quant"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized already, with fp_quant; .*quantize the original float checkpoint"):
        load(tmp_path, QuantoConfig())


@pytest.mark.parametrize("given", [QuantoConfig(dequantize=True), QuantoConfig("int4", dequantize=True)], ids=str)
def test_a_quantized_checkpoint_can_be_loaded_dequantized(given, saved, tmp_path):
    model, quantized = load(saved, given), load(saved)
    assert qlinears(model) == {}
    torch.testing.assert_close(output(model, "llama"), output(quantized, "llama"), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path), "quantization_config")
    assert torch.equal(output(load(tmp_path), "llama"), output(model, "llama"))


def test_a_float_checkpoint_can_be_loaded_with_the_rounded_weights(llama):
    model, quantized = load(llama, QuantoConfig("int2", dequantize=True)), load(llama, QuantoConfig("int2"))
    assert qlinears(model) == {}
    weight = quantized.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


@pytest.mark.parametrize("first", FIRST)
def test_whatever_is_imported_first_the_method_is_registered(first, done):
    done(first)


# ------------------------------------------------------------------------------ a transformers that no longer has AQLM


@pytest.mark.parametrize("when", ["gone", "registered"])
def test_a_transformers_that_does_not_have_aqlm_loads_everything_else_and_aqlm_by_us(when, done):
    out, _ = done(when)
    assert out.split() == ["14", "QuantizedLinear", *(["QuantizedLinear", "True"] if when != "gone" else [])]
