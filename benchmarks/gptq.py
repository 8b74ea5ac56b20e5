"""GPTQ for asymmetric integers, as a comparator: our own, in plain torch, with this library's clip search.

Frantar and others, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
"""

import torch

from quanto_hf.fit import Grid, Mse
from quanto_hf.qtypes import QTYPES


def gptq(
    weight: torch.Tensor, moment: torch.Tensor, qtype: str, group_size: int = 64, act_order: bool = False
) -> torch.Tensor:
    """The dequantized weight.

    Args:
        weight: float32, shape (rows, columns).
        moment: second moment of the inputs, shape (columns, columns); 1 % of the mean of its diagonal is added.
        qtype: int2, int4; a scale and a zero of 16 bits per group.
        group_size: columns that share them.
        act_order: columns of large inputs first.
    """
    columns = weight.shape[1]
    hessian = moment.double().clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    hessian = hessian[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    left, made = weight[:, order].clone(), torch.empty_like(weight)
    grid, fit = Grid(QTYPES[qtype], symmetric=False), Mse()
    scale = zero = None
    for j in range(columns):
        if j % group_size == 0:
            scale, zero = fit(left[:, j : j + group_size].contiguous(), grid, torch.float16)
        column = left[:, j : j + 1]
        rounded = (grid.nearest_(column / scale + zero) - zero) * scale
        made[:, j : j + 1] = rounded
        left[:, j:] -= (column - rounded) / upper[j, j] * upper[j, j:]
    return made[:, order.argsort()]
