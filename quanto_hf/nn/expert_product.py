"""What a layer of experts multiplies with: their weights, and the call that is bound to them."""

from typing import Any

import torch

from quanto_hf.nn.bound_call import BoundCall, Parameters
from quanto_hf.ops.watched import recording, sizes
from quanto_hf.schemes import Scheme


class ExpertProduct:
    """Rows times the weights of their own experts, which a module holds as Parameters.

    A module has one for each of its stacked weights, and calls it with its own ``_parameters``. What
    :func:`quanto_hf.ops.expert_linear` looks up at each call (20 us) is looked up once, and again when other tensors
    are held; whatever the bound call does not serve takes that way. Results, gradients and errors are those of the
    op, but that a wrong width of the input is always seen: the op cannot tell 199 columns from 200. Autocast is left
    to the module. A module that is copied or pickled takes it along, without the bound call.

    Args:
        scheme: how the weights are stored.
        in_features: columns of the weight of each expert.
        prefix: in front of the names of the scheme, such as ``"down_proj_"``.

    Example:
        >>> from quanto_hf.schemes import make_scheme
        >>> scheme = make_scheme("int4")
        >>> stored = {f"up_{name}": t for name, t in scheme.quantize(torch.randn(4, 6, 64)).items()}
        >>> product = ExpertProduct(scheme, 64, "up_")
        >>> product(torch.randn(3, 64), torch.tensor([2, 0, 2]), stored).shape
        torch.Size([3, 6])
    """

    def __init__(self, scheme: Scheme, in_features: int, prefix: str = "") -> None:
        self.scheme, self.in_features, self.prefix = scheme, in_features, prefix
        self._bound: BoundCall | None = None

    def __call__(
        self, x: torch.Tensor, experts: torch.Tensor, parameters: Parameters, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x[i] @ weight[experts[i]].T + bias[experts[i]]`` for each row i.

        Args:
            x: float32, bfloat16 or float16, shape (rows, in_features).
            experts: int64, shape (rows,).
            parameters: the stored tensors, by the names of the scheme behind ``prefix``; others do not matter.
            bias: None, or shape (experts, out_features) in the dtype of ``x``.

        Returns:
            Shape (rows, out_features), in the dtype of ``x``.

        Raises:
            ValueError: shapes, dtypes or devices do not fit together.
            IndexError: there is no such expert.
        """
        if not recording():
            bound = self._bound
            if bound is None or not bound.fits(parameters):
                bound = self._bound = self._bind(parameters)
            if bound.call is not None:
                out = bound.call(x, experts, bias)
                if out is not None:
                    return out
        if x.dim() and sizes(x)[-1] != self.in_features:
            raise ValueError(f"these experts take inputs of shape (rows, {self.in_features}), not {sizes(x)}")
        return self.scheme.expert_linear(x, experts, self._tensors(parameters), bias)

    def _tensors(self, parameters: Parameters) -> dict[str, torch.Tensor]:
        """The stored tensors by the names of the scheme."""
        found = {name: parameters.get(self.prefix + name) for name in self.scheme.names}
        absent = [self.prefix + name for name, tensor in found.items() if tensor is None]
        if absent:
            wanted = ", ".join(self._names())
            raise ValueError(f"{self.scheme} weights are held as {wanted}; missing: {', '.join(absent)}")
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _names(self) -> list[str]:
        return [self.prefix + name for name in self.scheme.names]

    def _bind(self, parameters: Parameters) -> BoundCall:
        call = self.scheme.bind_experts(self._tensors(parameters), self.in_features)
        return BoundCall(call, BoundCall.holding(self._names(), parameters))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the bound call, which knows addresses in memory."""
        return {**self.__dict__, "_bound": None}
