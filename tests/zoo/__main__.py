"""Every family of models of the installed transformers.

    python -m tests.zoo tiny [--families llama,gpt2 | --sample] [--weights int8,int4] [--jobs 2] [--out tiny.jsonl]
    python -m tests.zoo published [--families ...] [--jobs 2] [--out published.jsonl]
    python -m tests.zoo page tiny.jsonl published.jsonl [--out docs/models.md]

``tiny`` makes a small model of each family and quantizes, runs, saves and reloads it; ``published`` plans each at its
published size, without weights; ``page`` writes what both found. Each family has a process of its own. The exit status
is 1 if quanto_hf fails with one. A file that is there already is gone on with. All families take about 20 minutes of
one core each way.
"""

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import conversion_mapping

from .families import names
from .life import CONFIGS, life, wrong
from .page import page
from .published import published
from .sample import SAMPLE
from .walk import walk

# what every family needs, imported before the processes part
SHARED = (
    "transformers.modeling_layers", "transformers.processing_utils", "transformers.generation",
    "transformers.backbone_utils", "transformers.models.auto.modeling_auto", "transformers.masking_utils",
    "transformers.modeling_flash_attention_utils", "transformers.generation.candidate_generator",
    "transformers.image_utils", "transformers.audio_utils", "quanto_hf.hf.load.quantizer", "quanto_hf.hf.save",
    "quanto_hf.hf.memory.planning", "accelerate", "torch._dynamo", "torch.distributed.tensor",
)  # fmt: skip


def share_imports() -> None:
    """Do once what each process would do."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for module in SHARED:
        importlib.import_module(module)
    # regular expressions for all families
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    names()
    gc.freeze()


def run(task: Callable[[str], dict[str, Any]], chosen: list[str], given: argparse.Namespace) -> int:
    """Walk, print a line per family, and add one to the file; how many are wrong."""
    if given.out and given.out.exists():
        done = {json.loads(line)["family"] for line in given.out.read_text().splitlines()}
        chosen = [name for name in chosen if name not in done]
    share_imports()
    bad = 0
    for name, result in walk(chosen, task, given.jobs, given.limit):
        failed = wrong(result)
        bad += bool(failed)
        said = f"FAILS {failed}" if failed else result.get("float") or result.get("error") or "ok"
        print(f"{name:32} {result['seconds']:6.1f} s  {said}"[:200], flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    return bad


def main() -> None:
    """Read the arguments and do what they ask for."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("what", choices=("tiny", "published", "page"))
    ask.add_argument("files", nargs="*", type=Path)
    ask.add_argument("--families", help="names, with commas between; all by default")
    ask.add_argument("--sample", action="store_true", help="only those of tests/zoo/sample.py")
    ask.add_argument("--weights", default=",".join(CONFIGS), help="of the tiny models, with commas between")
    ask.add_argument("--jobs", type=int, default=2)
    ask.add_argument("--limit", type=float, default=90.0, help="seconds of a processor for one family")
    ask.add_argument("--out", type=Path)
    given = ask.parse_args()
    if given.what == "page":
        out = given.out or Path("docs/models.md")
        before = out.read_text(encoding="utf-8") if out.exists() else ""
        out.write_text(page(*given.files, before=before), encoding="utf-8")
        return
    chosen = given.families.split(",") if given.families else list(SAMPLE if given.sample else names())
    task = published if given.what == "published" else partial(life, kinds=given.weights.split(","))
    sys.exit(bool(run(task, chosen, given)))


if __name__ == "__main__":
    main()
