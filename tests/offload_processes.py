"""Loads and saves of offloaded models in processes of their own, which a test may kill.

The processes are forked from one that has imported everything, which takes 0.1 s where a new interpreter takes 4 s.
"""

import itertools
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from quanto_hf import QuantoConfig
from quanto_hf.io import offload_folder

DISK = {"": "disk"}
# Both layers on disk, the rest in memory.
MIXED = {"model.layers": "disk", "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
MIXED["lm_head"] = "cpu"


def context() -> Any:
    """What makes the processes."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["quanto_hf.hf", "transformers.models.llama.modeling_llama", "offload_processes"])
    return made


def load(folder: Path, off: Path | None = None, weights: str | None = "int4", device_map: Any = None, **kwargs: Any):
    """A tiny language model, quantized on the fly unless ``weights`` is None."""
    import transformers

    if weights is not None:
        kwargs["quantization_config"] = QuantoConfig(weights)
    if off is not None:
        kwargs["offload_folder"] = str(off)
    return transformers.LlamaForCausalLM.from_pretrained(folder, device_map=device_map, **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model answers to fixed tokens."""
    from tiny_models import tokens

    return model(tokens()).logits


def slow_disk(seconds: float) -> None:
    """From now on each small file takes some time, so that there is a middle in which to be killed."""
    import transformers.modeling_utils as modeling

    offload_folder.SHARD_BYTES = 3000
    fsync, save = os.fsync, modeling.safe_save_file

    def slow_fsync(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    def slow_save(*args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        save(*args, **kwargs)

    os.fsync, modeling.safe_save_file = slow_fsync, slow_save


def load_slowly(folder: Path, off: Path, seconds: float) -> None:
    """Writes the entry of an offload folder."""
    slow_disk(seconds)
    load(folder, off, device_map=DISK)


def save_slowly(folder: Path, off: Path, out: Path, seconds: float) -> None:
    """Saves an offloaded model in small files."""
    model = load(folder, off, device_map=DISK)
    slow_disk(seconds)
    model.save_pretrained(out, max_shard_size="8KB")


def save_and_die(folder: Path, out: Path, size: str, step: int) -> None:
    """Saves a quantized model into a folder, and is killed at a step, of those that change something there."""
    import transformers.modeling_utils as modeling

    model = load(folder, weights=None)
    steps = itertools.count(1)

    def deadly(change: Any) -> Any:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return changed

    for module, name in [(os, "replace"), (os, "unlink"), (os, "fsync"), (modeling, "safe_save_file")]:
        setattr(module, name, deadly(getattr(module, name)))
    Path.unlink = lambda self, missing_ok=False: os.unlink(self)
    model.save_pretrained(out, max_shard_size=size)


def load_together(folder: Path, off: Path, barrier: Any, results: Any) -> None:
    """Loads at the same time as others; tells whether it was the one that wrote."""
    slow_disk(0.005)
    written, write = [], offload_folder.write_shard

    def counted(path: Path, *args: Any) -> None:
        written.append(path.name)
        write(path, *args)

    offload_folder.write_shard = counted
    barrier.wait(30)
    results.put((len(written), logits(load(folder, off, device_map=DISK)).tolist(), len(written)))


def save_into_its_own_folder(folder: Path, kwargs: dict[str, Any], size: str, results: Any) -> None:
    """Loads a quantized model, and saves it where it came from."""
    model = load(folder, weights=None, **kwargs)
    before = logits(model)
    model.save_pretrained(folder, max_shard_size=size)
    results.put((before.tolist(), logits(model).tolist()))
