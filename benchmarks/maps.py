"""Device maps x number types x {on the fly, pre-quantized}: what was planned, what is there, and what a forward reads.

    python benchmarks/maps.py [--hidden 512] [--layers 4] [--weights int8 int4 float8]

Makes a random bfloat16 Llama in a temporary folder, and loads it with each map on the CPU, with part of it or all of it
on disk. One line for each load, in bytes:

``cpu``, ``disk``
    of the weights; where plan() says something else, both are shown with a ``!``.
``logits``
    ``same`` if they have the bits of those of the model in memory.
``read``
    of the files, by one forward pass. All of their pages are dropped first, from the process and from the page cache,
    with reading ahead switched off, and counted afterwards (mincore). Those of the weights on disk are shown; of an
    embedding the rows of the tokens have to be read, of the rest everything, and of the files nothing else, but what
    is in memory and is pages of a quantized checkpoint. Else there is a ``!``.
``float``
    in the offload folder: what is there and is not codes, scales or zeros.

``streamed`` stands for an accelerator: weights are copied at each use, in place of being used where they lie, and
``read`` is what has been copied. The exit status is 1 if any line has a ``!``. Linux only, on a disk that has a page
cache.
"""

import argparse
import ctypes
import gc
import logging
import mmap
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors import safe_open
from transformers.integrations.accelerate import get_device

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.hf.offload import hooks as offload
from quanto_hf.hf.offload.prefetch_hook import prefetch
from quanto_hf.io.lanes import PlainLane

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
RANDOM, DONTNEED = 1, 4
IDS = torch.randint(3, 500, (1, 8), generator=torch.Generator().manual_seed(0))
PARTS = ("_packed", "_scale", "_zero")
MODES = ("auto", "balanced", "balanced_low_0", "sequential")


def maps(layers: int, total: int) -> Iterator[tuple[str, object, dict | None]]:
    """Name, ``device_map`` and ``max_memory``."""
    half = {f"model.layers.{i}": "cpu" if i < layers // 2 else "disk" for i in range(layers)}
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    for mode in MODES:
        yield f"{mode}, 60 % in memory", mode, {"cpu": int(0.6 * total)}
    yield "auto, the same in KiB", "auto", {"cpu": f"{total * 6 // 10240}KiB"}
    yield "auto, all on disk", "auto", {"cpu": 0}
    yield "auto, it just fits", "auto", {"cpu": total}
    yield "a dict, cpu and disk", {**half, **rest}, None
    yield "a dict, disk", {"": "disk"}, None
    yield "a device, cpu", "cpu", None
    yield "None", None, None


@dataclass(frozen=True)
class Mapping:
    """A part of a safetensors file that this process has mapped: where, how long, from which byte of the file on."""

    begin: int
    length: int
    offset: int
    file: str

    def pages(self, begin: int, nbytes: int) -> set[tuple[str, int]]:
        """The pages of the file that hold some bytes of memory."""
        if not self.begin <= begin < self.begin + self.length or not nbytes:
            return set()
        first = begin - self.begin + self.offset
        return {(self.file, page) for page in range(first // PAGE, (first + nbytes - 1) // PAGE + 1)}


def mapped() -> list[Mapping]:
    """All of them."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            span, _, offset, _, _, file = line.split(maxsplit=5)
            begin, end = (int(n, 16) for n in span.split("-"))
            found.append(Mapping(begin, end - begin, int(offset, 16), file))
    return found


def drop() -> None:
    """All pages of mapped files, out of the process and out of the cache; none of them is read ahead."""
    for mapping in mapped():
        for advice in (RANDOM, DONTNEED):
            assert LIBC.madvise(ctypes.c_void_p(mapping.begin), ctypes.c_size_t(mapping.length), advice) == 0
    for file in {mapping.file for mapping in mapped()}:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached() -> set[tuple[str, int]]:
    """File and number of the pages of mapped files that are in the page cache."""
    found = set()
    for mapping in mapped():
        pages = (ctypes.c_ubyte * -(-mapping.length // PAGE))()
        assert LIBC.mincore(ctypes.c_void_p(mapping.begin), ctypes.c_size_t(mapping.length), pages) == 0
        first = mapping.offset // PAGE
        found |= {(mapping.file, first + i) for i, page in enumerate(pages) if page & 1}
    return found


def forward(model: torch.nn.Module) -> torch.Tensor:
    """The logits of the tokens."""
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def on_disk(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the map leaves there."""
    places = getattr(model, "hf_device_map", {"": "cpu"})
    return {name: p for name, p in model.named_parameters() if get_device(places, name) == "disk"}


def pages_of(weights: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
    """File and number of the pages of mapped weights that a forward pass has to read."""
    found = set()
    mappings = mapped()
    for name, tensor in weights.items():
        rows = [tensor[i] for i in IDS.unique()] if name == "model.embed_tokens.weight" else [tensor]
        for row in rows:
            for mapping in mappings:
                found |= mapping.pages(row.data_ptr(), row.nbytes)
    return found


def floats(folder: Path) -> int:
    """Bytes in the offload folder that are no codes, scales or zeros."""
    found = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found += sum(opened.get_tensor(n).nbytes for n in opened.keys() if not n.endswith(PARTS))
    return found


class Counted(PlainLane):
    """Copies on the CPU, and counts."""

    copied = 0

    def finish(self, ticket: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The copies."""
        copies = super().finish(ticket)
        Counted.copied += sum(tensor.nbytes for tensor in copies.values())
        return copies


def both(real: int, planned: int) -> str:
    """A number, or two that should be one."""
    return f"{real:,}" if real == planned else f"{real:,}!{planned:,}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--weights", nargs="+", default=["int8", "int4", "float8"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 128,
    )  # fmt: skip
    cls, lines, bad = transformers.LlamaForCausalLM, 0, 0
    head = f"{'weights':8}{'way':14}{'map':32}{'cpu':>12}{'disk':>12}{'logits':>8}{'read':>12}{'float':>7}"
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", ".")) as temporary:
        place = Path(temporary)
        cls(config).to(torch.bfloat16).save_pretrained(place / "float", max_shard_size="8MB")
        print(head)
        for weights in args.weights:
            quantization = QuantoConfig(weights)
            resident = cls.from_pretrained(place / "float", quantization_config=quantization)
            resident.save_pretrained(place / weights, max_shard_size="8MB")
            right, total = forward(resident), resident.get_memory_footprint()
            del resident
            for way, folder, given in (("on the fly", "float", quantization), ("pre-quantized", weights, None)):
                cases = [(*case, False) for case in maps(args.layers, total)]
                cases += [(f"streamed: {name}", d, m, True) for name, d, m, _ in cases if name.startswith("a dict")]
                for number, (name, device_map, memory, streamed) in enumerate(cases):
                    off = place / f"off-{weights}-{folder}-{number}"
                    options = {"device_map": device_map, "offload_folder": str(off), "dtype": torch.bfloat16}
                    if memory is not None:
                        options["max_memory"] = dict(memory)
                    planned = quanto_hf.plan(place / folder, given, memory, device_map=device_map, context=0)
                    with mock.patch.multiple(offload, **_as_accelerator()) if streamed else nullcontext():
                        model = cls.from_pretrained(place / folder, quantization_config=given, **options)
                    there = {device.device: device.weights for device in planned.devices}
                    disk = on_disk(model)
                    sizes = {"disk": sum(tensor.nbytes for tensor in disk.values())}
                    sizes["cpu"] = model.get_memory_footprint() - sizes["disk"]
                    same = "same" if torch.equal(forward(model), right) else "other!"
                    if streamed:
                        before = Counted.copied
                        forward(model)
                        read = both(Counted.copied - before, sizes["disk"])
                    else:
                        # of a quantized checkpoint what is in memory is pages of its files too
                        wanted, every = pages_of(disk), pages_of(dict(model.named_parameters()))
                        drop()
                        forward(model)
                        found = cached()
                        read = both(len(found & wanted) * PAGE, len(wanted) * PAGE) + "!" * (found != every)
                    row = [both(sizes[device], there.get(device, 0)) for device in ("cpu", "disk")]
                    text = f"{weights:8}{way:14}{name:32}{row[0]:>12}{row[1]:>12}{same:>8}{read:>12}{floats(off):7,}"
                    del model, disk
                    gc.collect()
                    lines, bad = lines + 1, bad + ("!" in text or floats(off) > 0)
                    print(text, flush=True)
    print(f"{lines - bad} of {lines} lines are as they should be")
    return int(bad > 0)


def _as_accelerator() -> dict[str, object]:
    return {"is_on_cpu": lambda hooks: False, "prefetch": lambda model, hooks: prefetch(model, hooks, Counted)}


if __name__ == "__main__":
    sys.exit(main())
