"""Errors and times of making additive codebooks, beside int2 and int3 and beside the prototype that they started from.

    python benchmarks/aqlm_make.py [--size 1024] [--model [--weights int2 aqlm-2x8 ...]]

relW is ||W - Q|| / ||W||, relY the same of outputs for held-out inputs: synthetic correlated ones with 8 channels that
are 10 times as large (so relY is not comparable with numbers for other inputs). Weights: N(0, 1), and the same with one
of a thousand values 10 times as large. ``--model`` evaluates the bundled language model: perplexity and KL to the float
one on held-out text. Rows with "data" see 60 other windows of it: all of them the second moments of the float model's
inputs. int3 is rounded here; the library has no such type.
"""

import argparse
import copy
import time
import warnings
from dataclasses import dataclass

import torch
from gptq import TYPES, gptq, rounded

import quanto_hf
from quanto_hf import QLinear
from quanto_hf.fit.aqlm import quantize_aqlm
from quanto_hf.flow import collect_moments, evaluate, freeze, freeze_aqlm, quantize, windows
from quanto_hf.schemes import Aqlm, make_scheme

# seconds for a million weights: layout, with data -> prototype on 2 cores
PROTOTYPE = {
    ("1x8", False): "3-13", ("2x8", False): "10-44", ("3x8", False): "69", ("4x8", False): "121",
    ("1x8", True): "16-37", ("2x8", True): "14-41", ("3x8", True): "41-46",
}  # fmt: skip


def inputs(rows: int, columns: int, seed: int) -> torch.Tensor:
    fixed = torch.Generator().manual_seed(7)
    mixture = torch.randn(columns, columns, generator=fixed) / columns**0.5
    large = torch.randperm(columns, generator=fixed)[:8]
    spectrum = torch.arange(1, columns + 1) ** -0.5
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spectrum) @ mixture
    x[:, large] *= 10
    return x


def weights(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(size, size, generator=generator)
    outlier = normal.clone()
    outlier[torch.rand(size, size, generator=generator) < 0.001] *= 10
    return {"normal": normal, "outlier": outlier}


def errors(size: int) -> None:
    seen, held_out = inputs(3 * size, size, 1), inputs(size, size, 2)
    moment = seen.T @ seen / len(seen)
    print(f"{'weight':9}{'method':18}{'bits':>6}{'relW':>8}{'relY':>8}{'s / M':>8}  prototype, s")
    for name, weight in weights(size).items():

        def row(
            method: str, bits: float, made: torch.Tensor, seconds: float, before: str = "", weight=weight, name=name
        ) -> None:
            error = weight - made
            rel_w = float(error.norm() / weight.norm())
            rel_y = float((held_out @ error.T).norm() / (held_out @ weight.T).norm())
            per = seconds / weight.numel() * 1e6
            print(f"{name:9}{method:18}{bits:6.2f}{rel_w:8.3f}{rel_y:8.3f}{per:8.2f}  {before}", flush=True)

        scheme, start = make_scheme("int2"), time.perf_counter()
        tensors = scheme.quantize(weight, "mse")
        row("int2 g64 mse", 2.5, scheme.dequantize(tensors, size, torch.float32), time.perf_counter() - start)
        for order in (False, True):
            start = time.perf_counter()
            made = gptq(weight, moment, "int2", act_order=order)
            row(f"int2 g64 GPTQ{' order' * order}", 2.5, made, time.perf_counter() - start)
        for books in (1, 2, 3, 4):
            for hessian in (None, moment):
                start = time.perf_counter()
                found = quantize_aqlm(weight, num_codebooks=books, nbits=8, hessian=hessian, dtype=torch.float16)
                seconds, data = time.perf_counter() - start, hessian is not None
                bits = Aqlm(books, 8).bits((size, size))
                before = PROTOTYPE.get((f"{books}x8", data), "")
                row(f"aqlm {books}x8{' data' * data}", bits, found.dequantize(), seconds, before)


@dataclass(frozen=True)
class Method:
    """A way to quantize the layers of a model; "int3" is of this benchmark alone."""

    weights: str
    data: bool = False
    fit: str = "mse_gain"
    act_order: bool = False
    group_size: int = 64

    def __str__(self) -> str:
        if self.weights.startswith("aqlm"):
            return self.weights + " data" * self.data
        method = f"GPTQ{' order' * self.act_order} {self.fit} data" if self.data else self.fit
        return f"{self.weights} g{self.group_size} {method}"

    def __call__(self, model: torch.nn.Module, data: list, moments: dict[str, torch.Tensor]) -> float:
        """Quantize in place; the bits per weight."""
        if self.weights.startswith("aqlm"):
            quantize(model, self.weights)
            freeze_aqlm(model, data, progress=False) if self.data else freeze(model)
            return quanto_hf.report(model).quantized_bits
        if self.weights == "int2" and not self.data:
            freeze(quantize(model, "int2", group_size=self.group_size, optimizer=self.fit))
            return quanto_hf.report(model).quantized_bits
        for name, moment in moments.items():
            parameter = model.get_submodule(name).weight
            weight = parameter.detach().float()
            if self.data:
                made = gptq(weight, moment, self.weights, self.group_size, self.act_order, self.fit)
            else:
                made = rounded(weight, self.weights, self.fit, self.group_size)
            parameter.data = made.to(parameter.dtype)
        return TYPES[self.weights].bits + 32 / self.group_size


METHODS = [
    Method("int2"), Method("int2", group_size=32), Method("aqlm-2x8"),
    *(Method("int2", True, fit, order) for order in (False, True) for fit in ("mse", "mse_gain")),
    Method("aqlm-2x8", True),
    Method("int3", fit="mse"), Method("int3"), Method("aqlm-3x8"),
    *(Method("int3", True, fit, order) for order in (False, True) for fit in ("mse", "mse_gain")),
    Method("aqlm-3x8", True),
]  # fmt: skip


def model(wanted: list[str] | None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())(quanto_hf.heldout_text(), verbose=False).input_ids
    text = windows(tokens, 256)
    data, held_out = [{"input_ids": part} for part in text[100:160].split(8)], text[:60]
    reference = AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.bfloat16).eval()
    layers = [name for name, m in quantize(copy.deepcopy(reference), "int2").named_modules() if isinstance(m, QLinear)]
    moments = collect_moments(reference, data, layers)
    print(f"float perplexity {evaluate(reference, held_out).perplexity:.3f}")
    print(f"{'weights':34}{'bits':>6}{'perplexity':>12}{'KL':>9}")
    for method in METHODS:
        if wanted and not any(str(method).startswith(name) for name in wanted):
            continue
        made = copy.deepcopy(reference)
        bits = method(made, data, moments)
        result = evaluate(made, held_out, reference)
        print(f"{method!s:34}{bits:6.2f}{result.perplexity:12.3f}{result.kl:9.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--model", action="store_true")
    parser.add_argument(
        "--weights", nargs="+", help="with --model: beginnings of the names of the rows; all by default"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*codebooks of")
    quantize_aqlm(torch.randn(16, 16), num_codebooks=1, nbits=2)  # native loops are checked at first use
    model(args.weights) if args.model else errors(args.size)


if __name__ == "__main__":
    main()
