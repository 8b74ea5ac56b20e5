"""Time, memory and error of quantizing one weight, for every type and fit.

    python benchmarks/quantize.py [--size 4096 4096] [--threads 2]

The weight is Gaussian, bfloat16. ``error`` is ||Q - W|| / ||W||; ``beyond`` the peak of resident memory above the
result, each measured in a process of its own (Linux only). ``seconds`` is the best of 5 and ``GB/s`` counts the
bytes of the weight; QUANTO_HF_CPU=torch measures torch alone.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from quanto_hf.schemes import make_scheme

CASES = [
    ("int8", -1, "absmax"),
    ("int8", 128, "absmax"),
    ("float8", -1, "absmax"),
    ("float8_e5m2", -1, "absmax"),
    ("int4", 64, "minmax"),
    ("int4", 64, "mse"),
    ("int4", 128, "minmax"),
    ("int4", 128, "mse"),
    ("int4", 64, "hqq"),
    ("nf4", 32, "absmax"),
    ("nf4", 32, "mse"),
    ("fp4", 32, "mse"),
    ("int2", 64, "minmax"),
    ("int2", 64, "mse"),
    ("int2", 128, "minmax"),
    ("int2", 128, "mse"),
    ("int2", 64, "mse_gain"),
    ("int2", 64, "hqq"),
]


def measure(weights: str, group_size: int, fit: str, size: tuple[int, int]) -> None:
    """Print one row; run in a process of its own."""
    torch.manual_seed(0)
    # made in bfloat16: a larger float tensor before it would hide the peak
    weight = torch.randn(size, dtype=torch.bfloat16)
    scheme = make_scheme(weights, group_size)
    # what torch itself needs for the first call of its ops does not count
    scheme.quantize(weight[: max(1, size[0] // 64)].clone(), fit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = []
    tensors: dict[str, torch.Tensor] = {}
    for _ in range(5):
        tensors.clear()
        start = time.perf_counter()
        tensors = scheme.quantize(weight, fit)
        times.append(time.perf_counter() - start)
    beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    result = sum(tensor.nbytes for tensor in tensors.values())
    exact = weight.float()
    error = float((scheme.dequantize(tensors, size[1], torch.float32) - exact).norm() / exact.norm())
    bits = 8 * result / weight.numel()
    speed = weight.nbytes / min(times) / 1e9
    row = f"{scheme!s:18}{fit:9}{bits:6.2f}{min(times):10.4f}{speed:8.2f}{(beyond - result) / 1e6:12.1f}{error:10.4f}"
    print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case is not None:
        measure(*CASES[args.case], tuple(args.size))
        return
    print(f"{args.size[0]} x {args.size[1]}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'weights':18}{'fit':9}{'bits':>6}{'seconds':>10}{'GB/s':>8}{'beyond MB':>12}{'error':>10}")
    for case in range(len(CASES)):
        subprocess.run([sys.executable, "-W", "ignore", *sys.argv, "--case", str(case)], check=True)


if __name__ == "__main__":
    main()
