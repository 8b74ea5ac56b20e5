"""Second moments of the inputs of layers: what the error of a weight does to the outputs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quanto_hf.flow.batches import batches, run_all, tensors_of
from quanto_hf.nn.qlinear import LinearProduct

# types of layers that have one input, of which a matrix gives the outputs
LINEAR = nn.Linear | LinearProduct


class _Moment:
    """The running mean of x x^T over the rows x that pass."""

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.mean = width, 0, torch.zeros(0, dtype=torch.float32)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a linear layer has one input, and it may come by its name
        x = tensors_of((args, kwargs))[0].detach().reshape(-1, self.width)
        if x.shape[0] == 0:
            return
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.rows == 0:
                self.mean = x.new_zeros(self.width, self.width)
            self.rows += x.shape[0]
            # a mean, not a sum, so that no number of rows is too many for float32
            self.mean += (x.T @ x - x.shape[0] * self.mean) / self.rows


@torch.no_grad()
def collect_moments(model: nn.Module, data: Any, modules: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Run a model over data and note the second moment of the inputs of its linear layers.

    The model computes as it is, in evaluation mode and without gradients; its state is not changed. Where rows are
    padding they count like others: give texts without padding.

    Args:
        model: on any device.
        data: one batch (a dict of keyword arguments, a tuple of positional ones, or a tensor), or a list or DataLoader
            of batches. Tensors are moved to the device of the model.
        modules: names of linear layers; None means all.

    Returns:
        Name -> ``X.T @ X / n`` for the n rows X that reached the layer: float32, shape (in_features, in_features), on
        the device of the inputs. Layers that no data reached are left out.

    Raises:
        ValueError: there is no batch, or a name is not that of a linear layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> collect_moments(model, [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])], ["0"])["0"]
        tensor([[5., 1.],
                [1., 2.]])
    """
    named = dict(model.named_modules())
    wanted = [name for name, m in named.items() if isinstance(m, LINEAR)] if modules is None else list(modules)
    if wrong := [name for name in wanted if not isinstance(named.get(name), LINEAR)]:
        raise ValueError(f"not a linear layer of this model: {', '.join(wrong)}")
    moments = {name: _Moment(named[name].in_features) for name in wanted}
    hooks = [named[name].register_forward_pre_hook(moment, with_kwargs=True) for name, moment in moments.items()]
    try:
        run_all(model, batches(data))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: moment.mean for name, moment in moments.items() if moment.rows}
