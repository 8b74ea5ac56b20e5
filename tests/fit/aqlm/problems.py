"""Weights and inputs that the tests of additive codebooks share."""

import importlib.util
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent.parent


def inputs(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Correlated activations, with 8 channels that are 10 times as large; the mixture is the same for every seed."""
    fixed = torch.Generator().manual_seed(7)
    mixture = torch.randn(columns, columns, generator=fixed) / columns**0.5
    spectrum = torch.arange(1, columns + 1) ** -0.5
    large = torch.randperm(columns, generator=fixed)[:8]
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spectrum) @ mixture
    x[:, large] *= 10
    return x


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def relative(weight: torch.Tensor, made: torch.Tensor, x: torch.Tensor | None = None) -> float:
    """||W - Q|| / ||W||, or that of the outputs."""
    error, size = weight.float() - made.float(), weight.float()
    if x is not None:
        error, size = error @ x.T, size @ x.T
    return float(error.norm() / size.norm())


def gptq(*args, **kwargs):
    """``benchmarks/gptq.py``."""
    spec = importlib.util.spec_from_file_location("benchmark_gptq", ROOT / "benchmarks" / "gptq.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gptq(*args, **kwargs)
