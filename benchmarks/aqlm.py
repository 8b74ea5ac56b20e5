"""Time of linear layers with AQLM weights on the CPU, beside torch's bfloat16 and the ``aqlm`` package.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/aqlm.py [--size 4096 4096] [--rows 1 512] [--threads 1 2] [--repeats 20]

A line for each number of rows of x: milliseconds, and their ratio to those of torch. Every kernel is compared with the
dequantized weight first. All are called in turns, so that a busy machine slows all of them, and a number is that of the
fastest call. The package computes in float32 for codes of 8 bits (it takes nothing else), for one row here, and is left
out where it is not installed. Its time is that of the same number of threads; with two its results for codes of 8
bits are wrong (tests/ops/test_aqlm_package.py).
"""

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from quanto_hf.ops import linear
from quanto_hf.schemes import Aqlm

# "import aqlm" would find this file
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

LAYOUTS = (Aqlm(1, 8), Aqlm(2, 8), Aqlm(1, 16))
# ||made - exact|| / ||exact|| in bfloat16
ERROR = 6e-3


def draw(scheme: Aqlm, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random stored tensors."""
    made = {}
    for name, spec in scheme.tensors(size, torch.bfloat16).items():
        if name == "codes":
            half = 1 << (scheme.nbits - 1)
            made[name] = torch.randint(-half, half, spec.shape).to(spec.dtype)
        else:
            made[name] = (torch.rand(spec.shape) - 0.5).to(spec.dtype)
    return made


def of_package(scheme: Aqlm, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The call of the ``aqlm`` package's layer."""
    import aqlm

    dtype = torch.float32 if scheme.nbits == 8 else torch.bfloat16
    size = (tensors["codes"].shape[1] * scheme.in_group, tensors["codes"].shape[0])
    layer = aqlm.QuantizedLinear(*size, scheme.in_group, 1, scheme.num_codebooks, scheme.nbits, False, dtype=dtype)
    layer.load_state_dict({name: t if name == "codes" else t.to(dtype) for name, t in tensors.items()})
    given = x.to(dtype)
    return lambda: layer(given)


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32, 64, 128, 512), help="rows of x")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    package = importlib.util.find_spec("aqlm") is not None
    rows, columns = given.size
    dense = torch.randn(rows, columns).bfloat16()
    weights = {scheme: draw(scheme, (rows, columns)) for scheme in LAYOUTS}
    for threads in given.threads:
        torch.set_num_threads(threads)
        print(f"{rows} x {columns}, {threads} threads")
        for count in given.rows:
            x = torch.randn(count, columns).bfloat16()
            calls: dict[str, Callable[[], torch.Tensor]] = {"torch bf16": lambda x=x: F.linear(x, dense)}
            for scheme, tensors in weights.items():
                weight = scheme.weight(tensors, columns)
                calls[str(scheme)] = lambda x=x, weight=weight: linear(x, weight)
                exact = F.linear(x.float(), weight.dense(torch.float32))
                error = float((calls[str(scheme)]().float() - exact).norm() / exact.norm())
                assert error < ERROR, f"{scheme} is wrong by {error:.2g}"
                if package and count == 1:
                    import numba

                    numba.set_num_threads(threads)
                    calls[f"{scheme}, aqlm package"] = of_package(scheme, tensors, x)
            times = fastest(calls, given.repeats)
            first = times["torch bf16"]
            told = (f"{name} {seconds * 1e3:.2f} ({seconds / first:.2f})" for name, seconds in times.items())
            print(f"  {count:4} rows:  {'   '.join(told)}", flush=True)


@torch.no_grad()
def fastest(calls: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest call of each, over turns of 3 calls of each."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            for _ in range(3):
                start = time.perf_counter()
                call()
                found[name] = min(found[name], time.perf_counter() - start)
    return found


if __name__ == "__main__":
    main()
