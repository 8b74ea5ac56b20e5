"""Every family of models of the installed transformers, tiny.

    python -m tests.zoo [--families llama,gpt2 | --sample] [--weights int8,int4] [--jobs 2] [--out zoo.jsonl]
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import transformers.models.auto.modeling_auto
from transformers import modeling_utils  # noqa: F401

import quanto_hf

from .families import names
from .life import life
from .walk import walk


def main() -> None:
    """Read the arguments and walk."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--families", help="names, with commas between; all by default")
    ask.add_argument("--weights", default="int8,int4")
    ask.add_argument("--jobs", type=int, default=2)
    ask.add_argument("--limit", type=float, default=240.0, help="seconds for one family")
    ask.add_argument("--out", type=Path, help="a file of JSON, a line per family; those it has already are not done again")
    given = ask.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    chosen = given.families.split(",") if given.families else list(names())
    if given.out and given.out.exists():
        done = {json.loads(line)["family"] for line in given.out.read_text().splitlines()}
        chosen = [name for name in chosen if name not in done]
    bad = 0
    for name, result in walk(chosen, partial(life, kinds=given.weights.split(",")), given.jobs, given.limit):
        wrong = result.get("crash") or next((k["error"] for k in result["kinds"].values() if "error" in k), "")
        bad += bool(wrong)
        print(f"{name:32} {result['seconds']:6.1f} s  {'FAILS ' + wrong if wrong else result['float'] or 'ok'}"[:200], flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
