"""What quantized modules with one weight share, and whether torch.autocast is on."""

import torch

from quanto_hf.nn.activation import QuantizedInput
from quanto_hf.nn.learned import LearnedScales
from quanto_hf.nn.qweight import QuantizedWeight


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would convert ``x``, which is on some device, for a product.

    Example:
        >>> with torch.autocast("cpu"):
        ...     autocasts(torch.ones(1)), autocasts(torch.ones(1, device="meta"))
        (True, False)
    """
    device = x.device.type
    # there is no autocast on the meta device, and asking for its state is an error
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.is_floating_point()


class RoundedModule(LearnedScales, QuantizedInput, QuantizedWeight):
    """Mixin of modules with a ``weight``, scales that can be learned, and inputs that can be rounded. The other base is
    the float module type."""

    @property
    def rounds(self) -> bool:
        """Whether it computes with rounded numbers: not in state FLOAT."""
        return self.is_frozen or self.rounding

    def _operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight and bias to compute with, in the dtype of x unless autocast takes care of it.

        Raises:
            ValueError: x has no floating-point numbers; a weight as integers would be zeros.
        """
        if not x.is_floating_point():
            raise ValueError(f"{self} takes floating-point inputs, not {x.dtype}; convert them first")
        weight = self.from_matrix(self.round_weight(self.sources())) if self.rounds else self.weight
        bias = self.bias_held
        if autocasts(x):
            return weight, bias
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

    def extra_repr(self) -> str:
        """As of the float module, and how the weight is stored."""
        return super().extra_repr() + f", weights={self.scheme}" + self._describe_input() + self._describe_state()
