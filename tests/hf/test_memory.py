"""Loading on the fly never needs much more memory than the quantized model takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

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


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_peak_is_the_quantized_model_and_little_more(weights, checkpoints):
    large, tiny, largest = checkpoints
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(large), weights, str(tiny)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    print(weights, {name: f"{value / MB:.0f} MB" for name, value in measured.items()}, f"largest {largest / MB:.0f} MB")
    # the float model has 220 MB: were it held as a whole at any time, this would fail
    assert measured["peak"] <= measured["footprint"] + 2 * largest + 100 * MB
    assert measured["after"] <= 1.1 * measured["footprint"] + 20 * MB
