"""What a quantized embedding and head cost and save, on a real language model whose head is tied to its embedding.

    python benchmarks/embeddings.py [--threads 2] [--rounds 9] [--tokens 16] [--ways 5]

``benchmarks/real_lm.py`` says where the model comes from. For each way: bytes as planned and as loaded; KL to the float
model over a text, in float32, so that nothing but the weights differs; and seconds per token of ``generate``, greedy,
bfloat16, after a prompt of 16 tokens. The ways take turns, and times are the best of the rounds: the ratio to the first
one is what counts. ``--ways 2`` has the float model and the first way alone.
"""

import argparse
import time
from typing import Any

import torch
import transformers
from real_lm import real_lm

import quanto_hf
from quanto_hf.flow import evaluate
from quanto_hf.flow import windows as windows_of

KEPT = {"layers": {"weights": None}}
WAYS: dict[str, Any] = {
    "float": None,
    "embedding and head int8": quanto_hf.QuantoConfig("int8", embeddings="int8", overrides=KEPT),
    "embedding and head int4": quanto_hf.QuantoConfig("int4", embeddings="int4", overrides=KEPT),
    "int4 layers, float head": quanto_hf.QuantoConfig("int4"),
    "int4 layers, int8 head": quanto_hf.QuantoConfig("int4", embeddings="int8"),
}


def load(folder: str, way: str, dtype: torch.dtype) -> Any:
    """The model of one way."""
    config = WAYS[way]
    options = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def divergence(folder: str, ways: list[str], windows: torch.Tensor) -> dict[str, float]:
    """Way -> KL to the float model, one model at a time beside it."""
    reference = load(folder, "float", torch.float32)
    found = {}
    for way in [way for way in ways if way != "float"]:
        result = evaluate(load(folder, way, torch.float32), windows, reference, batch_size=2)
        found[way] = float(result.kl or 0)
    return found


def seconds(models: dict[str, Any], prompt: torch.Tensor, tokens: int, rounds: int) -> dict[str, float]:
    """Way -> seconds per generated token, the best of the rounds."""
    times: dict[str, list[float]] = {way: [] for way in models}
    for _ in range(rounds + 1):
        for way, model in models.items():
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            times[way].append((time.perf_counter() - start) / tokens)
    return {way: min(found) for way, found in times.items()}


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--ways", type=int, default=len(WAYS))
    parser.add_argument("--windows", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = real_lm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = quanto_hf.heldout_text()
    windows = windows_of(tokenizer(text).input_ids, 256)[: given.windows]
    ways = list(WAYS)[: given.ways]
    kl = divergence(folder, ways, windows)
    models = {way: load(folder, way, torch.bfloat16) for way in ways}
    took = seconds(models, windows[:1, :16], given.tokens, given.rounds)
    print(f"{given.threads} threads, {windows.numel()} tokens of text")
    print(f"{'':26} {'planned MB':>10} {'loaded MB':>10} {'KL':>9} {'ms/token':>9} {'ratio':>6}")
    for way, model in models.items():
        config = WAYS[way]
        planned = "" if config is None else f"{quanto_hf.plan(folder, config).nbytes / 1e6:.2f}"
        said = "" if way not in kl else f"{kl[way]:.6f}"
        ratio = took["float"] / took[way]
        print(
            f"{way:26} {planned:>10} {model.get_memory_footprint() / 1e6:10.2f} {said:>9} {1e3 * took[way]:9.2f} "
            f"{ratio:6.2f}"
        )


if __name__ == "__main__":
    main()
