"""A linear layer whose weight is quantized, and is an ``nn.Linear`` to everybody else; what others share with it."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn.bound_call import Call
from quanto_hf.nn.prepared import straight_through
from quanto_hf.nn.prepared_op import linear_in_graph
from quanto_hf.nn.registry import LOAD, QUANTIZE, register_qmodule
from quanto_hf.nn.rounded import RoundedModule, autocasts
from quanto_hf.ops.watched import as_a_node, recording, sizes, transformed
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme

# looked up once: each layer of each token asks
_any_autocast = torch._C._is_any_autocast_enabled


class LinearProduct(RoundedModule):
    """Mixin of modules that multiply their input with one quantized matrix, each row of which gives one output, and add
    a bias; the other base is the float module type. The matrix is a view of the weight, the weight itself or its
    transposed (:meth:`quanto_hf.nn.QuantizedWeight.to_matrix`)."""

    in_features: int
    out_features: int

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``, in the dtype of the input (or of autocast)."""
        if not recording():
            out = self._fast_forward(input)
            if out is not None:
                return out
        x = input
        # the op cannot tell: codes of 199 columns may take as many bytes as those of 200
        if not x.dim() or sizes(x)[-1] != self.in_features:
            raise ValueError(f"{self} takes inputs of shape (..., {self.in_features}), not {sizes(x)}")
        if autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias_held
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if not self.is_frozen and not self.rounding:
            return F.linear(x, self.to_matrix(self.weight).to(x.dtype), bias)
        if not self.is_frozen and as_a_node() and not transformed():
            return linear_in_graph(self, x, bias)
        # torch cannot follow a function with a gradient of its own through these
        if recording() or transformed():
            x = self.round_input(x, self.static_scale)
            if self.is_frozen:
                return self.scheme.linear(x, self.tensors(), bias)
            return F.linear(x, self.round_weight(self.sources()).to(x.dtype), bias)
        if self.is_frozen and self.activations is None:
            return self.scheme.linear(x, self.tensors(), bias)
        if self.is_frozen and not torch.is_grad_enabled():
            return self.multiply(x, self.tensors(), bias)
        return straight_through(self, x, bias)

    def multiply(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """The product with a packed weight: one kernel that rounds x as well, or one step after the other."""
        call = self.bound_call() if self.is_frozen else None
        out = None if call is None else call(x, bias)
        if out is not None:
            return out
        if self.activations is None or self._observe(x):
            return self.scheme.linear(x, tensors, bias)
        self._check_calibrated()
        return self.how.multiply(x, tensors, bias, self.static_scale)

    def round_input(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """x as it is multiplied. While the layer is being calibrated its range is noted, and it stays as it is.

        Args:
            scale: the static one, or None.
        """
        if self.activations is None or self._observe(x):
            return x
        self._check_calibrated()
        return self.how.round_input(x, scale)

    def _fast_forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the bound call gives for the tensors that are held, or None if it does not serve: each layer of each
        token pays for what stands here (3 us)."""
        call = self.bound_call()
        if call is None or (_any_autocast() and autocasts(x)):
            return None
        parameters = self._parameters
        return call(x, parameters["bias"] if "bias" in parameters else self.bias)

    def _bind_stored(self, tensors: Mapping[str, torch.Tensor]) -> Call | None:
        """The call for these stored tensors, with x rounded as the layer says, or None where there is none."""
        if self.activations is None:
            return self.scheme.bind(tensors, self.in_features)
        if self.is_observing:
            return None
        self._check_calibrated()
        return self.scheme.bind(tensors, self.in_features, self.activations.name, self.static_scale)


@register_qmodule(nn.Linear, by_default=[LOAD, QUANTIZE])
class QLinear(LinearProduct, nn.Linear):
    """A linear layer with a quantized weight.

    PREPARED, ``weight`` is a float Parameter, and the forward pass gives what the packed weight would give, so that a
    model can be tried and trained before it is frozen. FROZEN, the weight is held as plain Parameters named
    ``weight_packed``, ``weight_scale`` and, if the scheme is asymmetric, ``weight_zero``; reading ``weight`` makes a
    float tensor from them. None of them ever has a gradient, or changes its dtype. FLOAT, it is an ordinary layer: what
    :meth:`set_rounding` makes of a PREPARED one.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        scheme: how the weight is stored.
        activations: number type to which inputs are rounded, or None for weight-only; how many columns share a scale is
            decided in :func:`quanto_hf.ops.activation_group`.
        static: whether inputs are rounded with one scale that calibration finds, and not with those of each token.
        dtype: float dtype of the bias, and of ``weight`` when it is read.
        device: where the (empty) tensors of a FROZEN layer are made.

    Example:
        >>> from quanto_hf.schemes import make_scheme
        >>> layer = QLinear.from_module(nn.Linear(128, 10), make_scheme("int4"))
        >>> layer.freeze()
        >>> layer
        QLinear(in_features=128, out_features=10, bias=True, weights=int4 g64 asym)
        >>> {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        {'weight_packed': (10, 64), 'weight_scale': (10, 2), 'weight_zero': (10, 2), 'bias': (10,)}
    """

    constants: ClassVar[tuple[str, ...]] = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme,
        activations: QType | None = None,
        static: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        # not nn.Linear's, which would make a float weight
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._setup(scheme, dtype)
        self.activations = activations
        data = torch.empty(out_features, dtype=self.weight_dtype, device=device) if bias else None
        self._parameters["bias"] = None if data is None else nn.Parameter(data)
        self.make_empty(device)
        if static:
            self.make_static(device=device)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_features, in_features)"""
        return (self.out_features, self.in_features)
