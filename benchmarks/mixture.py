"""A mixture of experts: memory while it loads, and speed beside the float model.

    python benchmarks/mixture.py [--gigabytes 1.5] [--weights int4 int8]

Makes a random Mixtral in bfloat16 in a temporary folder, once with a tensor for each expert, as the published files
have it, and once with fused ones. ``peak`` is that of anonymous memory (RssAnon of /proc/self/status, Linux only) while
loading, above what the process had before; pages of mapped files can be given back and do not count. ``over`` is the
peak without what the loaded model takes, in float experts (a gate, up and down projection). Then, in one process and in
turns, each with the ratio of its median time to that of the float model (above 1 is faster): ``token`` is one step of
decoding behind a prompt of 32, ``prompt`` a prompt of 512 tokens. ``disk`` is the quantized model with 80 % of its
experts on disk and a warm page cache, beside the one in memory (time over time).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INNER, VOCABULARY, EXPERTS = 1024, 3584, 8192, 8

PROBE = """
import json, sys, threading, time
import torch, transformers
import quanto_hf
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
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
cls, config = transformers.MixtralForCausalLM, quanto_hf.QuantoConfig(sys.argv[2])
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
start = time.perf_counter()
model = cls.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=config)
load = time.perf_counter() - start
done = True
thread.join()
print(json.dumps({"load": load, "peak": peak - before, "size": model.get_memory_footprint()}))
"""


def make_model(folder: Path, gigabytes: float) -> int:
    """Save a random Mixtral twice; returns its bytes."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    per_layer = 2 * (EXPERTS * 3 * HIDDEN * INNER + 3 * HIDDEN * HIDDEN)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer)),
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder / "experts", max_shard_size="400MB")
    model.save_pretrained(folder / "fused", max_shard_size="400MB", save_original_format=False)
    return sum(p.numel() * 2 for p in model.parameters())


def load(folder: Path, **options: Any) -> Any:
    import torch
    from transformers import MixtralForCausalLM, logging

    logging.disable_progress_bar()
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def speed(folder: Path, weights: str, rounds: int) -> dict[str, float]:
    """Ratios of times: of the float model to the quantized one, and of the one on disk to the one in memory."""
    import torch

    import quanto_hf

    def took(model: Any, ids: torch.Tensor, cache: Any) -> float:
        start = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=cache is not None)
        return time.perf_counter() - start

    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    prompt, tokens = (torch.randint(3, VOCABULARY, (1, n), generator=generator) for n in (32, 16 * rounds))
    plain, packed = load(folder), load(folder, quantization_config=quanto_hf.QuantoConfig(weights))
    layers = packed.config.num_hidden_layers
    places = {f"model.layers.{n}.mlp.experts": "disk" if n % 5 else "cpu" for n in range(layers)}
    with tempfile.TemporaryDirectory() as off:
        disk = load(
            folder,
            quantization_config=quanto_hf.QuantoConfig(weights),
            device_map=_flat(packed, places),
            offload_folder=off,
        )
        found = {}
        for name, first, second in (("", plain, packed), ("disk ", packed, disk)):
            caches = [model(prompt, use_cache=True).past_key_values for model in (first, second)]
            steps = [
                [took(model, tokens[:, n : n + 1], cache) for model, cache in zip((first, second), caches, strict=True)]
                for n in range(tokens.shape[1])
            ]
            found[f"{name}token"] = statistics.median(a / b for a, b in steps[2:])
            long = torch.randint(3, VOCABULARY, (1, 512), generator=generator)
            pairs = [[took(model, long, None) for model in (first, second)] for _ in range(rounds + 1)]
            found[f"{name}prompt"] = statistics.median(a / b for a, b in pairs[1:])
    return found


def _flat(model: Any, places: dict[str, str]) -> dict[str, str]:
    """A device map of all modules, from that of some."""
    names = [name for name, module in model.named_modules() if not list(module.children())]
    others = [name for name in names if not any(name.startswith(f"{place}.") for place in places)]
    return {**dict.fromkeys(others, "cpu"), **places}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--weights", nargs="+", default=["int4"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        total = make_model(folder, args.gigabytes)
        expert = 2 * 3 * HIDDEN * INNER
        print(f"{total / 1e9:.2f} GB of bfloat16, {expert / 1e6:.1f} MB an expert")
        print(f"{'weights':8}{'files':>10}{'load s':>8}{'model MB':>10}{'peak MB':>9}{'over':>7}")
        for weights in args.weights:
            for files in ("experts", "fused"):
                command = [sys.executable, "-W", "ignore", "-c", PROBE, str(folder / files), weights]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise SystemExit(result.stderr[-2000:])
                r = json.loads(result.stdout.splitlines()[-1])
                over = (r["peak"] - r["size"]) / expert
                print(f"{weights:8}{files:>10}{r['load']:8.2f}{r['size'] / 1e6:10.1f}{r['peak'] / 1e6:9.1f}{over:7.1f}")
        for weights in args.weights:
            found = speed(folder / "experts", weights, args.rounds)
            texts = [f"{name} {1 / ratio if 'disk' in name else ratio:.2f}" for name, ratio in found.items()]
            print(f"{weights}: " + ", ".join(texts))


if __name__ == "__main__":
    main()
