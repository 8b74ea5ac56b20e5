"""Checkpoints of other methods are decoded tensor by tensor while they load, and quantized by our config."""

import json
import re

import pytest
import torch
import transformers as tf
from encoded_models import DEEPSEEK, deepseek, encode, gpt_oss
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.io import CheckpointError
from quanto_hf.nn import QuantizedWeight

AUTO = tf.AutoModelForCausalLM
METHODS = {"gpt_oss": tf.Mxfp4Config, "deepseek": tf.FineGrainedFP8Config}
# sizes that blocks of 128 fit into, or are smaller than one: the others transformers cannot decode, or does wrongly
EVEN = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "q_lora_rank": 48, "kv_lora_rank": 120,
}  # fmt: skip


def load(folder, config=None, **kwargs):
    # None would say that it is not quantized
    given = {} if config is None else {"quantization_config": config}
    return AUTO.from_pretrained(folder, **given, **kwargs)


def same(first, second):
    """Equal state dicts, with the same names."""
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoded models, and the float models that they are."""
    place = tmp_path_factory.mktemp("encoded")
    made = {"gpt_oss": gpt_oss(place / "gpt_oss"), "deepseek": deepseek(place / "deepseek")}
    for name, folder in list(made.items()):
        floats = load(folder, QuantoConfig("int4", modules_to_not_convert=["model"]))
        floats = floats.dequantize()
        floats.save_pretrained(place / f"{name} float")
        made[f"{name} float"] = place / f"{name} float"
    return made


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_every_tensor_has_the_bits_that_transformers_makes_of_it(name, dtype, tmp_path):
    folder = gpt_oss(tmp_path) if name == "gpt_oss" else deepseek(tmp_path, **EVEN)
    ours = load(folder, QuantoConfig("int4", modules_to_not_convert=["model"]), dtype=dtype)
    theirs = load(folder, METHODS[name](dequantize=True), dtype=dtype)
    assert not any(isinstance(module, QuantizedWeight) for module in ours.modules())
    assert same(ours, theirs)


def test_blocks_at_the_edges_have_the_size_that_the_config_says(folders):
    ours = load(folders["deepseek"], QuantoConfig("int4", modules_to_not_convert=["model"]))
    tensors = load_file(folders["deepseek"] / "model.safetensors")
    checked = 0
    for name, scale in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if not name.endswith("_scale_inv") or ".experts." in name:
            continue
        rows, columns = weight.shape
        each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        wanted = (weight.float() * each).bfloat16()
        assert torch.equal(ours.get_parameter(name.removesuffix("_scale_inv")), wanted), name
        checked += rows % 128 > 0 and rows > 128
    assert checked


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("name", METHODS)
def test_a_decoded_model_is_quantized_like_the_float_one(name, weights, folders, tokens):
    made, wanted = load(folders[name], QuantoConfig(weights)), load(folders[f"{name} float"], QuantoConfig(weights))
    assert any(isinstance(module, QuantizedWeight) for module in made.modules())
    assert same(made, wanted) and torch.equal(made(tokens).logits, wanted(tokens).logits)
    assert quanto_hf.report(made).nbytes == quanto_hf.report(wanted).nbytes


# ------------------------------------------------------------------------------------------------- saving, and others


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_is_in_our_format_alone(name, folders, tokens, tmp_path):
    made = load(folders[name], QuantoConfig("int4"))
    made.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["quantization_config"]["quant_method"] == "quanto_hf"
    assert not re.search(r"mxfp4|fp8|weight_block_size", text)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.endswith(("_inv", "_blocks", "_scales"))]
    again = load(tmp_path)
    assert same(made, again) and torch.equal(made(tokens).logits, again(tokens).logits)
    assert torch.equal(made.generate(tokens, max_new_tokens=4), again.generate(tokens, max_new_tokens=4))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_reported_as_missing_or_unexpected(name, folders):
    _, info = load(folders[name], QuantoConfig("int4"), output_loading_info=True)
    assert not any(info.values()), info


def test_the_method_may_be_named_in_the_config_of_the_text_model(folders, tmp_path):
    config = tf.Mistral3Config(
        text_config={**tf.MistralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, head_dim=16,
        ).to_dict()},
        vision_config={"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 16},
        spatial_merge_size=1,
    )  # fmt: skip
    model = tf.Mistral3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    encode(tmp_path, {"quant_method": "fp8"}, _one_factor)
    told = json.loads((tmp_path / "config.json").read_text())
    told["text_config"]["quantization_config"] = told.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(told))
    made = tf.Mistral3ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8"))
    assert sum(isinstance(module, QuantizedWeight) for module in made.modules()) > 7
    made.save_pretrained(tmp_path / "saved")
    assert "fp8" not in (tmp_path / "saved" / "config.json").read_text()
    assert same(made, tf.Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "saved"))


def _one_factor(name, tensor):
    """FP8 with one factor for a matrix, and one for inputs that nothing is made of."""
    if "language_model" not in name or not name.endswith("proj.weight"):
        return {name: tensor}
    scale = tensor.abs().max().float() / 448
    stem = name.removesuffix("weight")
    codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale, f"{stem}activation_scale": torch.tensor(2.0)}


@pytest.mark.parametrize("name", METHODS)
def test_other_ways_to_load_work_as_from_floats(name, folders, tokens):
    floats = folders[f"{name} float"]
    for config in (QuantoConfig("int8", dequantize=True), QuantoConfig("int8", qat=True)):
        made, wanted = load(folders[name], config), load(floats, config)
        assert same(made, wanted) and torch.equal(made(tokens).logits, wanted(tokens).logits)
    aqlm = quanto_hf.AqlmConfig(num_codebooks=1, nbits_per_codebook=2, in_group_size=8)
    if name == "gpt_oss":
        assert same(load(folders[name], aqlm), load(floats, aqlm))


@pytest.mark.parametrize("name", METHODS)
def test_without_a_config_of_ours_transformers_does_what_it_always_did(name, folders, tmp_path):
    folder = gpt_oss(tmp_path) if name == "gpt_oss" else deepseek(tmp_path, **EVEN)
    # on a machine without an accelerator that is: to dequantize
    model = load(folder, **({} if not torch.cuda.is_available() else {"device_map": "cpu"}))
    assert type(model.hf_quantizer).__module__.startswith("transformers.") if hasattr(model, "hf_quantizer") else True
    assert not any(isinstance(module, QuantizedWeight) for module in model.modules())


# --------------------------------------------------------------------------------------------- plans, files, the disk


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_is_what_the_model_takes(name, folders):
    for config in (QuantoConfig("int4"), QuantoConfig("int8", overrides={"*.o_proj": {"weights": None}})):
        planned = quanto_hf.plan(folders[name], config)
        assert planned.nbytes == load(folders[name], config).get_memory_footprint() and not planned.quantized
    assert quanto_hf.plan(folders[name]).weights == "int8"


@pytest.mark.parametrize("name", METHODS)
def test_the_headers_of_the_hub_are_enough_for_a_plan(name, folders, monkeypatch):
    from quanto_hf.hf.memory import empty
    from quanto_hf.io import read_headers

    headers = read_headers([folders[name] / "model.safetensors"])
    monkeypatch.setattr(empty, "headers_only", lambda *args: (None, headers))
    found = quanto_hf.plan(folders[name], QuantoConfig("int4"))
    monkeypatch.undo()
    assert found.nbytes == quanto_hf.plan(folders[name], QuantoConfig("int4")).nbytes


@pytest.mark.parametrize("name", METHODS)
def test_a_conversion_gives_the_files_of_loading_and_saving(name, folders, tmp_path):
    done = quanto_hf.convert_checkpoint(folders[name], tmp_path / "converted", QuantoConfig("int4"))
    load(folders[name], QuantoConfig("int4")).save_pretrained(tmp_path / "saved")
    converted, saved = (load_file(tmp_path / where / "model.safetensors") for where in ("converted", "saved"))
    assert converted.keys() == saved.keys() and all(torch.equal(converted[key], saved[key]) for key in saved)
    assert not done.not_streamed and done.nbytes_before == (folders[name] / "model.safetensors").stat().st_size
    assert "fp" not in (tmp_path / "converted" / "config.json").read_text().replace("fp32", "")
    assert load(tmp_path / "converted").config.quantization_config.weights == "int4"


@pytest.mark.parametrize("name", METHODS)
def test_what_goes_to_disk_is_decoded_and_quantized_once(name, folders, tokens, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk"}
    config, wanted = QuantoConfig("int4"), load(folders[name], QuantoConfig("int4"))
    made = load(folders[name], config, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(made(tokens).logits, wanted(tokens).logits)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "offload").rglob("*.safetensors")}
    again = load(folders[name], config, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(again(tokens).logits, wanted(tokens).logits)
    assert files and files == {file: file.stat().st_mtime_ns for file in (tmp_path / "offload").rglob("*.safetensors")}
    made.save_pretrained(tmp_path / "saved")
    assert same(load(tmp_path / "saved"), wanted)


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_part_that_is_missing_is_named(tmp_path):
    file = deepseek(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    for verb in (load, quanto_hf.plan):
        with pytest.raises(CheckpointError, match=re.escape(f"{lost.removesuffix('_scale_inv')} (FP8) without {lost}")):
            verb(tmp_path, QuantoConfig("int4"))


def test_wrong_shapes_are_told_before_anything_is_loaded(tmp_path):
    folder = deepseek(tmp_path)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "intermediate_size": DEEPSEEK["intermediate_size"] + 64}))
    with pytest.raises(CheckpointError, match=r"wrong shape: model.layers.0.mlp.down_proj.weight is \[160, 192\]"):
        load(folder, QuantoConfig("int4"))


def test_weights_that_are_not_in_safetensors_files_are_refused(folders, tmp_path):
    name, tensors = folders["gpt_oss"] / "config.json", load_file(folders["gpt_oss"] / "model.safetensors")
    (tmp_path / "config.json").write_text(name.read_text())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is no safetensors file: mxfp4 is decoded from"):
        load(tmp_path, QuantoConfig("int4"))
    config = tf.AutoConfig.from_pretrained(folders["gpt_oss"])
    with pytest.raises(CheckpointError, match="in mxfp4, which is decoded from safetensors files"):
        tf.GptOssForCausalLM.from_pretrained(
            None, config=config, state_dict=tensors, quantization_config=QuantoConfig("int4")
        )


def test_a_nan_names_the_weight(tmp_path, caplog):
    file = deepseek(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        load(tmp_path, QuantoConfig("int4"))
    assert f"ValueError: {name}: the weight has NaN or infinite values" in caplog.text
