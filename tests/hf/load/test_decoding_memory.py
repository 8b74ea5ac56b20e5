"""Loading an encoded mixture of experts takes the packed model and a few float experts: never a layer of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from encoded_models import deepseek, gpt_oss
from safetensors.torch import save_file

MB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")

# Anonymous memory only: pages of mapped files belong to the page cache.
CHILD = """
import json, sys, threading, time
import torch, transformers, quanto_hf

torch.set_num_threads(2)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def load(folder):
    config = quanto_hf.QuantoConfig("int4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

# what is imported and compiled at the first load is no part of the model
load(sys.argv[2])
peak, stop = [0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1])
peak[0] = max(peak[0], anonymous())
stop.set()
thread.join()
print(json.dumps({"peak": peak[0] - before, "footprint": model.get_memory_footprint()}))
"""

EXPERTS, HIDDEN, INNER = 24, 1024, 1024


def large(folder, tiny):
    """A model like a tiny one with a layer of larger experts, of random codes."""
    kind = "gpt_oss" if (config := tf.AutoConfig.from_pretrained(tiny)).model_type == "gpt_oss" else "deepseek"
    config.hidden_size, config.num_hidden_layers = HIDDEN, 1
    with torch.device("meta"):
        if kind == "gpt_oss":
            config.intermediate_size, config.num_local_experts, config.layer_types = INNER, EXPERTS, ["full_attention"]
            model = tf.GptOssForCausalLM(config)
        else:
            config.moe_intermediate_size, config.n_routed_experts, config.first_k_dense_replace = INNER, EXPERTS, 0
            model = tf.DeepseekV3ForCausalLM(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            tensors[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02)
        elif kind == "gpt_oss":
            _, columns, rows = tensor.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((EXPERTS, rows, columns // 32), 121, dtype=torch.uint8)
        else:
            for number in range(EXPERTS):
                for part in ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",):
                    shape = (INNER, HIDDEN) if part != "down_proj" else (HIDDEN, INNER)
                    codes = torch.randint(0, 0x7E, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
                    tensors[f"{stem}.{number}.{part}.weight"] = codes
                    factors = torch.full((shape[0] // 128, shape[1] // 128), 0.01)
                    tensors[f"{stem}.{number}.{part}.weight_scale_inv"] = factors
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_experts_are_decoded_and_quantized_one_at_a_time(name, tmp_path):
    tiny = {"gpt_oss": gpt_oss, "deepseek": deepseek}[name](tmp_path / "tiny")
    (tmp_path / "large").mkdir()
    folder = large(tmp_path / "large", tiny)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(tiny)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    expert = 3 * HIDDEN * INNER * 2
    print(name, {key: f"{value / MB:.0f} MB" for key, value in measured.items()}, f"expert {expert / MB:.0f} MB")
    # a layer of float experts has 144 MB
    assert measured["footprint"] < 50 * MB < EXPERTS * expert - 90 * MB
    assert measured["peak"] <= measured["footprint"] + 2 * expert + 30 * MB
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
