"""Perplexity and KL of the bundled model at each type, and at equal bits through optimum-quanto, in one run.

    python benchmarks/accuracy.py [--model FOLDER] [--windows 200] [--weights int2 aqlm-2x8 ...] [--peers]

KL is the mean of KL(float || quantized) per predicted token of the held-out text, in nats; ``--peers`` also quantizes
the same model with optimum-quanto at the same group size, where it is installed. With a group of 128 and a 16-bit
scale and zero both sides store 4.25 and 2.25 bits per weight.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

import quanto_hf
from quanto_hf.flow import Evaluation, evaluate, freeze, quantize, windows

OURS = [
    ("int8", {}),
    ("float8", {}),
    ("int4", {}),
    ("nf4", {}),
    ("fp4", {}),
    ("int2", {}),
    ("int4", {"group_size": 128}),
    ("int4", {"group_size": 128, "optimizer": "minmax"}),
    ("int4", {"group_size": 32}),
    ("int2", {"group_size": 128}),
    ("int2", {"group_size": 128, "optimizer": "minmax"}),
    ("int2", {"group_size": 32}),
    ("int2", {"optimizer": "hqq"}),
    ("aqlm-2x8", {}),
    ("aqlm-3x8", {}),
]


def ours(model: torch.nn.Module, weights: str, options: dict) -> tuple[str, float]:
    """Quantize in place; a label, and the bits per quantized weight."""
    freeze(quantize(model, weights, **options))
    layer = next(m for m in model.modules() if isinstance(m, quanto_hf.QLinear))
    fit = f" {options['optimizer']}" if "optimizer" in options else ""
    return f"{layer.scheme}{fit}", quanto_hf.report(model).quantized_bits


def optimum_quanto(model: torch.nn.Module, weights: str) -> tuple[str, float]:
    """The same through optimum-quanto, with its default optimizer."""
    import optimum.quanto as quanto

    quanto.quantize(model, weights=getattr(quanto, f"q{weights}"), exclude="lm_head")
    quanto.freeze(model)
    weight = next(m for m in model.modules() if isinstance(m, quanto.QLinear)).weight
    group = getattr(weight, "_group_size", None)
    bits = weight.qtype.bits + (2 * 16 / group if group else 16 / weight.shape[1])
    return f"optimum-quanto {weights}{f' g{group}' if group else ''}", bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=quanto_hf.tiny_lm())
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--weights", nargs="+", help="number types; all of them by default")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(quanto_hf.heldout_text(), verbose=False).input_ids
    inputs = windows(tokens, 256)[: args.windows]
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    base = evaluate(reference, inputs)
    print(f"{base.tokens} tokens; float perplexity {base.perplexity:.3f}")
    print(f"{'weights':34}{'bits':>7}{'perplexity':>12}{'over float':>12}{'KL':>10}")
    runs: list[Callable[[torch.nn.Module], tuple[str, float]]] = [
        lambda model, w=weights, o=options: ours(model, w, o)
        for weights, options in OURS
        if args.weights is None or weights in args.weights
    ]
    if args.peers:
        runs += [lambda model, w=weights: optimum_quanto(model, w) for weights in ("int8", "float8", "int4", "int2")]
    for run in runs:
        model = copy.deepcopy(reference)
        label, bits = run(model)
        row(label, bits, evaluate(model, inputs, reference), base)


def row(label: str, bits: float, result: Evaluation, base: Evaluation) -> None:
    over = 100 * (result.perplexity / base.perplexity - 1)
    print(f"{label:34}{bits:7.2f}{result.perplexity:12.3f}{over:+11.2f}%{result.kl:10.5f}", flush=True)


if __name__ == "__main__":
    main()
