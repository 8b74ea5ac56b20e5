"""What ``import quanto_hf`` does, what it does not do, and how given and saved configs meet."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from tiny_models import output, qlinears, save

import quanto_hf
from quanto_hf import QuantoConfig


def run(code, **environment):
    """Standard output and standard error of a new interpreter that must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


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


def test_the_import_says_nothing_and_starts_nothing():
    out, err = run(
        "import torch, transformers, sys\n"
        "before = {n for n in sys.modules if n.startswith('transformers')}\n"
        "import quanto_hf\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'transformers.quantizers.auto' not in sys.modules\n"
        "assert 'accelerate' not in sys.modules and 'torch._inductor' not in sys.modules\n"
    )
    assert (out, err) == ("", "")


def test_the_import_takes_less_than_300_ms_of_cpu_beyond_torch_and_transformers():
    code = (
        "import time, torch, transformers\nstart = time.process_time()\nimport quanto_hf\n"
        "print(time.process_time() - start)"
    )
    assert min(float(run(code)[0]) for _ in range(3)) < 0.3


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_import_adds_the_method_whenever_the_quantizers_are_imported(order):
    lines = ["import quanto_hf", "import transformers.quantizers.auto"]
    out, _ = run(
        "\n".join(lines if order == "before" else lines[::-1])
        + "\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING\n"
        "print(AUTO_QUANTIZER_MAPPING['quanto_hf'].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING['quanto_hf'].__name__)\n"
        "import sys; print([type(f).__name__ for f in sys.meta_path if 'quanto_hf' in type(f).__module__])"
    )
    assert out.split("\n")[:2] == ["QuantoHfQuantizer QuantoConfig", "['_Finder']"]


def test_no_compiler_is_needed(llama, tmp_path):
    # a path without gcc, ninja or nvcc: quantize, generate, save
    code = (
        "import quanto_hf, transformers, torch\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(llama)!r}, "
        "quantization_config=quanto_hf.QuantoConfig(weights='int4'))\n"
        f"print(m.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[0])\n"
        f"m.save_pretrained({str(tmp_path)!r})\n"
    )
    out, _ = run(code, PATH=str(tmp_path / "nothing"))
    assert out.split() == ["1"] and (tmp_path / "model.safetensors").exists()


def test_all_public_names_can_be_had_and_others_cannot():
    assert all(getattr(quanto_hf, name) is not None for name in quanto_hf.__all__)
    for module in (quanto_hf, quanto_hf.hf):
        with pytest.raises(AttributeError, match="no attribute 'quantise'"):
            _ = module.quantise


def test_install_lets_the_config_of_transformers_quantize_with_quanto_hf(llama, tmp_path):
    code = (
        "import quanto_hf, transformers\n"
        "quanto_hf.install(override='quanto')\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(llama)!r}, "
        "quantization_config=transformers.QuantoConfig(weights='int4', modules_to_not_convert=['down_proj']))\n"
        f"m.save_pretrained({str(tmp_path)!r})\n"
        "mlp = m.model.layers[0].mlp\n"
        "print(mlp.up_proj, type(mlp.down_proj).__name__, type(m.lm_head).__name__)\n"
    )
    out, _ = run(code)
    assert out.split("\n")[0] == (
        "QLinear(in_features=64, out_features=128, bias=False, weights=int4 g64 asym) Linear Linear"
    )
    # without install the saved model is one of quanto_hf
    assert len(qlinears(load(tmp_path))) == 12


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


@pytest.mark.parametrize(
    "first",
    [
        "from quanto_hf import QuantoHfQuantizer",
        "from quanto_hf.hf.load.quantizer import QuantoHfQuantizer",
        "from quanto_hf import replace_with_quanto_layers, convert_checkpoint",
        "import transformers.quantizers.auto",
        "from transformers import AutoModelForCausalLM",
    ],
)
def test_whatever_is_imported_first_the_method_is_registered(first):
    code = (
        f"import quanto_hf\n{first}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping\n"
        "assert mapping['quanto_hf'] is quanto_hf.QuantoHfQuantizer"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ------------------------------------------------------------------------------ a transformers that no longer has AQLM


WITHOUT_AQLM = """
import sys, torch
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


@pytest.mark.parametrize("when", ["gone", "registered"])
def test_a_transformers_that_does_not_have_aqlm_loads_everything_else_and_aqlm_by_us(when, llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_AQLM, str(tmp_path), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["14", "QuantizedLinear", *(["QuantizedLinear", "True"] if when != "gone" else [])]
