"""A causal language model timed in its own dtype and quantized, in turns."""

import inspect
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quanto_hf.cli import measure
from quanto_hf.cli.options import WrongUsage

PROMPT, LONG = 32, 512
# what is measured in tokens per second, with the prompts that are read at a time
SPEEDS = {"decode_1": 1, "decode_8": 8, "prefill": 1}


@torch.no_grad()
def bench_model(folder: str, weights: list[str], new: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for the float model, and one for each number type: ``load_seconds``, ``footprint`` in bytes, tokens per
    second for each of ``SPEEDS``, and their ``ratio`` to the float model in the same minute.

    The float model stays in memory, since it takes turns with each of the others.
    """
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise WrongUsage(f"{folder} is quantized already: this needs the float model")
    with torch.device("meta"):
        # imports the code of the model, which is not part of loading it
        AutoModelForCausalLM.from_config(config)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or LONG
    if most < 8:
        raise WrongUsage(f"{folder} reads {most} tokens only, which is too few to measure")
    new = min(new, most // 2)
    runs = {"prompt": min(PROMPT, most - new), "new": new, "long": min(LONG, most)}
    base, first = load(folder, None)
    speeds = [speed(base, runs) for _ in range(rounds)]
    medians = {key: statistics.median(found[key] for found in speeds) for key in SPEEDS}
    yield first | {"model": str(base.dtype).removeprefix("torch."), **medians, "ratio": dict.fromkeys(SPEEDS, 1.0)}
    for name in weights:
        model, row = load(folder, name)
        # each takes its turn; the first round of the new one warms up
        speed(model, runs)
        pairs = [(speed(base, runs), speed(model, runs)) for _ in range(rounds)]
        row |= {key: statistics.median(ours[key] for _, ours in pairs) for key in SPEEDS}
        ratio = {key: statistics.median(ours[key] / theirs[key] for theirs, ours in pairs) for key in SPEEDS}
        yield row | {"model": name, "ratio": ratio}
        del model


def load(folder: str, weights: str | None) -> tuple[Any, dict[str, Any]]:
    """A model, its load seconds and its footprint."""
    start = time.perf_counter()
    model = measure.load(folder, weights)
    seconds = time.perf_counter() - start
    return model, {"load_seconds": seconds, "footprint": model.get_memory_footprint()}


def speed(model: Any, runs: dict[str, int]) -> dict[str, float]:
    """Tokens per second of each of ``SPEEDS``."""
    ids = torch.randint(
        3, model.config.get_text_config().vocab_size, (8, runs["long"]), generator=_generator(), dtype=torch.int64
    )
    found = {
        key: decode(model, ids[:count, : runs["prompt"]], runs["new"]) for key, count in SPEEDS.items() if "_" in key
    }
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = time.perf_counter()
    model(input_ids=ids[:1], **last)
    return {**found, "prefill": runs["long"] / (time.perf_counter() - start)}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def decode(model: Any, ids: torch.Tensor, new: int) -> float:
    """Tokens per second of a greedy ``generate``, after the first token, so without the prompt."""
    times: list[float] = []

    def watch(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool)

    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "eos_token_id": -1, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=[watch], **greedy)
    return len(ids) * (len(times) - 1) / (times[-1] - times[0])
