"""The quantizer: its answers to transformers, sizes before loading, and offloaded models."""

import warnings

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_models import TINY, output, qlinears, relative, save

from quanto_hf import QuantoConfig, QuantoHfQuantizer, report
from quanto_hf.hf.load import left_in_float
from quanto_hf.io import FORMAT_VERSION, read_headers, without_guards


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def load(folder, config=None, **kwargs):
    config = {"quantization_config": config} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **config, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_a_dtype_that_cannot_be_quantized_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype} cannot be quantized; choose one of torch.float32"):
        QuantoHfQuantizer(QuantoConfig(), pre_quantized=False).update_dtype(dtype)


def test_a_quantized_checkpoint_without_schemes_is_refused():
    with pytest.raises(ValueError, match="has no 'schemes': it was not written by save_pretrained"):
        QuantoHfQuantizer(QuantoConfig(), pre_quantized=True)


def test_the_config_of_the_user_is_not_written_into(llama):
    config = QuantoConfig(weights="int8")
    model = load(llama, config)
    assert config == QuantoConfig(weights="int8")
    assert model.config.quantization_config.schemes is not None and model.is_quantized


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8_e4m3fn", "nf4"])
def test_the_size_planned_on_meta_is_the_size_after_loading(weights, llama):
    config = QuantoConfig(weights=weights, overrides={"layers.0.mlp": {"weights": None}})
    quantizer = QuantoHfQuantizer(config, pre_quantized=False)
    with torch.device("meta"):
        empty = TINY["llama"].cls(TINY["llama"].config())
    quantizer.preprocess_model(empty, dtype=torch.float32)
    planned = sum(p.numel() * quantizer.param_element_size(empty, n, p) for n, p in empty.named_parameters())
    loaded = load(llama, config)
    assert planned == sum(p.numel() * p.element_size() for p in loaded.parameters()) == report(loaded).nbytes


def test_group_sizes_and_overrides_survive_a_reload(llama, tmp_path):
    overrides = {"q_proj": {"group_size": 16}, "down_proj": {"symmetric": True}, "k_proj": {"weights": "int8"}}
    model = load(llama, QuantoConfig("int4", group_size=128, fit="minmax", overrides=overrides))
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    schemes = {name: str(layer.scheme) for name, layer in qlinears(model).items()}
    assert set(schemes.values()) == {"int4 g16 asym", "int4 g128", "int8", "int4 g128 asym"}
    assert {name: str(layer.scheme) for name, layer in qlinears(reloaded).items()} == schemes
    assert torch.equal(output(reloaded, "llama"), output(model, "llama"))


def test_every_stored_tensor_is_frozen_and_every_float_one_trains(llama):
    model = load(llama, QuantoConfig(weights="int4"))
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {grad for name, grad in trainable.items() if ".weight_" in name} == {False}
    assert {grad for name, grad in trainable.items() if ".weight_" not in name} == {True}


def test_a_saved_file_tells_its_format_version_and_holds_plain_tensors(llama, tmp_path):
    from safetensors import safe_open

    model = load(llama, QuantoConfig(weights="int4"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["quanto_hf_format"] == str(FORMAT_VERSION)
    headers = without_guards(read_headers([tmp_path / "model.safetensors"]))
    assert {n: (s.shape, s.dtype) for n, s in headers.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()
    }
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.quantization_config["quant_method"] == "quanto_hf"
    # config.dtype is taken from the first float parameter: that is no scale
    assert saved.dtype == torch.float32


def parts(disk=(), cpu=()):
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    return {name: "disk" if name in disk else "cpu" for name in names}


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
def test_offload_to_disk_on_the_fly_answers_the_same_and_saves_the_same_bytes(weights, llama, tmp_path):
    config = QuantoConfig(weights=weights)
    resident = load(llama, config)
    offloaded = load(
        llama, config, device_map=parts(disk=("model.layers.0", "lm_head")), offload_folder=tmp_path / "offload"
    )
    layer = offloaded.model.layers[0].self_attn.q_proj
    assert layer.weight_packed.device.type == "cpu"  # pages of the offload folder
    assert torch.equal(output(offloaded, "llama"), output(resident, "llama"))
    # nothing but the packed tensors is written, and no quantized layer in float
    (written,) = (tmp_path / "offload").rglob("*.safetensors")
    with safe_open(written, "pt") as file:
        names = set(file.keys())
    assert names and all(name.rpartition(".")[2].startswith("weight_") for name in names)
    resident.save_pretrained(tmp_path / "resident")
    offloaded.save_pretrained(tmp_path / "offloaded")
    assert same_tensors(tmp_path / "resident", tmp_path / "offloaded")


def same_tensors(one, other):
    from safetensors.torch import load_file

    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantized_checkpoint_can_be_offloaded_to_disk(weights, llama, tmp_path):
    model = load(llama, QuantoConfig(weights=weights))
    model.save_pretrained(tmp_path / "saved")
    offloaded = load(
        tmp_path / "saved", device_map=parts(disk=("model.layers.1",)), offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[1].mlp.up_proj.weight_packed.device.type == "cpu"  # pages of the checkpoint
    assert torch.equal(output(offloaded, "llama"), output(model, "llama"))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps_of_one_device_change_nothing(device_map, llama):
    config = QuantoConfig(weights="int4")
    assert torch.equal(
        output(load(llama, config, device_map=device_map), "llama"), output(load(llama, config), "llama")
    )


def test_accelerate_cpu_offload_and_disk_offload_answer_the_same(llama, tmp_path):
    import accelerate

    config = QuantoConfig(weights="int4")
    wanted = output(load(llama, config), "llama")
    offloaded = accelerate.disk_offload(load(llama, config), tmp_path / "disk", execution_device="cpu")
    assert torch.equal(output(offloaded, "llama"), wanted)
    offloaded = accelerate.cpu_offload(load(llama, config), execution_device="cpu")
    assert torch.equal(output(offloaded, "llama"), wanted)


@pytest.mark.parametrize("name", ["opt", "vit", "bert"])
def test_activations_are_rounded_without_calibration_and_survive_a_reload(name, tmp_path):
    save(name, tmp_path / "float")
    cls, skipped = TINY[name].cls, {"opt": "layers.0", "vit": "layers.0", "bert": "encoder.layer.0"}[name]
    skipped = skipped if name != "vit" else "*.0.*"
    config = QuantoConfig(weights="int8", activations="int8", modules_to_not_convert=[skipped])
    model = cls.from_pretrained(tmp_path / "float", quantization_config=config)
    weight_only = cls.from_pretrained(
        tmp_path / "float", quantization_config=QuantoConfig(weights="int8", modules_to_not_convert=[skipped])
    )
    exact = cls.from_pretrained(tmp_path / "float")
    error = relative(output(model, name), output(exact, name))
    assert relative(output(weight_only, name), output(exact, name)) < error < 0.05
    model.save_pretrained(tmp_path / "saved")
    reloaded = cls.from_pretrained(tmp_path / "saved")
    assert {m.activations.name for m in qlinears(reloaded).values()} == {"int8"}
    assert torch.equal(output(reloaded, name), output(model, name))


def test_dequantize_gives_plain_layers_with_the_rounded_weights(llama):
    model = load(llama, QuantoConfig(weights="int4"))
    wanted = output(model, "llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.dequantize()
    assert qlinears(model) == {} and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    torch.testing.assert_close(output(model, "llama"), wanted, rtol=1e-4, atol=1e-5)
    assert not getattr(model.config, "quantization_config", None)


def test_a_model_with_weights_on_disk_refuses_to_be_dequantized(llama, tmp_path):
    model = load(
        llama, QuantoConfig(weights="int8"), device_map=parts(disk=("model.layers.0",)), offload_folder=tmp_path
    )
    with pytest.raises(ValueError, match="a model with offloaded weights cannot be dequantized"):
        model.dequantize()


def test_a_model_without_linear_layers_to_quantize_warns(llama):
    with pytest.warns(UserWarning, match="no linear layer of LlamaForCausalLM is quantized"):
        load(llama, QuantoConfig(modules_to_not_convert=["model", "lm_head"]))


def test_a_model_whose_weights_are_mostly_in_modules_that_cannot_be_quantized_warns(tmp_path, monkeypatch):
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(left_in_float, "LARGE_TABLE", 1 << 20)
    with pytest.warns(
        UserWarning, match=r"(?s)9\d% of the weights of LlamaForCausalLM stay in float.*embeddings and heads"
    ):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8"))
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_model_can_be_dequantized_after_it_was_saved(llama, tmp_path):
    model = load(llama, QuantoConfig("int4"))
    wanted = output(model, "llama")
    model.save_pretrained(tmp_path)
    model.dequantize()
    assert not qlinears(model)
    assert relative(output(model, "llama"), wanted) < 1e-5
