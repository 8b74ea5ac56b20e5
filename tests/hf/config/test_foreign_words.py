"""Words of other tools, and things that look like a config of ours: one sentence says what to write instead."""

import copy
import inspect
import json
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import qlinears, save
from torch import nn
from transformers.quantizers import auto

import quanto_hf
from quanto_hf import AqlmConfig, CheckpointError, QuantoConfig, qfloat8, qint4, qint8

load = transformers.AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def with_method(llama, folder, config):
    """A checkpoint whose config says that it is quantized so."""
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    return folder


# ------------------------------------------------------------------------------------------------------- QuantoConfig


@pytest.mark.parametrize(
    ("given", "write"),
    [
        ({"bits": 4}, 'weights="int4" in place of bits=4'),
        ({"bits": 8}, 'weights="int8" in place of bits=8'),
        ({"w_bit": 4}, 'weights="int4" in place of w_bit=4'),
        ({"nbits": 2}, 'weights="int2" in place of nbits=2'),
        ({"num_bits": 3}, 'weights="int4" in place of num_bits=3'),
        ({"load_in_4bit": True}, 'weights="int4" in place of load_in_4bit=True'),
        ({"load_in_8bit": True}, 'weights="int8" in place of load_in_8bit=True'),
        ({"bnb_4bit_quant_type": "nf4"}, 'weights="nf4" in place of'),
        ({"quant_type": "int4_weight_only"}, 'weights="int4" in place of'),
        ({"weights_dtype": "float8"}, 'weights="float8" in place of'),
        ({"weight": "int8"}, 'weights="int8" in place of'),
        ({"weigths": "nf4"}, "weights='nf4' in place of weigths='nf4'"),
        ({"llm_int8_skip_modules": ["lm_head"]}, "modules_to_not_convert=['lm_head'] in place of"),
        ({"q_group_size": 128}, "group_size=128 in place of"),
        ({"zero_point": True}, "symmetric in place of"),
        ({"optimizer": "hqq"}, "fit='hqq' in place of"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "the dtype of from_pretrained in place of"),
        ({"bnb_4bit_use_double_quant": True}, 'a number type as QuantoConfig(weights="int4")'),
        ({"no_such_thing": 1}, 'a number type as QuantoConfig(weights="int4")'),
    ],
    ids=str,
)
def test_a_keyword_of_another_tool_says_what_to_write(given, write):
    with pytest.raises(TypeError) as error:
        QuantoConfig(**given)
    text = str(error.value)
    assert text.startswith(f"QuantoConfig does not take {next(iter(given))}=") and write in text
    assert "weights=" in text and len(text) < 400 and "\n" not in text


def test_several_of_them_are_told_at_once_and_long_ones_are_cut():
    with pytest.raises(TypeError) as error:
        QuantoConfig(load_in_4bit=True, llm_int8_skip_modules=[f"layer.{i}" for i in range(1000)])
    assert "load_in_4bit" in str(error.value) and "llm_int8_skip_modules" in str(error.value)
    assert len(str(error.value)) < 500


def test_the_constructor_keeps_its_signature_and_copies_and_pickles():
    parameters = inspect.signature(QuantoConfig).parameters
    assert next(iter(parameters)) == "weights" and parameters["quant_method"].kind == inspect.Parameter.KEYWORD_ONLY
    config = QuantoConfig("int4", "int8", ["lm_head"])
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_a_config_json_with_such_a_key_says_so_too():
    with pytest.raises(ValueError, match=r'unknown keys in the quantization config: bits; .*write weights="int4" in'):
        QuantoConfig.from_dict({"quant_method": "quanto_hf", "bits": 4})


def test_quantize_says_it_for_its_own_arguments():
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r'quantize does not take bits=4: write weights="int4" in place of bits=4'):
        quanto_hf.quantize(net, bits=4)
    with pytest.raises(TypeError, match=r"modules_to_not_convert=\['a'\] in place of skip_modules=\['a'\]"):
        quanto_hf.quantize(net, skip_modules=["a"], fit="hqq")
    assert type(net[0]) is nn.Linear


def test_number_types_are_stored_as_their_names(llama, tmp_path):
    config = QuantoConfig(qint4, qint8, overrides={"*.down_proj": {"weights": qfloat8}})
    assert (config.weights, config.activations) == ("int4", "int8")
    assert config.overrides == {"*.down_proj": {"weights": "float8_e4m3fn"}}
    json.dumps(config.to_dict())
    model = load(llama, quantization_config=config)
    model.save_pretrained(tmp_path)
    assert {str(layer.scheme) for layer in qlinears(load(tmp_path)).values()} == {"int4 g64 asym", "float8_e4m3fn"}


@pytest.mark.parametrize(
    "given",
    [
        {"weights": nn.Linear(200, 200)},
        {"weights": ["int4"] * 1000},
        {"weights": torch.zeros(1000)},
        {"activations": qint4},
        {"activations": ["int8"] * 1000},
        {"fit": "x" * 1000},
        {"group_size": list(range(1000))},
        {"modules_to_not_convert": {f"layer.{i}": i for i in range(1000)}},
        {"overrides": [f"layer.{i}" for i in range(1000)]},
        {"overrides": {"a": [f"layer.{i}" for i in range(1000)]}},
    ],
    ids=lambda given: f"{next(iter(given))}-{type(next(iter(given.values()))).__name__}",
)
def test_a_bad_value_is_shown_in_short(given):
    with pytest.raises(ValueError) as error:
        QuantoConfig(**given)
    assert len(str(error.value)) < 330


# --------------------------------------------------------------------------------- what is given in place of a config


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("int4", r"quantization_config='int4' is a str, not a config: .*QuantoConfig\(weights=\"int4\"\)"),
        ("qint8", r"is a str, not a config: .*QuantoConfig\(weights=\"int8\"\)"),
        ("4bit", r"is a str, not a config: .*QuantoConfig\(weights=\"int4\"\)"),
        (qint8, r"quantization_config='int8' is a number type, not a config: .*QuantoConfig\(weights=\"int8\"\)"),
        (QuantoConfig, r"is the class, not a config: write QuantoConfig\(\)"),
        (AqlmConfig, r"is the class, not a config: write AqlmConfig\(\)"),
    ],
    ids=["int4", "qint8", "4bit", "QType", "QuantoConfig", "AqlmConfig"],
)
def test_a_name_or_a_class_is_no_config(given, text, llama, tmp_path):
    with pytest.raises(TypeError, match=text):
        load(llama, quantization_config=given)
    load(llama, quantization_config=QuantoConfig("int4")).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=text):
        load(tmp_path, quantization_config=given)


@pytest.mark.parametrize("verb", ["plan", "convert_checkpoint", "load_and_quantize_model", "replace"])
def test_no_other_verb_takes_a_name_for_a_config(verb, llama, tmp_path):
    verbs = {
        "plan": lambda: quanto_hf.plan(llama, "int4"),
        "convert_checkpoint": lambda: quanto_hf.convert_checkpoint(llama, tmp_path / "out", "int4"),
        "load_and_quantize_model": lambda: quanto_hf.load_and_quantize_model(llama, "int4"),
        "replace": lambda: quanto_hf.replace_with_quanto_layers(nn.Sequential(nn.Linear(8, 8)), "int4"),
    }
    with pytest.raises(
        TypeError, match=r"config='int4' is a str, not a config: write .*QuantoConfig\(weights=\"int4\"\)"
    ):
        verbs[verb]()
    assert not (tmp_path / "out").exists()


def test_the_config_of_transformers_names_ours_where_optimum_quanto_is_not_installed(llama, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_optimum_quanto_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"`from quanto_hf import QuantoConfig`, or call quanto_hf\.install\(override="
    ):
        load(llama, quantization_config=transformers.QuantoConfig(weights="int4"))


def test_where_optimum_quanto_is_installed_the_config_of_transformers_is_served_by_it(llama, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_optimum_quanto_available", lambda: True)
    served = []
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "quanto", _served_by(served))
    with pytest.raises(RuntimeError, match="served"):
        load(llama, quantization_config=transformers.QuantoConfig(weights="int4"))
    assert served == ["int4"]


def _served_by(served):
    def quantizer(config, **kwargs):
        served.append(config.weights)
        raise RuntimeError("served")

    quantizer.__module__ = "transformers.quantizers.quantizer_quanto"
    return quantizer


# -------------------------------------------------------------------------------------- checkpoints of other methods


@pytest.mark.parametrize("config", [QuantoConfig("int4"), AqlmConfig()], ids=["QuantoConfig", "AqlmConfig"])
@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "torchao"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "auto-round", "bits": 4}, "auto-round"),
        ({"quant_method": "quark"}, "quark"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_method_is_refused_without_its_package(saved, named, config, llama, tmp_path):
    # reading its config would import the package, and say that it is to be installed
    folder = with_method(llama, tmp_path, saved)
    text = rf"quantized already, with {named}; .*quantize the original float checkpoint \(those in fp8, mxfp4 and mxfp8"
    for verb in (lambda: load(folder, quantization_config=config), lambda: quanto_hf.plan(folder, config)):
        with pytest.raises(ValueError, match=text):
            verb()


def optimum_quanto(llama, folder, suffix="._data"):
    """A checkpoint with the names that optimum-quanto gives."""
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith("proj.weight"):
            tensors |= {f"{name}{suffix}": tensor.to(torch.int8), f"{name}._scale": tensor[:, :1].clone()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "quanto_qmap.json").write_text('{"model.layers.0.mlp.up_proj": {"weights": "qint8"}}')
    return folder


@pytest.mark.parametrize("suffix", ["._data", "._data._data"])
@pytest.mark.parametrize("verb", ["load", "load-aqlm", "plan", "convert", "load_and_quantize"])
def test_a_folder_of_optimum_quanto_is_named(verb, suffix, llama, tmp_path):
    folder = optimum_quanto(llama, tmp_path / "quanto", suffix)
    aqlm = AqlmConfig(num_codebooks=1, nbits_per_codebook=4)
    verbs = {
        "load": lambda: load(folder, quantization_config=QuantoConfig("int8")),
        "load-aqlm": lambda: load(folder, quantization_config=aqlm),
        "plan": lambda: quanto_hf.plan(folder),
        "convert": lambda: quanto_hf.convert_checkpoint(folder, tmp_path / "out"),
        "load_and_quantize": lambda: quanto_hf.load_and_quantize_model(folder),
    }
    with pytest.raises(CheckpointError, match=r"written by optimum-quanto .*docs/from-optimum-quanto\.md") as error:
        verbs[verb]()
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_pickled_folder_of_optimum_quanto_is_known_by_its_map(llama, tmp_path):
    folder = optimum_quanto(llama, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="written by optimum-quanto"):
        load(folder, quantization_config=QuantoConfig("int8"))


def test_a_float_model_beside_a_map_of_optimum_quanto_is_quantized(llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "quanto_qmap.json").write_text("{}")
    assert qlinears(load(tmp_path, quantization_config=QuantoConfig("int8")))
