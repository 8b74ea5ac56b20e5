"""Scale types: how one scale, or one zero, is stored."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ScaleType:
    """How one scale is stored. A type that is no float of torch's is a subclass with its own :meth:`store` and
    :meth:`read`; its ``dtype`` is then an integer type, since ``Module.to(dtype)`` would convert floats.

    Args:
        name: for errors and tables.
        dtype: of the stored tensor.

    Example:
        >>> BFLOAT16.round(torch.tensor([1.003]))
        tensor([1.])
    """

    name: str
    dtype: torch.dtype

    @property
    def is_float(self) -> bool:
        """Whether stored tensors are the scales themselves, which kernels read where they lie."""
        return self.dtype.is_floating_point

    def store(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales rounded to the nearest ones of this type.

        Args:
            scale: float, any shape.

        Returns:
            The stored tensor: ``dtype``, the same shape and device. What is not finite stays so.
        """
        return scale.to(self.dtype)

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """The scales of a stored tensor: float32, the same shape and device."""
        return stored.float()

    def round(self, scale: torch.Tensor) -> torch.Tensor:
        """The float32 scales that :meth:`read` gives for what :meth:`store` writes."""
        return self.read(self.store(scale))


FLOAT32, BFLOAT16 = ScaleType("float32", torch.float32), ScaleType("bfloat16", torch.bfloat16)
