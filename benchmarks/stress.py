"""Many threads that load, quantize, save, reload, train and run different number types at once. Every result has to
have the bits that one thread gives.

    python benchmarks/stress.py [--seconds 600] [--threads 4] [--dtypes float32 bfloat16] [--seed 0]

Makes two random Llamas in a temporary folder for each dtype, one with a head of its own and one whose head is tied to
the embedding, and a quantized checkpoint of each number type. A process with one thread then does every job once: the
digests of its results are what is wanted. In a process that has done nothing yet each thread does jobs in an order of
its own until the time is over. A job is one of these verbs with one of the types; not every type has every verb:

``load``      a float checkpoint with a QuantoConfig: every tensor, and logits
``reload``    a quantized checkpoint
``save``      a load, ``save_pretrained`` into a new folder, and what comes back from there
``disk``      a load with half of the model on disk; the threads share the offload folder
``plain``     quantize, freeze, run and dequantize a torch model
``train``     a step of training of a torch model with rounded weights
``convert``   ``convert_checkpoint`` into a new folder
``plan``      ``plan`` of the float checkpoint
``run``       a model that all threads share

Afterwards a new layer has to be on the CPU and in float32, and transformers has to tie weights as before. Prints how
often each verb was done; the exit status is 1 if any result differs or any job fails.

transformers itself cannot load *float* models in several threads (bfloat16 and tied ones come out wrong); quantized
loads wait for each other where it matters (quanto_hf/hf/load/building.py).
"""

import argparse
import hashlib
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn

import quanto_hf
from quanto_hf import QuantoConfig

TYPES = {
    "int8": QuantoConfig("int8"),
    "int4": QuantoConfig("int4"),
    "int2": QuantoConfig("int2"),
    "nf4": QuantoConfig("nf4"),
    "fp4": QuantoConfig("fp4"),
    "float8": QuantoConfig("float8"),
    "int4-hqq": QuantoConfig("int4", fit="hqq"),
    "int8-int8": QuantoConfig("int8", activations="int8"),
    "int4-int8": QuantoConfig("int4", activations="int8"),
    "aqlm": QuantoConfig("aqlm-1x4", overrides={"mlp": {"weights": None}}),
}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
Job = Callable[[], object]


def make_float(folder: Path, dtype: torch.dtype, tied: bool) -> Path:
    """A random Llama in ``folder``."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def make_plain() -> nn.Module:
    """A random torch model, the same at each call, whatever other threads draw."""
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 33))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            # not the default dtype: another thread may be making a model
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.data = values * 0.1
    return net


def digest(*found: object) -> str:
    """Of all tensors, by name, dtype, shape and bits, and of everything else by its text."""
    made = hashlib.sha256()
    for item in found:
        if isinstance(item, nn.Module):
            item = {**dict(item.named_parameters()), **dict(item.named_buffers())}
        for name, value in sorted(item.items()) if isinstance(item, dict) else [("", item)]:
            if isinstance(value, torch.Tensor):
                made.update(f"{name} {value.dtype} {tuple(value.shape)} {value.device}".encode())
                made.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                made.update(f"{name} {value}".encode())
    return made.hexdigest()


def logits(model: nn.Module) -> torch.Tensor:
    """Of two sentences."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def load(folder: Path, config: QuantoConfig | None = None, **kwargs: object) -> nn.Module:
    """A causal language model."""
    given = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **given, **kwargs)


def jobs_of(name: str, config: QuantoConfig, source: Path, work: Path) -> dict[str, Job]:
    """Verb -> what it does for one number type and one checkpoint, which gives a digest."""
    saved = work / f"{source.name}-{name}"
    if not saved.exists():
        load(source, config).save_pretrained(saved)

    @cache
    def shared() -> nn.Module:
        return load(saved)

    def loaded() -> str:
        model = load(source, config)
        return digest(model, logits(model))

    def reloaded() -> str:
        model = load(saved)
        return digest(model, logits(model))

    def saved_again() -> str:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            load(source, config).save_pretrained(folder)
            model = load(Path(folder))
            return digest(model, logits(model))

    def on_disk() -> str:
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
        model = load(source, config, device_map=places, offload_folder=work / "offload")
        return digest(logits(model))

    def converted() -> str:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            quanto_hf.convert_checkpoint(source, folder, config)
            return digest((Path(folder) / "model.safetensors").read_bytes())

    def planned() -> str:
        found = quanto_hf.plan(source, config, "1GiB", device_map="cpu")
        return digest(found.nbytes, found.modules, found.dtype)

    found = {"load": loaded, "reload": reloaded, "save": saved_again, "run": lambda: digest(logits(shared()))}
    if name != "aqlm":
        found |= {"convert": converted, "plan": planned}
        if "tied" not in source.name:
            found["disk"] = on_disk
    return found


def plain_jobs(name: str, config: QuantoConfig) -> dict[str, Job]:
    """The same for torch models."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    how = {"weights": config.weights, "activations": config.activations, "optimizer": config.fit}

    def plain() -> str:
        net = quanto_hf.freeze(quanto_hf.quantize(make_plain(), **how))
        with torch.no_grad():
            made = net(x)
        return digest(net, made, quanto_hf.dequantize(net))

    def train() -> str:
        net = quanto_hf.quantize(make_plain(), **how)
        net(x).square().sum().backward()
        return digest({n: p.grad for n, p in net.named_parameters()})

    return {"plain": plain} if name == "aqlm" else {"plain": plain, "train": train}


def every_job(work: Path, dtypes: list[str], types: list[str]) -> dict[str, Job]:
    """By name: verb, type and checkpoint."""
    found: dict[str, Job] = {}
    for name in types:
        for dtype in dtypes:
            for tied in (False, True):
                source = work / f"{dtype}{'-tied' * tied}"
                if not source.exists():
                    make_float(source, getattr(torch, dtype), tied)
                for verb, job in jobs_of(name, TYPES[name], source, work).items():
                    found[f"{verb} {name} {source.name}"] = job
        for verb, job in plain_jobs(name, TYPES[name]).items():
            found[f"{verb} {name}"] = job
    return found


def by_one_thread(work: Path, dtypes: list[str], types: list[str]) -> dict[str, str]:
    """The digest of each job, from a process of its own, which fills the folder."""
    command = [sys.executable, __file__, "--one-thread", str(work), "--dtypes", *dtypes, "--types", *types]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    return json.loads(found)


def stress(seconds: float, threads: int, dtypes: list[str], types: list[str], seed: int) -> tuple[Counter, list[str]]:
    """How often each verb was done by the threads, and a sentence for each result that is not that of one thread."""
    done: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = by_one_thread(Path(folder), dtypes, types)
        jobs = every_job(Path(folder), dtypes, types)
        print(f"{len(jobs)} jobs, each done once by one thread", flush=True)
        latest, together = time.monotonic() + seconds, threading.Barrier(threads)

        def work(index: int) -> None:
            order, queue = random.Random(seed * 1000 + index), list[str]()
            together.wait()
            while time.monotonic() < latest:
                if not queue:
                    queue = order.sample(list(jobs), len(jobs))
                name = queue.pop()
                try:
                    if jobs[name]() != wanted[name]:
                        wrong.append(f"{name}: another result than that of one thread")
                except Exception:
                    wrong.append(f"{name}: {traceback.format_exc()}")
                done[name.split()[0]] += 1

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return done, wrong + left_behind()


def left_behind() -> list[str]:
    """A sentence for each thing of the process that is not as it was."""
    made, tie = nn.Linear(2, 2).weight, transformers.PreTrainedModel.tie_weights.__qualname__
    found = []
    if made.device.type != "cpu" or made.dtype != torch.float32:
        found.append(f"a new layer is in {made.dtype} on {made.device}")
    if tie != "PreTrainedModel.tie_weights":
        found.append(f"weights are tied by {tie}")
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--seed", type=int, default=0, help="of the order of the jobs")
    parser.add_argument("--one-thread", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if options.one_thread is not None:
        jobs = every_job(options.one_thread, options.dtypes, options.types)
        print(json.dumps({name: job() for name, job in jobs.items()}))
        return
    done, wrong = stress(options.seconds, options.threads, options.dtypes, options.types, options.seed)
    for sentence in wrong[:10]:
        print(sentence, file=sys.stderr)
    counts = ", ".join(f"{verb} {count}" for verb, count in sorted(done.items()))
    print(f"{options.threads} threads, {options.seconds:g} s: {done.total()} jobs ({counts}), {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
