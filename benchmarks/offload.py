"""A model that does not fit: disk offload with the weights kept quantized, beside the same model in memory and beside
bfloat16 through accelerate's hooks. Each way in a process of its own.

    python benchmarks/offload.py [--gigabytes 1.0] [--cpu 200MiB] [--weights int4]

Makes a random bfloat16 Llama in a temporary folder. Every way loads it, decodes a few tokens, and is then timed on a
warm page cache, best of ``--rounds``: ``prompt`` is a forward pass of 32 tokens, ``token`` one of a single token.
Memory is the peak of anonymous memory (RssAnon of /proc/self/status, Linux only) while loading and generating, above
what the process had before; pages of mapped files can be given back and do not count. ``logits`` is a digest: the ways
of one number type have to show the same. ``folder`` is what lies in the offload folder afterwards. The last line has
the model in memory and the one on disk in one process, in turns: the median ratio of their times, which no other
program and no warm clock moves to one side.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from load import make_model

PROBE = """
import hashlib, json, os, pathlib, sys, threading, time
import torch, transformers
import quanto_hf
from transformers.models.llama.modeling_llama import LlamaForCausalLM
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model, options, rounds, save = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
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
if weights := options.pop("weights", None):
    options["quantization_config"] = quanto_hf.QuantoConfig(weights)
ids = torch.randint(3, 8000, (1, 32), generator=torch.Generator().manual_seed(0))
torch.set_grad_enabled(False)
# what the first matrix product and the first generate take once
LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8192, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1)).bfloat16().generate(ids, max_new_tokens=2)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **options)
load = time.perf_counter() - start
loaded.generate(ids, max_new_tokens=4, do_sample=False)
done = True
thread.join()
def best(x):
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        logits = loaded(x).logits
        times.append(time.perf_counter() - start)
    return min(times) * 1e3, logits
prompt, logits = best(ids)
token, _ = best(ids[:, :1])
digest = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()[:8]
if save:
    loaded.save_pretrained(save)
folder = options.get("offload_folder")
files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()] if folder else []
print(json.dumps({"load": load, "peak": peak - before, "prompt": prompt, "token": token, "logits": digest,
    "folder": sum(p.stat().st_size for p in files), "files": len(files)}))
"""

TURNS = """
import json, statistics, sys, time
import torch, transformers
import quanto_hf
from transformers.models.llama.modeling_llama import LlamaForCausalLM
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
model, options, rounds, weights = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_grad_enabled(False)
def load(**more):
    config = quanto_hf.QuantoConfig(weights)
    return LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=config, **more)
ways = [load(), load(**options)]
ids = torch.randint(3, 8000, (1, 32), generator=torch.Generator().manual_seed(0))
def took(way, x):
    start = time.perf_counter()
    way(x)
    return time.perf_counter() - start
found = {}
for name, x, count in (("token", ids[:, :1], 10 * rounds), ("prompt", ids, 2 * rounds)):
    times = [[took(way, x) for way in (ways if turn % 2 else ways[::-1])] for turn in range(count + 2)][2:]
    # every other turn came in the other order
    ratios = [second / first if turn % 2 else first / second for turn, (first, second) in enumerate(times)]
    found[name] = statistics.median(ratios)
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--cpu", default="200MiB", help="max_memory of the CPU")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        total, _ = make_model(folder / "float", args.gigabytes)
        print(f"{total / 1e9:.2f} GB of bfloat16, max_memory {{'cpu': {args.cpu!r}}}")
        quantized = {"weights": args.weights}
        disk = {"device_map": "auto", "max_memory": {"cpu": args.cpu}}
        ways = {
            "bfloat16 in memory": ("float", {}, ""),
            "bfloat16 on disk": ("float", {**disk, "offload_folder": str(folder / "bf16")}, ""),
            f"{args.weights} in memory": ("float", quantized, str(folder / "saved")),
            f"{args.weights} on disk": ("float", {**quantized, **disk, "offload_folder": str(folder / "off")}, ""),
            "  loaded again": ("float", {**quantized, **disk, "offload_folder": str(folder / "off")}, ""),
            "  pre-quantized": ("saved", {**disk}, ""),
        }
        head = f"{'way':20}{'load s':>8}{'peak MB':>9}{'prompt ms':>11}{'token ms':>10}{'logits':>10}{'folder MB':>11}"
        print(head + f"{'files':>7}")
        for name, (model, options, save) in ways.items():
            command = [sys.executable, "-W", "ignore", "-c", PROBE, str(folder / model), json.dumps(options)]
            result = subprocess.run([*command, str(args.rounds), save], capture_output=True, text=True)
            if result.returncode:
                print(f"{name:20}  does not run: {(result.stderr.strip().splitlines() or [''])[-1][:120]}")
                continue
            r = json.loads(result.stdout.splitlines()[-1])
            print(
                f"{name:20}{r['load']:8.2f}{r['peak'] / 1e6:9.1f}{r['prompt']:11.1f}{r['token']:10.1f}"
                f"{r['logits']:>10}{r['folder'] / 1e6:11.1f}{r['files']:7d}",
                flush=True,
            )
        options = json.dumps({**disk, "offload_folder": str(folder / "off")})
        command = [sys.executable, "-W", "ignore", "-c", TURNS, str(folder / "float"), options]
        result = subprocess.run([*command, str(args.rounds), args.weights], capture_output=True, text=True, check=True)
        r = json.loads(result.stdout.splitlines()[-1])
        print(f"{args.weights} on disk / in memory, in turns: token {r['token']:.3f}, prompt {r['prompt']:.3f}")


if __name__ == "__main__":
    main()
