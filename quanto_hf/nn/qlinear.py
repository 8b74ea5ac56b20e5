"""A linear layer whose weight is quantized, and is an ``nn.Linear`` to everybody else."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.nn.activation import fake_quantize
from quanto_hf.nn.registry import register_qmodule
from quanto_hf.nn.weight_view import WeightView, refuse_write
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme

PREFIX = "weight_"
# the stored parameters by name, and the call that was prepared for them
Bound = tuple[list[tuple[str, torch.Tensor]], Callable[..., torch.Tensor | None] | None]


@register_qmodule(nn.Linear)
class QLinear(nn.Linear):
    """A linear layer with a quantized weight.

    Two states. FLOAT: ``weight`` is a float Parameter, and the forward pass quantizes it each time, so that a model
    can be tried and trained before it is frozen. FROZEN: the weight is held as plain Parameters named
    ``weight_packed``, ``weight_scale`` and, if the scheme is asymmetric, ``weight_zero``; reading ``weight`` makes a
    float tensor from them. None of them ever has a gradient, or changes its dtype.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias.
        scheme: how the weight is stored.
        activations: number type to which inputs are rounded, or None for weight-only; how many columns share a scale is
            decided in :func:`quanto_hf.ops.activation_group`.
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

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: Scheme,
        activations: QType | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        # not nn.Linear's, which would make a float weight
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.activations = scheme, activations
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.fit: Fit | str | None = None
        self.weight_error: float | None = None
        self._bound: Bound | None = None
        for name, spec in scheme.tensors((out_features, in_features), self.weight_dtype).items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            super().register_parameter(PREFIX + name, nn.Parameter(tensor, requires_grad=False))
        data = torch.empty(out_features, dtype=self.weight_dtype, device=device) if bias else None
        super().register_parameter("bias", None if data is None else nn.Parameter(data))

    @classmethod
    def from_module(
        cls,
        module: nn.Linear,
        scheme: Scheme,
        activations: QType | None = None,
        fit: Fit | str | None = None,
    ) -> "QLinear":
        """A FLOAT layer that shares weight and bias with ``module``."""
        layer = cls(
            module.in_features,
            module.out_features,
            bias=False,
            scheme=scheme,
            activations=activations,
            dtype=module.weight.dtype,
            device="meta",
        )
        for name in layer.tensors():
            del layer._parameters[PREFIX + name]
        # weight first, as in nn.Linear: optimizers know parameters by their order
        del layer._parameters["bias"]
        layer._parameters["weight"] = module._parameters["weight"]
        layer._parameters["bias"] = module._parameters["bias"]
        layer.fit = fit
        return layer.train(module.training)

    # ------------------------------------------------------------------------------------------------ the weight

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is held quantized."""
        return self._parameters.get("weight") is None

    @property
    def weight(self) -> torch.Tensor:
        """The weight, shape (out_features, in_features), as a float tensor. Of a FROZEN layer it is a
        :class:`WeightView`, which is dequantized when its values are used, and cannot be written."""
        weight = self._parameters.get("weight")
        if weight is not None:
            return weight
        if torch.compiler.is_compiling():
            return self.dequantized()
        stored = next(iter(self.tensors().values()))
        view = WeightView((self.out_features, self.in_features), self.weight_dtype, stored.device, self.dequantized)
        # transformers initialises tensors that do not have this mark
        view._is_hf_initialized = True  # type: ignore[attr-defined]
        return view

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_write()

    def dequantized(self) -> torch.Tensor:
        """The weight of a FROZEN layer as a new plain tensor in ``weight_dtype``."""
        return self.scheme.dequantize(self.tensors(), self.in_features, self.weight_dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module; refuses a ``weight`` for a FROZEN layer, which nothing would read."""
        if name == "weight" and self.is_frozen:
            refuse_write()
        super().register_parameter(name, param)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by the names of the scheme; empty in state FLOAT."""
        return {
            name.removeprefix(PREFIX): tensor
            for name, tensor in self._parameters.items()
            if name.startswith(PREFIX) and tensor is not None
        }

    def freeze(self) -> None:
        """Quantize the float weight and let go of it. A FROZEN layer stays as it is.

        Raises:
            ValueError: the weight has NaN or infinite values.
        """
        if self.is_frozen:
            return
        weight = self.weight
        self.weight_dtype = weight.dtype
        tensors = self.scheme.quantize(weight, self.fit)
        self.weight_error = self.measure_error(weight, tensors)
        del self._parameters["weight"]
        self.set_tensors(tensors)

    def set_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold these stored tensors."""
        for name, tensor in tensors.items():
            self._parameters[PREFIX + name] = nn.Parameter(tensor, requires_grad=False)
        # last, as in a layer that was made frozen
        self._parameters["bias"] = self._parameters.pop("bias")

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear with the dequantized weight and the same bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=self.weight_dtype)
        linear.weight = nn.Parameter(self.dequantized() if self.is_frozen else self.weight.detach())
        if self.bias is not None:
            linear.bias = self.bias
        return linear.train(self.training)

    def measure_error(self, weight: torch.Tensor, tensors: dict[str, torch.Tensor], most: int = 64) -> float | None:
        """||Q - W|| / ||W|| over at most 64 evenly spaced rows, which costs next to nothing."""
        if weight.numel() == 0 or weight.device.type == "meta":
            return None
        rows = torch.linspace(0, weight.shape[0] - 1, min(most, weight.shape[0]), device=weight.device).long()
        exact = weight.detach()[rows].float()
        made = self.scheme.rows(tensors, rows, self.in_features, torch.float32)
        return float((made - exact).norm() / exact.norm().clamp(min=1e-30))

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input @ weight.T + bias``, in the dtype of the input (or of autocast)."""
        if not torch.compiler.is_compiling():
            out = self._fast_forward(input)
            if out is not None:
                return out
        x = input
        # the op cannot tell: codes of 199 columns may take as many bytes as those of 200
        if not x.dim() or x.shape[-1] != self.in_features:
            raise ValueError(f"{self} takes inputs of shape (..., {self.in_features}), not {tuple(x.shape)}")
        device = x.device.type
        # there is no autocast on the meta device, and asking for its state is an error
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(device))
        if self.activations is not None:
            x = fake_quantize(x, self.activations, self.scheme.activation_group(self.activations))
        bias: torch.Tensor | None = self._parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self.is_frozen:
            return self.scheme.linear(x, self.tensors(), bias)
        return F.linear(x, self._rounded_weight().to(x.dtype), bias)

    def _fast_forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """The call that the scheme has prepared for the tensors that are held, or None if it does not serve: each
        layer of each token pays for what stands here (3 us)."""
        bound = self._bound
        parameters = self._parameters
        if bound is None or any(parameters.get(name) is not tensor for name, tensor in bound[0]):
            bound = self._bound = self._bind()
        if bound[1] is None or torch.is_autocast_enabled("cpu"):
            return None
        return bound[1](x, parameters["bias"])

    def _bind(self) -> Bound:
        tensors = self.tensors()
        activations = None if self.activations is None else self.activations.name
        call = self.scheme.bind(tensors, self.in_features, activations) if tensors else None
        return [(PREFIX + name, tensor) for name, tensor in tensors.items()], call

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the prepared call, which knows addresses in memory."""
        return {**self.__dict__, "_bound": None}

    def _rounded_weight(self) -> torch.Tensor:
        """The float weight as it will be once frozen; gradients pass straight through the rounding."""
        weight = self.weight
        with torch.no_grad():
            tensors = self.scheme.quantize(weight, self.fit)
            rounded = self.scheme.dequantize(tensors, self.in_features, weight.dtype)
        return weight + (rounded - weight).detach() if weight.requires_grad else rounded

    # ------------------------------------------------------------------------------------------------ nn.Module

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QLinear":
        """Moves everything; converts the dtype of the bias and of ``weight``, never that of the stored tensors."""
        stored = {id(tensor) for tensor in self.tensors().values()}

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) not in stored or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0, dtype=self.weight_dtype))
        if probe.is_floating_point():
            self.weight_dtype = probe.dtype
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: Any
    ) -> None:
        """As of nn.Module; a stored tensor of another dtype is an error, not a conversion."""
        errors = args[-1]
        for name, tensor in self.tensors().items():
            key = f"{prefix}{PREFIX}{name}"
            given = state_dict.get(key)
            if isinstance(given, torch.Tensor) and given.dtype != tensor.dtype:
                errors.append(f"dtype mismatch for {key}: the state dict has {given.dtype}, {self} has {tensor.dtype}")
                # go on with what is held already, so that the other bad keys are named as well
                state_dict = {**state_dict, key: tensor}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)

    def reset_parameters(self) -> None:
        """Refused: a quantized layer has no random initial weight."""
        refuse_write()

    def extra_repr(self) -> str:
        """Features, bias, and the scheme."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", weights={self.scheme}"
        if self.activations is not None:
            text += f", activations={self.activations}"
        return text if self.is_frozen else text + ", not frozen"
