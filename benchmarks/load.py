"""Load time and peak memory of ``from_pretrained``, on the fly and reloaded, each in a process of its own.

    python benchmarks/load.py [--gigabytes 0.8] [--peers]

Makes a random bfloat16 Llama in a temporary folder and loads it in every way, the plain bfloat16 load among them.
``touched`` is the time until every page of every parameter has been read as well: a reload maps the files, and so
reads nothing until the first forward pass. Memory is anonymous memory (RssAnon of /proc/self/status, Linux only)
above what the process had before, against the bound: quantized footprint + 2 x the largest float tensor + 100 MB.
``--peers`` also runs optimum-quanto, torchao and bitsandbytes through transformers, where they are installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WAYS = {
    "bfloat16": "None",
    "int8": 'quanto_hf.QuantoConfig("int8")',
    "int4 minmax": 'quanto_hf.QuantoConfig("int4", fit="minmax")',
    "int4": 'quanto_hf.QuantoConfig("int4")',
    "int2": 'quanto_hf.QuantoConfig("int2")',
    "nf4": 'quanto_hf.QuantoConfig("nf4")',
    "float8": 'quanto_hf.QuantoConfig("float8")',
}
PEERS = {
    "optimum-quanto int8": 'transformers.QuantoConfig("int8")',
    "optimum-quanto int4": 'transformers.QuantoConfig("int4")',
    "bitsandbytes nf4": "transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')",
    "torchao int8": "transformers.TorchAoConfig(__import__('torchao').quantization.Int8WeightOnlyConfig())",
}
RELOADED = ("int8", "int4", "int2")

PROBE = """
import json, sys, threading, time
import torch, transformers
if sys.argv[4] == "ours":
    import quanto_hf
from transformers.models.llama.modeling_llama import LlamaForCausalLM
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
config = eval(sys.argv[2])
LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1))
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=config)
seconds = time.perf_counter() - start
done = True
for parameter in model.parameters():
    parameter.detach().contiguous().view(-1).view(torch.uint8)[::4096].sum()
touched = time.perf_counter() - start
thread.join()
if sys.argv[3]:
    model.save_pretrained(sys.argv[3])
footprint = model.get_memory_footprint()
print(json.dumps({"seconds": seconds, "touched": touched, "peak": peak - before, "footprint": footprint}))
"""


def make_model(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Save a random Llama; returns its bytes and those of its largest tensor."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, vocab = 2048, 5632, 8192
    per_layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 4 + 3 * hidden * ffn)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocab * hidden) / per_layer))
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="400MB")
    sizes = [p.numel() * 2 for p in model.parameters()]
    return sum(sizes), max(sizes)


def probe(model: Path, config: str, save: Path | None, ours: bool) -> dict[str, float]:
    """Load in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE, str(model), config, str(save or ""), "ours" if ours else ""]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{config}:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.8)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float"
        total, largest = make_model(source, args.gigabytes)
        print(f"{total / 1e9:.2f} GB of bfloat16, largest tensor {largest / 1e6:.0f} MB")
        print(
            f"{'way':22}{'seconds':>9}{'touched':>9}{'s per GB':>10}{'footprint MB':>14}{'peak MB':>9}{'bound MB':>10}"
        )
        for name, config in WAYS.items():
            saved = Path(folder) / name if name in RELOADED else None
            row(name, probe(source, config, saved, True), total, largest)
            if saved is not None:
                row(f"{name}, reloaded", probe(saved, "None", None, True), total, largest)
        if args.peers:
            for name, config in PEERS.items():
                try:
                    row(name, probe(source, config, None, False), total, largest)
                except SystemExit as error:
                    print(f"{name:22}  does not run: {str(error).strip().splitlines()[-1][:120]}")


def row(name: str, result: dict[str, float], total: int, largest: int) -> None:
    bound = result["footprint"] + 2 * largest + 100e6
    seconds = (result["seconds"], result["seconds"] / total * 1e9, result["touched"])
    megabytes = (result["footprint"] / 1e6, result["peak"] / 1e6, bound / 1e6)
    print(f"{name:22}" + "".join(f"{v:14.2f}" for v in seconds) + "".join(f"{v:14.1f}" for v in megabytes), flush=True)


if __name__ == "__main__":
    main()
