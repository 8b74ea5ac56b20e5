"""A plan is made without weights, and says what loading then shows."""

import gc
import json
import os
import shutil
import time

import huggingface_hub
import pytest
import torch
import transformers as tf
from huggingface_hub.errors import NotASafetensorsRepoError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from tiny_models import TINY, llama_config, save, tokens
from torch import nn
from transformers.integrations.accelerate import get_device

import quanto_hf
from quanto_hf import AqlmConfig, CheckpointError, QuantoConfig, plan, report
from quanto_hf.hf.memory.places import read_max_memory

SCHEMES = {
    "int8": QuantoConfig("int8"),
    "int4": QuantoConfig("int4"),
    "int4-symmetric": QuantoConfig("int4", symmetric=True),
    "int2": QuantoConfig("int2"),
    "float8": QuantoConfig("float8"),
    "nf4": QuantoConfig("nf4"),
    "fp4": QuantoConfig("fp4"),
    "int8-activations": QuantoConfig("int8", activations="int8"),
    "int4-skips": QuantoConfig("int4", modules_to_not_convert=["*.0.*"], overrides={"*down_proj": {"weights": "int8"}}),
    "dequantized": QuantoConfig("int4", dequantize=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of the bfloat16 checkpoint of an architecture, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save(name, tmp_path_factory.mktemp(name), torch.bfloat16)
        return made[name]

    return folder


@pytest.fixture
def llama(folders):
    return folders("llama")


def rows(of):
    return {row.name: (row.stored, row.shape, row.nbytes) for row in of.rows}


def agrees(planned, model):
    """Whether a plan says what a loaded model is."""
    assert planned.nbytes == model.get_memory_footprint()
    assert rows(planned.report) == rows(report(model))
    assert sum(planned.modules.values()) == planned.nbytes
    assert sum(device.weights for device in planned.devices) == planned.nbytes
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "clip", "bert"])
def test_planned_bytes_are_those_of_the_loaded_model_and_of_its_report(name, scheme, folders, tmp_path):
    config = SCHEMES[scheme]
    model = TINY[name].cls.from_pretrained(folders(name), quantization_config=config)
    assert agrees(plan(folders(name), config, "1GiB"), model)
    assert agrees(plan(tf.AutoConfig.from_pretrained(folders(name)), config, "1GiB"), model)
    if config.dequantize:
        return
    model.save_pretrained(tmp_path)
    saved = plan(tmp_path, None, "1GiB")
    assert agrees(saved, model) and saved.quantized and saved.transient.nbytes == 0
    assert agrees(plan(model, None, "1GiB"), model)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bert"])
def test_a_float_model_in_memory_is_planned_and_left_alone(name, folders):
    model = TINY[name].cls.from_pretrained(folders(name))
    before = {key: (tensor.data_ptr(), tensor.dtype) for key, tensor in model.state_dict(keep_vars=True).items()}
    planned = plan(model, QuantoConfig("int4"), "1GiB")
    loaded = TINY[name].cls.from_pretrained(folders(name), quantization_config=QuantoConfig("int4"))
    assert agrees(planned, loaded)
    assert planned.transient == plan(folders(name), QuantoConfig("int4"), "1GiB").transient
    after = {key: (tensor.data_ptr(), tensor.dtype) for key, tensor in model.state_dict(keep_vars=True).items()}
    assert before == after and not hasattr(model, "hf_quantizer")


def test_a_plain_torch_model_is_planned_float_and_quantized():
    mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    planned = plan(mlp, QuantoConfig("int4", modules_to_not_convert=["2"]), "64MiB")
    quanto_hf.quantize(mlp, weights="int4", exclude="2")
    with pytest.raises(ValueError, match="not frozen"):
        plan(mlp)
    quanto_hf.freeze(mlp)
    assert rows(planned.report) == rows(report(mlp)) == rows(plan(mlp, None, "64MiB").report)
    assert planned.nbytes == sum(parameter.nbytes for parameter in mlp.parameters())
    assert planned.fits and planned.kv_cache.nbytes == 0
    assert not hasattr(mlp, "all_tied_weights_keys")


def test_an_offloaded_model_is_planned_without_its_weights_being_read(llama, tmp_path):
    config = QuantoConfig("int4")
    model = tf.LlamaForCausalLM.from_pretrained(
        llama, quantization_config=config, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    shutil.rmtree(tmp_path)
    planned = plan(model, None, "1GiB")
    assert rows(planned.report) == rows(plan(llama, config, "1GiB").report)


@pytest.mark.parametrize("mode", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_device_map_is_that_of_from_pretrained(mode, share, llama, tmp_path):
    config = QuantoConfig("int4")
    total = plan(llama, config, "1GiB").nbytes
    memory = {"cpu": int(share * total)}
    planned = plan(llama, config, memory, device_map=mode, context=0)
    model = tf.LlamaForCausalLM.from_pretrained(
        llama, quantization_config=config, device_map=mode, max_memory=dict(memory), offload_folder=tmp_path
    )
    places = getattr(model, "hf_device_map", {"": "cpu"})
    assert planned.device_map == places
    assert planned.fits == (share >= 1)
    # what is on disk is used in place, so that its tensors do not show it
    on_disk = {n for n, _ in model.named_parameters() if get_device(places, n) == "disk"}
    held = sum(p.nbytes for n, p in model.named_parameters() if n not in on_disk)
    held += sum(buffer.nbytes for buffer in model.buffers())
    assert {d.device: d.weights for d in planned.devices}.get("cpu") == held
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize(
    ("device_map", "device"),
    [("cpu", "cpu"), (None, "cpu"), (0, 0), ("cuda:1", 1), ("mps", "mps"), ({"": 2}, 2), (torch.device("cpu"), "cpu")],
    ids=str,
)
def test_a_device_or_a_dict_is_taken_as_it_is(device_map, device, llama):
    planned = plan(llama, QuantoConfig("int4"), {device: "16MiB"}, device_map=device_map)
    assert planned.device_map == {"": device}
    assert [d.device for d in planned.devices] == [device]
    assert planned.fits


def test_it_fits_to_the_byte_with_the_transient_and_with_the_cache(llama):
    config = QuantoConfig("int4")
    free = plan(llama, config, "1GiB", context=0)
    need = free.nbytes + free.transient.nbytes
    assert plan(llama, config, need, context=0).fits and not plan(llama, config, need - 1, context=0).fits
    # pre-quantized weights have no transient, and the cache comes when it is over
    cached = plan(llama, config, need, context=64)
    assert cached.fits and cached.kv_cache.nbytes > 0
    tokens_too_many = free.transient.nbytes // (cached.kv_cache.nbytes // 64) + 1
    too_much = plan(llama, config, need, context=tokens_too_many)
    assert not too_much.fits and not too_much.spilled
    assert "device 0 needs" in too_much.verdict()


def test_what_would_fit_is_named_and_does_fit(folders, tmp_path):
    config = llama_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=96)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    sizes = {w: plan(config, QuantoConfig(w), "1GiB", device_map="cpu").nbytes for w in ("int8", "int4", "int2")}
    assert sizes["int8"] > sizes["int4"] > sizes["int2"]
    found = plan(config, QuantoConfig("int8"), sizes["int4"], device_map="cpu", context=0)
    assert not found.fits
    assert found.others == {"int4": (sizes["int4"], True), "int2": (sizes["int2"], True)}
    assert found.would_fit == ["int4", "int2"]
    assert plan(config, QuantoConfig(found.would_fit[0]), sizes["int4"], device_map="cpu", context=0).fits
    nothing = plan(config, QuantoConfig("int8"), 1000, device_map="cpu")
    assert nothing.would_fit == [] and "Neither would it with int4, int2" in nothing.verdict()
    assert plan(config, QuantoConfig("int4"), sizes["int4"], device_map="cpu", context=0).others == {}


def test_a_quantized_folder_says_which_weights_of_the_float_model_would_fit(llama, tmp_path):
    model = tf.LlamaForCausalLM.from_pretrained(llama, quantization_config=QuantoConfig("int8"))
    model.save_pretrained(tmp_path)
    wanted = plan(llama, QuantoConfig("int4"), "1GiB").nbytes
    found = plan(tmp_path, None, {"cpu": wanted}, context=0)
    assert not found.fits and found.others["int4"] == (wanted, True)


def test_a_large_model_is_planned_from_its_config_in_seconds(tmp_path):
    config = tf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        max_position_embeddings=131072,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    gc.collect()
    start = time.perf_counter()
    found = plan(tmp_path, QuantoConfig("int4"), {0: "24GiB", 1: "24GiB"}, context=8192)
    # 0.6 s on 2 cores
    assert time.perf_counter() - start < 5
    assert found.fits and set(found.device_map.values()) == {0, 1}
    assert found.float_bytes == 2 * 70_553_706_496
    assert found.kv_cache.nbytes == 80 * 8192 * 2 * 8 * 128 * 2
    assert sum(device.kv_cache for device in found.devices) == found.kv_cache.nbytes
    assert found.largest == ("model.embed_tokens", 128256 * 8192 * 2)
    assert found.transient.layer == "model.layers.0.mlp.down_proj"
    assert os.listdir(tmp_path) == ["config.json"]
    assert "no weight files" in " ".join(found.notes)


def test_a_config_is_planned_for_an_auto_class():
    config = llama_config()
    found = plan(config, QuantoConfig("int4"), auto_class=tf.AutoModelForCausalLM)
    assert found.model == "LlamaForCausalLM"
    assert found.nbytes == plan(config, QuantoConfig("int4"), auto_class=tf.LlamaForCausalLM).nbytes
    assert plan(config, QuantoConfig("int4"), auto_class=tf.AutoModel).model == "LlamaModel"


def test_a_folder_of_a_type_that_only_its_class_knows_is_planned(tmp_path):
    # Bark's models are saved one by one, and AutoConfig knows the whole only
    config = tf.models.bark.BarkSemanticConfig(
        input_vocab_size=96, output_vocab_size=96, num_layers=2, num_heads=4, hidden_size=64, block_size=32
    )
    tf.BarkSemanticModel(config).save_pretrained(tmp_path)
    found = plan(tmp_path, QuantoConfig("int4"), auto_class=tf.BarkSemanticModel)
    model = tf.BarkSemanticModel.from_pretrained(tmp_path, quantization_config=QuantoConfig("int4"))
    assert found.nbytes == model.get_memory_footprint()


def test_nothing_is_written_and_no_weight_is_read(llama, tmp_path):
    """The data of the file is cut out: only its header is there."""
    shutil.copytree(llama, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    size, length = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "rb+") as handle:
        handle.truncate(8 + length)
        handle.truncate(size)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    planned = plan(tmp_path / "model", QuantoConfig("int4"), "1GiB")
    assert rows(planned.report) == rows(plan(llama, QuantoConfig("int4"), "1GiB").report)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()} == before


def test_the_result_is_a_table_and_json(llama):
    found = plan(llama, QuantoConfig("int4"), {0: 80_000, "cpu": "1GiB"})
    text = str(found)
    assert "device 0" in text and "cpu" in text and "largest layer: model.embed_tokens" in text
    assert (
        "Embedding is quantized only with embeddings='int8' or the like, or where a pattern names it" in text
        and "It does not fit" in text
    )
    made = json.loads(json.dumps(found.to_dict()))
    assert made["fits"] is False and made["weights"] == "int4"
    assert [device["device"] for device in made["devices"]] == [0, "cpu"]
    assert sum(item["nbytes"] for item in made["left_in_float"]) == sum(r.nbytes for r in found.report.rows if r.reason)
    assert made["kv_cache"]["context"] == 4096


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("size", ["6 apples", "", "-1GiB", -5, 1.5, True, "GiB", ["1GiB"]], ids=repr)
def test_a_bad_size_is_refused(size):
    with pytest.raises(ValueError, match="is not a size; give a number of bytes, or one such as '6GiB'"):
        plan(quanto_hf.tiny_lm(), None, size)


@pytest.mark.parametrize("given", [{"gpu": "1GiB"}, {-1: "1GiB"}, {True: 5}, {}], ids=repr)
def test_a_bad_device_is_refused(given):
    with pytest.raises(ValueError, match="device"):
        plan(quanto_hf.tiny_lm(), None, given)


def test_sizes_are_read():
    given = {0: "1KiB", 1: "1.5KB", "cpu": 7}
    assert read_max_memory(given) == {0: 1024, 1: 1500, "cpu": 7}
    assert given[0] == "1KiB"


@pytest.mark.parametrize("values", [{"context": -1}, {"context": 1.5}, {"batch": -1}, {"context": True}], ids=str)
def test_a_bad_number_is_refused(values):
    with pytest.raises(ValueError, match="give 0 or more"):
        plan(quanto_hf.tiny_lm(), **values)


def test_a_bad_map_dtype_or_type_is_refused(llama):
    with pytest.raises(ValueError, match="device_map='everywhere' is not known"):
        plan(llama, device_map="everywhere")
    with pytest.raises(ValueError, match="dtype"):
        plan(llama, dtype="bfloat17")
    with pytest.raises(ValueError, match="int is not a model: give a folder"):
        plan(5)


def test_what_is_not_a_model_is_refused(tmp_path, llama):
    with pytest.raises(CheckpointError, match="it has no config"):
        plan(tmp_path)
    with pytest.raises(ValueError, match="is not a folder with a model"):
        plan(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="names no class"):
        plan(tmp_path)


def test_a_damaged_or_missing_file_is_named(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        plan(tmp_path / "cut")
    save("llama", tmp_path / "shards", torch.bfloat16, max_shard_size="40KB")
    gone = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        plan(tmp_path / "shards")


def test_a_wrong_tensor_is_named(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "wrong")
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"wrong shape: model\.layers\.0\.mlp\.up_proj\.weight"):
        plan(tmp_path / "wrong")


def test_a_config_that_contradicts_the_saved_one_is_refused(llama, tmp_path):
    model = tf.LlamaForCausalLM.from_pretrained(llama, quantization_config=QuantoConfig("int8"))
    model.save_pretrained(tmp_path)
    for what in (tmp_path, model):
        with pytest.raises(ValueError, match="quantized already"):
            plan(what, QuantoConfig("int4"))
        assert plan(what, QuantoConfig("int8"), "1GiB").fits


def test_another_method_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized already, with bitsandbytes"):
        plan(tmp_path / "other")


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(llama, monkeypatch):
    """A hub that knows the headers of one model, and has none of it in the cache."""

    def not_cached(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_cached)
    load = tf.AutoConfig.from_pretrained
    monkeypatch.setattr(
        tf.AutoConfig, "from_pretrained", lambda name, **k: load(llama if name == "org/llama" else name, **k)
    )
    return monkeypatch


def headers_of(folder):
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    tensors = {n: TensorInfo(v["dtype"], v["shape"], tuple(v["data_offsets"])) for n, v in header.items()}
    file = SafetensorsFileMetadata({}, tensors)
    return SafetensorsRepoMetadata(
        None, False, dict.fromkeys(tensors, "model.safetensors"), {"model.safetensors": file}
    )


def test_a_hub_model_is_planned_from_what_the_hub_says(hub, llama):
    hub.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: headers_of(llama))
    found = plan("org/llama", QuantoConfig("int4"), "1GiB")
    assert rows(found.report) == rows(plan(llama, QuantoConfig("int4"), "1GiB").report)
    assert found.notes == ()


def test_a_hub_model_of_other_files_is_planned_from_its_config(hub, llama):
    def none(name):
        raise NotASafetensorsRepoError("no safetensors")

    hub.setattr(huggingface_hub, "get_safetensors_metadata", none)
    found = plan("org/llama", QuantoConfig("int4"), "1GiB")
    assert found.nbytes == plan(llama, QuantoConfig("int4"), "1GiB").nbytes
    assert "no weight files" in found.notes[0]


def test_a_hub_model_whose_tensors_do_not_fit_is_refused(hub, llama):
    def wrong(name):
        made = headers_of(llama)
        made.files_metadata["model.safetensors"].tensors["model.layers.0.mlp.up_proj.weight"].shape = [3, 64]
        return made

    hub.setattr(huggingface_hub, "get_safetensors_metadata", wrong)
    with pytest.raises(CheckpointError, match="wrong shape"):
        plan("org/llama", QuantoConfig("int4"))


def test_offline_the_sentence_says_what_to_do(hub):
    def offline(name):
        raise OfflineModeIsEnabled("offline mode is on")

    hub.setattr(huggingface_hub, "get_safetensors_metadata", offline)
    with pytest.raises(ValueError, match=r"not in the cache of the hub, .*offline mode is on; give a folder"):
        plan("org/llama")


def test_a_snapshot_in_the_cache_is_used(llama, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: str(llama))
    assert plan("org/llama", QuantoConfig("int4"), "1GiB").notes == ()


# ------------------------------------------------------------------------------------ the others, where it does not fit


@pytest.mark.parametrize(
    "config",
    [
        QuantoConfig("int4", overrides={"*.down_proj": {"symmetric": False}}),
        QuantoConfig("int4", overrides={"*.down_proj": {"fit": "hqq"}, "up_proj": {"group_size": 32}}),
        QuantoConfig("aqlm-1x4", overrides={"*.down_proj": {"group_size": 16}}),
        QuantoConfig("nf4", fit="absmax", group_size=64, overrides={"*.down_proj": {"fit": "minmax"}}),
        QuantoConfig("int4", activations="int8", static_activations=True),
        QuantoConfig("int4", qat=True, learn_scales=False),
    ],
    ids=str,
)
def test_values_that_are_for_the_type_that_was_asked_for_do_not_stop_the_others(config, tmp_path):
    found = plan(save("llama", tmp_path), config, "1KiB")
    assert set(found.others) == {"int8", "int4", "int2"} - {config.weights}
    assert found.verdict().startswith("It does not fit")


def test_overrides_that_name_a_type_go_on_to_count_in_the_others(tmp_path):
    folder = save("llama", tmp_path)
    # the first pattern that matches counts, and one without a type is of the type that is tried
    overrides = {"layers.0": {"symmetric": True}, "*.down_proj": {"weights": None}}
    found = plan(folder, QuantoConfig("int4", overrides=overrides), "1KiB")
    kept = QuantoConfig("int8", overrides={"layers.0": {}, "*.down_proj": {"weights": None}})
    assert found.others["int8"] == (plan(folder, kept, "1KiB").nbytes, False)


def test_what_an_aqlm_config_leaves_float_is_float_in_the_others_too(tmp_path):
    folder = save("llama", tmp_path)
    names = ["lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1"]
    config = AqlmConfig(num_codebooks=1, nbits_per_codebook=4, linear_weights_not_to_quantize=names)
    found = plan(folder, config, "1KiB")
    same = QuantoConfig("int8", modules_to_not_convert=["layers.0.mlp.down_proj", "layers.1"])
    assert found.others["int8"][0] == plan(folder, same).nbytes != plan(folder, QuantoConfig("int8")).nbytes


def test_a_dequantized_model_fits_with_no_other_type(tmp_path):
    folder = save("llama", tmp_path)
    found = plan(folder, QuantoConfig("int8", dequantize=True), "1KiB")
    assert {nbytes for nbytes, _ in found.others.values()} == {found.nbytes}
