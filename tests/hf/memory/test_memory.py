"""Loading on the fly never needs much more memory than the quantized model, and a loaded model takes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from aqlm_models import Layout, linears
from forked import MODELS, Program, run_all
from safetensors.torch import save_file
from tiny_models import llama_config

MB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")

# Anonymous memory only: pages of mapped shards belong to the page cache and can be dropped at any time.
CHILD = """
import json, sys, threading, time
import torch, transformers, quanto_hf
from quanto_hf import QuantoConfig

torch.set_num_threads(2)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", quantization_config=QuantoConfig(weights=sys.argv[2])
    )

# what is imported and compiled at the first load is no part of the model
load(sys.argv[3])
peak, stop = [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1])
peak[0] = max(peak[0], anonymous())
stop.set()
thread.join()
print(json.dumps({"peak": peak[0] - before, "after": anonymous() - before, "footprint": model.get_memory_footprint()}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a model of about 200 MB in several shards, and of a tiny one; and the bytes of the largest tensor."""
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("memory")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    # the rotary frequencies, which to_empty has left without values, are not saved
    model.save_pretrained(place / "large", max_shard_size="60MB")
    sizes = [parameter.nbytes for parameter in model.parameters()]
    assert sum(sizes) > 200 * MB and len(list((place / "large").glob("*.safetensors"))) >= 4
    tiny = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(tiny).to(torch.bfloat16).save_pretrained(place / "tiny")
    yield place / "large", place / "tiny", max(sizes)
    for file in place.rglob("*.safetensors"):
        file.unlink()


@pytest.fixture(scope="module")
def loads(checkpoints):
    """What became of the program for each number type, and the bytes of the largest tensor."""
    large, tiny, largest = checkpoints
    types = ("int8", "int4")
    programs = [Program(CHILD, arguments=[str(large), weights, str(tiny)]) for weights in types]
    done = run_all(programs, MODELS, environment={**os.environ, "HF_HUB_OFFLINE": "1"})
    return dict(zip(types, done, strict=True)), largest


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_peak_is_the_quantized_model_and_little_more(weights, loads):
    done, largest = loads[0][weights], loads[1]
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(weights, {name: f"{value / MB:.0f} MB" for name, value in measured.items()}, f"largest {largest / MB:.0f} MB")
    # the float model has 220 MB: were it held as a whole at any time, this would fail
    assert measured["peak"] <= measured["footprint"] + 2 * largest + 100 * MB
    assert measured["after"] <= 1.1 * measured["footprint"] + 20 * MB


# Mapped pages count here: the codes are used where they lie in the file.
RESIDENT = """
import json, sys
import torch, transformers, quanto_hf

torch.set_num_threads(2)
quanto_hf.install(override="aqlm")

def status(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

@torch.no_grad()
def run(model):
    # one row, by tables; a few, by gathers; many, by panels of dequantized weights
    for length in (1, 3, 64):
        model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False)

def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

# what is imported, checked and started at first is no part of the model
run(load(sys.argv[2]))
before = status("VmRSS")
model = load(sys.argv[1])
loaded = status("VmRSS") - before
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
run(model)
stated = quanto_hf.report(model)
codes = [row for row in stated.rows if row.stored.startswith("aqlm")]
print(json.dumps({
    "loaded": loaded, "used": status("VmRSS") - before, "peak": status("VmHWM") - before, "stated": stated.nbytes,
    "quantized": sum(row.nbytes for row in codes), "dense": max(2 * row.shape[0] * row.shape[1] for row in codes),
}))
"""


def write_random(folder, layout, **shape):
    """A checkpoint in the published format of AQLM, made of random tensors; no float weight is ever there."""
    config = llama_config(**shape)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {name: torch.rand(tensor.shape).half() for name, tensor in model.state_dict().items() if "proj" not in name}
    kept = list(state)
    for name, layer in linears(model):
        made = layout.tensors(layer.out_features, layer.in_features)
        state.update({f"{name}.{part}": t if part == "codes" else t.half() for part, t in made.items()})
    quantization = {"quant_method": "aqlm", **layout.config(), "linear_weights_not_to_quantize": kept}
    saved = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**saved, "quantization_config": quantization}))
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_b7_an_aqlm_model_takes_its_stated_bits_and_no_dense_weight_is_kept(tmp_path):
    layout = Layout(2, 8)
    large = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16,
             "num_key_value_heads": 16}  # fmt: skip
    write_random(tmp_path / "large", layout, **large)
    write_random(tmp_path / "tiny", layout)
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(tmp_path / "large"), str(tmp_path / "tiny")],
        capture_output=True, text=True, timeout=300,
        # activations go back to the system; else glibc keeps 5 MB of them
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    (tmp_path / "large" / "model.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print({name: f"{value / MB:.1f} MB" for name, value in measured.items()})
    stated = measured["stated"]
    # 2.02 bits for each of 268 M weights; were one layer kept dense, in 16 bits, it would be half as much again
    assert measured["quantized"] > 60 * MB and measured["dense"] > 0.4 * stated
    assert measured["loaded"] <= 1.05 * stated
    # all pages have been read by now
    assert 0.95 * stated <= measured["used"] <= 1.05 * stated
    # nor is one made for a while: 64 rows take 4 MB
    assert measured["peak"] <= stated + 0.25 * measured["dense"]
