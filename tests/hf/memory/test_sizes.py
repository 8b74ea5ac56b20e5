"""Planned bytes are the bytes after loading, and device maps are made of them."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny_models import TINY, llama_config, qlinears, save, tokens
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.integrations import accelerate as maps
from transformers.integrations.accelerate import _get_device_map, compute_module_sizes
from turns import in_turn

from quanto_hf import QLinear, QuantoConfig, plan
from quanto_hf.fit.aqlm import loops
from quanto_hf.hf.load.loading import quantize_into
from quanto_hf.hf.memory.sizes import largest_transient
from quanto_hf.hf.memory.skeleton import build_skeleton
from quanto_hf.ops import quantize_op
from quanto_hf.ops.scratch import free
from quanto_hf.schemes import make_scheme

SCHEMES = {
    "int8": {"weights": "int8"},
    "int8-groups": {"weights": "int8", "group_size": 32},
    "int4": {"weights": "int4"},
    "int4-symmetric-rows": {"weights": "int4", "symmetric": True, "group_size": -1},
    "int2": {"weights": "int2"},
    "float8": {"weights": "float8"},
    "nf4": {"weights": "nf4"},
    "fp4": {"weights": "fp4"},
    "int8-activations": {"weights": "int8", "activations": "int8"},
    "int4-heads-too": {"weights": "int4", "default_skips": False},
    "int4-skips": {
        "weights": "int4",
        "modules_to_not_convert": ["*.0.*"],
        "overrides": {"*fc2": {"weights": "int8"}, "*k_proj": {"weights": None}},
    },
    "dequantized": {"weights": "int4", "dequantize": True},
}
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("auto", "balanced", "balanced_low_0", "sequential")

# an odd width, and layers with a window
MORE = {
    "llama-odd": lambda: tf.LlamaForCausalLM(llama_config(intermediate_size=77)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=8, max_position_embeddings=64,
        )
    ),
    "deepseek-v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, n_shared_experts=1, moe_intermediate_size=32, kv_lora_rank=16, q_lora_rank=24,
            qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, max_position_embeddings=64,
        )
    ),
    "llama-classifier": lambda: tf.LlamaForSequenceClassification(llama_config(num_labels=3)),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of the bfloat16 checkpoint of an architecture, made once, and its class."""
    made = {}

    def folder(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            if name in TINY:
                made[name] = save(name, place, torch.bfloat16), TINY[name].cls
            else:
                model = MORE[name]().to(torch.bfloat16)
                model.save_pretrained(place)
                made[name] = place, type(model)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def _no_word_about_devices_that_are_not_there(caplog):
    caplog.set_level(logging.ERROR, logger="accelerate")


def planned(skeleton):
    """Bytes of every module of an empty model, as transformers counts them."""
    sizes, _ = compute_module_sizes(skeleton.model, skeleton.quantizer)
    return {name: size for name, size in sizes.items() if size}


def after_loading(model):
    """Bytes of every module of a loaded model; a shared tensor counts once."""
    sizes, _ = compute_module_sizes(model)
    return {name: size for name, size in sizes.items() if size}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, scheme", in_turn([*TINY, *MORE], list(SCHEMES), 5))
def test_planned_bytes_of_every_module_are_those_after_loading(name, scheme, checkpoint, tmp_path):
    folder, cls = checkpoint(name)
    config = QuantoConfig(**SCHEMES[scheme])
    fresh = build_skeleton(str(folder), config, auto_class=cls)
    model = cls.from_pretrained(folder, quantization_config=config)
    table = planned(fresh)
    assert table == after_loading(model)
    assert table[""] == model.get_memory_footprint()
    if config.dequantize:
        return
    model.save_pretrained(tmp_path)
    saved = build_skeleton(str(tmp_path), None, auto_class=cls)
    assert saved.quantizer.pre_quantized
    assert planned(saved) == table == after_loading(cls.from_pretrained(tmp_path))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["llama", "t5", "clip", "bert"])
def test_planned_bytes_are_exact_in_every_dtype(name, dtype, checkpoint, tmp_path):
    # T5 keeps a layer in float32 when it is loaded in float16
    folder, cls = checkpoint(name)
    config = QuantoConfig(weights="int4")
    model = cls.from_pretrained(folder, quantization_config=config, dtype=dtype)
    assert planned(build_skeleton(str(folder), config, dtype, cls)) == after_loading(model)
    # quantized in bfloat16, in which everything is quantized, and loaded in another dtype
    cls.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path)
    reloaded = cls.from_pretrained(tmp_path, dtype=dtype)
    assert planned(build_skeleton(str(tmp_path), None, dtype, cls)) == after_loading(reloaded)
    for layer in qlinears(reloaded).values():
        assert {part: t.dtype for part, t in layer.tensors().items()} == {
            "packed": torch.uint8, "scale": torch.bfloat16, "zero": torch.bfloat16,
        }  # fmt: skip


def test_a_dequantized_reload_counts_as_float(checkpoint, tmp_path):
    folder, cls = checkpoint("llama")
    cls.from_pretrained(folder, quantization_config=QuantoConfig(weights="int4")).save_pretrained(tmp_path)
    config = QuantoConfig(weights="int4", dequantize=True)
    model = cls.from_pretrained(tmp_path, quantization_config=config)
    assert planned(build_skeleton(str(tmp_path), config, auto_class=cls)) == after_loading(model)
    assert not qlinears(model)


def test_a_head_that_is_not_in_the_checkpoint_counts_as_float(tmp_path):
    base = tf.LlamaModel(llama_config()).to(torch.bfloat16)
    base.save_pretrained(tmp_path)
    config = QuantoConfig(weights="int8", default_skips=False)
    with pytest.warns(UserWarning, match="lm_head is not in the checkpoint"):
        skeleton = build_skeleton(str(tmp_path), config, auto_class=tf.LlamaForCausalLM)
    with pytest.warns(UserWarning, match="lm_head is not in the checkpoint"):
        model = tf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert planned(skeleton) == after_loading(model)


# ------------------------------------------------------------------------------------------------------ device maps


@pytest.fixture(scope="module")
def modes(checkpoint, tmp_path_factory):
    """Skeletons of a model of 6 layers, on the fly and pre-quantized, and its class."""
    place = tmp_path_factory.mktemp("six")
    model = tf.LlamaForCausalLM(llama_config(num_hidden_layers=6)).to(torch.bfloat16)
    model.save_pretrained(place / "float")
    cls = type(model)
    made = {}
    for scheme in ("int8", "int4", "float8"):
        config = QuantoConfig(weights=scheme)
        cls.from_pretrained(place / "float", quantization_config=config).save_pretrained(place / scheme)
        made[scheme] = build_skeleton(str(place / "float"), config), build_skeleton(str(place / scheme), None)
    return made


def the_map(skeleton, mode, memory):
    return dict(_get_device_map(skeleton.model, mode, dict(memory), skeleton.quantizer))


def with_room(memory, nbytes):
    """More memory on the accelerators."""
    return {d: size + nbytes if isinstance(d, int) else size for d, size in memory.items()}


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
@pytest.mark.parametrize("mode", MODES)
def test_maps_of_cpu_and_disk_are_the_same_in_both_modes(mode, scheme, modes):
    fresh, saved = modes[scheme]
    total = planned(saved)[""]
    for share in (0.2, 0.5, 0.9, 1.0, 2.0):
        memory = {"cpu": int(share * total)}
        assert the_map(fresh, mode, memory) == the_map(saved, mode, memory)


@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
@pytest.mark.parametrize("mode", MODES)
def test_a_map_over_accelerators_leaves_the_transient_and_nothing_else(mode, scheme, modes, monkeypatch):
    fresh, saved = modes[scheme]
    total, transient = planned(saved)[""], fresh.quantizer.transient.nbytes
    assert transient > 0 == saved.quantizer.transient.nbytes
    balance = maps.get_balanced_memory
    # the transient is on top of what balancing gives to a device, as it is of what the user gives
    monkeypatch.setattr(
        maps, "get_balanced_memory", lambda *a, hf_quantizer=None, **k: with_room(
            balance(*a, hf_quantizer=hf_quantizer, **k), 0 if hf_quantizer.pre_quantized else transient
        ),
    )  # fmt: skip
    for share in (0.3, 0.5, 0.7, 1.5):
        memory = {0: int(share * total), 1: int(share * total), "cpu": int(0.4 * total), "disk": 10**12}
        given = with_room(memory, transient) if mode == "sequential" else memory
        assert the_map(fresh, mode, given) == the_map(saved, mode, memory)


@pytest.mark.parametrize("device", [0, "mps", "cpu"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
def test_a_model_that_fits_to_the_byte_is_not_spilled(scheme, device, modes):
    for skeleton in modes[scheme]:
        need = planned(skeleton)[""] + (0 if device == "cpu" else skeleton.quantizer.transient.nbytes)
        assert set(the_map(skeleton, "auto", {device: need}).values()) == {device}
        assert "disk" in the_map(skeleton, "auto", {device: need - 1}).values()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
def test_sizes_in_words_and_numbers_give_the_same_map(mode, scheme, modes):
    for skeleton in modes[scheme]:
        room = skeleton.quantizer.transient.nbytes / 2**20 + 0.12
        words, numbers = {0: f"{room}MiB", "cpu": "0.0625MiB"}, {0: int(room * 2**20), "cpu": 2**16}
        assert the_map(skeleton, mode, words) == the_map(skeleton, mode, numbers)
        assert len(set(the_map(skeleton, mode, words).values())) > 1


def test_adjusting_leaves_cpu_disk_and_pre_quantized_models_alone(modes):
    fresh, saved = modes["int4"]
    given = {0: "1.5GiB", 1: 2**30 + 0.5, 2: 7, "mps": "1GB", "cpu": "1MiB", "disk": 5}
    before, transient = copy.deepcopy(given), fresh.quantizer.transient.nbytes
    sizes = {0: 3 << 29, 1: 2**30 + 0.5, 2: 7, "mps": 10**9, "cpu": 2**20, "disk": 5}
    assert saved.quantizer.adjust_max_memory(given) == sizes
    lowered = {0: sizes[0] - transient, 1: sizes[1] - transient, 2: 0, "mps": sizes["mps"] - transient}
    assert fresh.quantizer.adjust_max_memory(given) == {**sizes, **lowered}
    assert given == before


@pytest.mark.parametrize("mode", ["auto", "sequential", "cpu", {"": "cpu"}, None])
@pytest.mark.parametrize("scheme", ["int8", "int4", "float8"])
def test_real_models_go_where_the_map_says_and_answer_the_same(scheme, mode, checkpoint, tmp_path):
    folder, cls = checkpoint("llama")
    config = QuantoConfig(weights=scheme)
    resident = cls.from_pretrained(folder, quantization_config=config)
    resident.save_pretrained(tmp_path / "saved")
    wanted = resident(tokens()).logits
    total = resident.get_memory_footprint()
    for place, given in ((folder, config), (tmp_path / "saved", None)):
        extra = {"quantization_config": given} if given else {}
        if mode in ("auto", "sequential"):
            extra |= {"max_memory": {"cpu": int(0.8 * total)}, "offload_folder": tmp_path / f"off-{place.name}"}
        model = cls.from_pretrained(place, device_map=mode, **extra)
        if mode in ("auto", "sequential"):
            skeleton = build_skeleton(str(place), given)
            assert model.hf_device_map == the_map(skeleton, mode, {"cpu": int(0.8 * total)})
            assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        assert torch.equal(model(tokens()).logits, wanted)


# ---------------------------------------------------------------------------------------------------- the transient


def test_the_transient_is_that_of_the_largest_layer_that_is_quantized(checkpoint):
    folder, _ = checkpoint("llama")
    skeleton = build_skeleton(str(folder), QuantoConfig(weights="int8"))
    found = skeleton.quantizer.transient
    assert found.layer == "model.layers.0.mlp.down_proj"
    assert found.nbytes >= 128 * 64 * 2
    skipped = build_skeleton(str(folder), QuantoConfig(weights="int8", modules_to_not_convert=["mlp"]))
    assert skipped.quantizer.transient.layer == "model.layers.0.self_attn.q_proj"
    assert skipped.quantizer.transient.nbytes < found.nbytes
    wide = build_skeleton(str(folder), QuantoConfig(weights="int8"), "float32").quantizer.transient
    assert wide.nbytes - found.nbytes == 128 * 64 * 2


def measured_peak(work):
    """Most bytes that torch had allocated at a time."""
    free()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    free()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("shape", [(512, 1024), (2048, 2048), (640, 4096), (1024, 777), (8, 40000)], ids=str)
@pytest.mark.parametrize("weights", ["int8", "float8", "int4", "nf4", "int2", "int4-hqq", "int8-mse", "int4-minmax"])
def test_quantizing_a_layer_in_torch_takes_no_more_than_the_transient(weights, shape, monkeypatch):
    monkeypatch.setattr(quantize_op, "kernels", [])
    kind, _, fit = weights.partition("-")
    scheme = make_scheme(kind)
    skeleton = nn.Sequential(QLinear(shape[1], shape[0], False, scheme=scheme, device="meta", dtype=torch.bfloat16))
    layer, weight = skeleton[0], torch.randn(shape, dtype=torch.bfloat16)
    layer.fit = fit or None
    layer._parameters["weight"] = nn.Parameter(weight.to("meta"), requires_grad=False)
    planned = largest_transient(skeleton, torch.bfloat16, []).nbytes
    stored = scheme.nbytes(shape, torch.bfloat16)
    real = measured_peak(lambda: quantize_into(layer, weight, "weight")) - stored + weight.nbytes
    assert real <= planned <= real + (28 << 20)


@pytest.mark.parametrize("shape", [(512, 512), (64, 1024)], ids=str)
@pytest.mark.parametrize("weights", ["aqlm-2x3", "aqlm-1x8"])
def test_making_an_aqlm_layer_takes_about_the_transient(weights, shape, monkeypatch):
    monkeypatch.setattr(loops, "runs_native", lambda device: False)
    scheme = make_scheme(weights)
    skeleton = nn.Sequential(QLinear(shape[1], shape[0], False, scheme=scheme, device="meta", dtype=torch.bfloat16))
    layer, weight = skeleton[0], torch.randn(shape, dtype=torch.bfloat16)
    layer._parameters["weight"] = nn.Parameter(weight.to("meta"), requires_grad=False)
    planned = largest_transient(skeleton, torch.bfloat16, [])
    real = measured_peak(lambda: quantize_into(layer, weight, "weight")) + weight.nbytes
    assert planned.layer == planned.cpu_layer == "0"
    assert planned.nbytes == pytest.approx(real, rel=0.2)


AQLM_CHILD = """
import sys, threading, time
import torch, transformers, quanto_hf
from quanto_hf import QuantoConfig

torch.set_num_threads(2)

def anonymous():
    # without the pages of mapped files
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=QuantoConfig("aqlm-2x2")
    )

# what is imported and checked at the first load is no part of the model
load(sys.argv[2])
peak, stop = [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1])
stop.set()
thread.join()
print(peak[0] - before - model.get_memory_footprint())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_loading_to_aqlm_on_the_cpu_takes_what_the_plan_says_and_a_map_leaves_it(tmp_path):
    for name, shape in (("large", {"hidden_size": 512, "intermediate_size": 2048}), ("tiny", {})):
        config = llama_config(num_hidden_layers=1, **shape)
        tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", AQLM_CHILD, str(tmp_path / "large"), str(tmp_path / "tiny")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    planned = plan(tmp_path / "large", QuantoConfig("aqlm-2x2"), device_map="cpu")
    (cpu,) = planned.devices
    # five copies of a layer in float32, and codes
    assert cpu.transient == planned.transient.cpu_nbytes > 20 * 512 * 2048
    assert planned.transient.cpu_layer == "model.layers.0.mlp.gate_proj"
    assert f"on the CPU takes {cpu.transient:,} bytes" in str(planned)
    assert cpu.transient == pytest.approx(int(done.stdout), rel=0.2)

    skeleton = build_skeleton(str(tmp_path / "large"), QuantoConfig("aqlm-2x2"))
    assert skeleton.quantizer.adjust_max_memory({"cpu": "1GB", "disk": 5}) == {"cpu": 10**9 - cpu.transient, "disk": 5}
    need = planned.nbytes + cpu.transient
    assert set(the_map(skeleton, "auto", {"cpu": need}).values()) == {"cpu"}
    assert "disk" in the_map(skeleton, "auto", {"cpu": need - 1}).values()
    assert plan(tmp_path / "large", QuantoConfig("aqlm-2x2"), need, device_map="cpu", context=0).fits
    assert not plan(tmp_path / "large", QuantoConfig("aqlm-2x2"), need - 1, device_map="cpu", context=0).fits
