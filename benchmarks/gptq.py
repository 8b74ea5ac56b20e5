"""GPTQ for asymmetric integers, as a comparator: our own, in plain torch, with this library's clip search.

Integers of 3 bits are of this file alone. Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022.
"""

import torch

from quanto_hf.fit import Grid, ScaleType, fit_by_name
from quanto_hf.qtypes import QTYPES, QType

# start ratios between those of 2 and of 4 bits; Gaussian values in groups of 64: 0.171
TYPES = {**QTYPES, "int3": QType("int3", 3, "int", -4, 3, start_ratios=(0.65, 0.8, 0.9, 1.0))}
FLOAT16 = ScaleType("float16", torch.float16)


def rounded(weight: torch.Tensor, qtype: str, fit: str, group_size: int = 64) -> torch.Tensor:
    """The dequantized weight, each group by itself: as :func:`gptq`, with no data."""
    grid, values = Grid(TYPES[qtype], symmetric=False), weight.reshape(-1, group_size).contiguous()
    scale, zero = fit_by_name(fit)(values, grid, FLOAT16)
    return ((grid.nearest_(values / scale + zero) - zero) * scale).view_as(weight)


def gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    qtype: str,
    group_size: int = 64,
    act_order: bool = False,
    fit: str = "mse",
) -> torch.Tensor:
    """The dequantized weight.

    Args:
        weight: float32, shape (rows, columns).
        moment: second moment of the inputs, shape (columns, columns); 1 % of the mean of its diagonal is added.
        qtype: int2, int3, int4; a scale and a zero of 16 bits per group.
        group_size: columns that share them.
        act_order: columns of large inputs first.
        fit: what finds scale and zero of a group, from what the columns before it leave.
    """
    columns = weight.shape[1]
    hessian = moment.double().clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    hessian = hessian[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    left, made = weight[:, order].clone(), torch.empty_like(weight)
    grid, find = Grid(TYPES[qtype], symmetric=False), fit_by_name(fit)
    scale = zero = None
    for j in range(columns):
        if j % group_size == 0:
            scale, zero = find(left[:, j : j + group_size].contiguous(), grid, FLOAT16)
        column = left[:, j : j + 1]
        nearest = (grid.nearest_(column / scale + zero) - zero) * scale
        made[:, j : j + 1] = nearest
        left[:, j:] -= (column - nearest) / upper[j, j] * upper[j, j:]
    return made[:, order.argsort()]
