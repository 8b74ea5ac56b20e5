"""Experts and embedding rows beside torch's own: ratios above 1 are faster than what stands at the head of the column.

    python benchmarks/experts.py [--shape 2048x1024 4096x14336] [--experts 8 128] [--threads 2] [--types int4 int8]
    python benchmarks/experts.py --embedding
    python benchmarks/experts.py --calls

``ours`` is ``expert_linear`` with ids in no order, ``sorted`` the same with ids in order. ``linear`` is one call of the
quantized ``linear`` for each expert that has rows; ``loop`` is ``F.linear`` with bfloat16 experts in a loop, as
transformers' eager experts do; neither gathers nor scatters here. ``grouped`` is torch's ``grouped_mm`` on sorted rows,
where there is one. All of them take turns, and no call reads the experts that the call before has read. Results are
compared with the reference before they are timed. ``--calls`` shows what a call costs beside its work: one row, and
weights so small that there is none.
"""

import argparse
import random
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from quanto_hf.nn import QEmbedding, QLinear
from quanto_hf.nn.expert_product import ExpertProduct
from quanto_hf.ops import GroupedWeight, embedding, expert_linear, linear
from quanto_hf.schemes import make_scheme

# Tokens, and experts of each of them.
ROUTES = ((1, 2), (1, 8), (16, 8), (512, 2), (512, 8))
# Bytes of the float experts of a layer; fewer are made where more would not fit.
MOST_BYTES = 2 << 30
# Bytes of the 4-bit experts of all layers: more than any cache holds.
STORED_BYTES = 256 << 20
ALLOWED = 1e-2


def route(tokens: int, top: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Ids of the experts of each token, different ones, token after token."""
    chosen = [torch.randperm(experts, generator=generator)[:top] for _ in range(tokens)]
    return torch.cat(chosen)


def medians(ways: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each way, in turns of random order (what ran before leaves its traces in the caches). Every call has a
    number of its own: what the way before has just read from memory must not be in the cache."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, dice = list(ways.items()), random.Random(0)
    for i in range(rounds + 1):
        dice.shuffle(order)
        for j, (name, way) in enumerate(order):
            start = time.perf_counter()
            way(i * len(ways) + j)
            if i:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


class Case:
    """Float and quantized experts of some layers, so many that no cache holds them, and what is routed to them."""

    def __init__(self, shape: tuple[int, int], experts: int, name: str) -> None:
        rows, columns = shape
        self.shape, self.experts = shape, min(experts, MOST_BYTES // (rows * columns * 2))
        self.layers = max(1, STORED_BYTES // (self.experts * rows * columns // 2))
        generator = torch.Generator().manual_seed(0)
        self.floats = torch.empty(self.layers, self.experts, rows, columns, dtype=torch.bfloat16)
        for expert in self.floats.view(-1, rows, columns):
            expert.copy_(torch.randn(shape, generator=generator) * columns**-0.5)
        scheme = make_scheme(name)
        tensors = scheme.quantize(self.floats)
        weight = scheme.weight(tensors, columns)
        self.stored = [weight.rows(i) for i in range(self.layers)]
        self.name = name

    def one(self, layer: int, e: int) -> GroupedWeight:
        """The weight of an expert."""
        return self.stored[layer].rows(e)

    def bench(self, tokens: int, top: int, rounds: int) -> None:
        """Compare with the reference, then time and print."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(tokens * top, self.shape[1], generator=generator).bfloat16()
        turns = [route(tokens, top, self.experts, generator) for _ in range((rounds + 1) * 5)]
        layer = [i % self.layers for i in range(len(turns))]
        in_order = [ids.sort().values for ids in turns]
        lists = [[(e, (ids == e).nonzero()[:, 0]) for e in ids.unique().tolist()] for ids in turns]
        ends = [torch.bincount(ids, minlength=self.experts).cumsum(0).to(torch.int32) for ids in turns]

        def ours(ids: torch.Tensor, i: int) -> torch.Tensor:
            return expert_linear(x, ids, self.stored[layer[i]])

        def separate(i: int) -> None:
            for e, mine in lists[i]:
                linear(x[: len(mine)], self.one(layer[i], e))

        def loop(i: int) -> None:
            for e, mine in lists[i]:
                F.linear(x[: len(mine)], self.floats[layer[i], e])

        made = ours(turns[0], 0).float()
        for e, mine in lists[0][:4]:
            exact = x[mine].float() @ self.one(0, e).dense(torch.float32).T
            error = float((made[mine] - exact).norm() / exact.norm())
            assert error <= ALLOWED, f"{self.name}: expert {e} is {error:.1%} off the reference"
        ways: dict[str, Callable[[int], Any]] = {
            "ours": lambda i: ours(turns[i], i),
            "sorted": lambda i: ours(in_order[i], i),
            "linear": separate,
            "loop": loop,
        }
        if hasattr(F, "grouped_mm"):
            ways["grouped"] = lambda i: F.grouped_mm(x, self.floats[layer[i]].transpose(1, 2), offs=ends[i])
        found = medians(ways, rounds)
        size, best = f"{self.shape[0]}x{self.shape[1]}", found.pop("ours")
        line = f"{self.name:7}{size:>12}{self.experts:8}{tokens:8}{top:5}{best * 1e3:10.3f}"
        print(line + "".join(f"{seconds / best:9.2f}" for seconds in found.values()), flush=True)


@torch.no_grad()
def bench_embedding(shape: tuple[int, int], types: list[str], rounds: int) -> None:
    """Print a row for each number of rows and type."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    for name in types:
        scheme = make_scheme(name)
        tensors = scheme.quantize(weight)
        stored = scheme.weight(tensors, shape[1])
        for count in (1, 32, 4096):
            turns = [torch.randint(0, shape[0], (count,), generator=generator) for _ in range(2 * (rounds + 1))]
            exact = stored.rows(turns[0]).dense(torch.float32)
            made = embedding(turns[0], stored, torch.bfloat16).float()
            assert (made - exact).norm() <= ALLOWED * exact.norm(), name
            found = medians(
                {
                    "ours": lambda i: embedding(turns[i], stored, torch.bfloat16),  # noqa: B023
                    "torch": lambda i: F.embedding(turns[i], weight),  # noqa: B023
                },
                rounds,
            )
            ratio = found["torch"] / found["ours"]
            print(f"{name:7}{count:8} rows of {shape[1]}{found['ours'] * 1e3:10.4f} ms{ratio:8.2f}", flush=True)


@torch.no_grad()
def bench_calls(types: list[str]) -> None:
    """Print a row for each way to call something. The smallest of many short series, in turns: what is measured is
    Python, and whatever disturbs it makes it longer."""
    x, ids = torch.randn(1, 64), torch.tensor([0])
    for name in types:
        scheme = make_scheme(name)
        stored = scheme.quantize(torch.randn(4, 8, 64))
        product = ExpertProduct(scheme, 64)
        linear_layer = QLinear.from_module(torch.nn.Linear(64, 8), scheme)
        table = QEmbedding.from_module(torch.nn.Embedding(4, 64), scheme)
        rows = table.quantized()
        for layer in (linear_layer, table):
            layer.freeze()
        assert torch.equal(product(x, ids, stored), scheme.expert_linear(x, ids, stored, None))
        assert torch.equal(table.forward(ids), scheme.rows(rows, ids, 64, torch.float32))
        ways: dict[str, Callable[[], Any]] = {
            "new_empty of the result": lambda: x.new_empty((1, 8)),
            "expert_linear": lambda: scheme.expert_linear(x, ids, stored, None),  # noqa: B023
            "ExpertProduct": lambda: product(x, ids, stored),  # noqa: B023
            "embedding": lambda: scheme.rows(rows, ids, 64, torch.float32),  # noqa: B023
            "QEmbedding.forward": lambda: table.forward(ids),  # noqa: B023
            "F.embedding": lambda: F.embedding(ids, x),
            "QLinear.forward": lambda: linear_layer.forward(x),  # noqa: B023
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(400):
            for way, run in ways.items():
                best[way] = min(best[way], timeit.timeit(run, number=50) / 50)
        for way, seconds in best.items():
            print(f"{name:7}{way:28}{seconds * 1e6:8.2f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["2048x1024", "4096x14336"], metavar="OUTxIN")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 128], help="fewer where they take over 2 GB")
    parser.add_argument("--types", nargs="+", default=["int4", "int8"])
    parser.add_argument("--rounds", type=int, default=40, help="fewer for many tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--embedding", action="store_true", help="embedding rows instead of experts")
    parser.add_argument("--calls", action="store_true", help="what a call costs, instead of experts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.calls:
        bench_calls(args.types)
        return
    if args.embedding:
        print(f"{'':32}ours and times torch's, {args.threads} threads")
        bench_embedding((65536, 4096), args.types, args.rounds)
        return
    heads = ("shape", "experts", "tokens", "top", "ours ms", "sorted", "linear", "loop", "grouped")
    print(f"{'':7}{'{:>12}{:>8}{:>8}{:>5}{:>10}{:>9}{:>9}{:>9}{:>9}'.format(*heads)}   {args.threads} threads")
    for text in args.shape:
        rows, columns = map(int, text.split("x"))
        for experts in args.experts:
            for name in args.types:
                case = Case((rows, columns), experts, name)
                for tokens, top in ROUTES:
                    case.bench(tokens, min(top, case.experts), max(3, args.rounds // (1 + tokens // 16)))


if __name__ == "__main__":
    main()
