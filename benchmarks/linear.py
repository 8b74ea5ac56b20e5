"""The quantized linear beside torch's bfloat16 linear, in one run.

    python benchmarks/linear.py [--size 4096 4096] [--threads 2] [--dtype bfloat16]

Each kernel is first compared with the reference in float32. Weights are rotated over more memory than any cache, and
the two sides take turns, so that a machine that slows down slows both. Prints milliseconds and the ratio bfloat16 /
quantized: above 1 the quantized one is faster.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from quanto_hf.ops import linear_op
from quanto_hf.schemes import Grouped, make_scheme

ROTATED_BYTES = 256 << 20


def validate(scheme: Grouped, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Relative error of the kernel against the reference in float32."""
    tensors = scheme.quantize(weight)
    args = (tensors["packed"], tensors["scale"], tensors.get("zero"), None, scheme.qtype, scheme.group_size)
    exact = linear_op.reference(x.float(), *args)
    error = float((linear_op(x, *args).float() - exact).norm() / exact.norm())
    if error > 0.01:
        raise SystemExit(f"{scheme}: the kernel is {error:.1%} off the reference; not timed")
    return error


def time_pair(first: list, second: list, x: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of two lists of functions, called in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 2):
        for side, calls in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            calls[i % len(calls)](x)
            if i >= 2:
                side.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 8, 128, 512), help="rows of the input")
    parser.add_argument("--weights", nargs="*", default=("int8", "float8", "int4", "nf4", "fp4", "int2"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    out_features, in_features = args.size
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16)
    floats = [weight.clone() for _ in range(max(2, ROTATED_BYTES // weight.nbytes))]
    print(f"{out_features} x {in_features}, {args.threads} threads, torch {torch.__version__}, bfloat16 inputs")
    print(f"{'weights':16}{'rows':>6}{'bf16 ms':>10}{'ours ms':>10}{'ratio':>8}{'error':>10}  kernel")
    for name in args.weights:
        scheme = make_scheme(name)
        tensors = scheme.quantize(weight)
        size = sum(tensor.nbytes for tensor in tensors.values())
        copies = [{k: t.clone() for k, t in tensors.items()} for _ in range(max(2, ROTATED_BYTES // size))]
        for rows in args.rows:
            x = torch.randn(rows, in_features, dtype=torch.bfloat16)
            error = validate(scheme, weight, x)
            ours = [lambda x, s=scheme, t=t: s.linear(x, t, None) for t in copies]
            theirs = [lambda x, w=w: F.linear(x, w) for w in floats]
            bf16, quantized = time_pair(theirs, ours, x, args.rounds)
            call = (x, tensors["packed"], tensors["scale"], tensors.get("zero"), None, scheme.qtype, scheme.group_size)
            kernel = next(kernel for kernel, sentence in linear_op.explain(*call) if sentence == "runs")
            print(
                f"{scheme!s:16}{rows:6}{bf16 * 1e3:10.2f}{quantized * 1e3:10.2f}{bf16 / quantized:8.2f}"
                f"{error:10.1e}  {kernel}",
                flush=True,
            )


if __name__ == "__main__":
    main()
