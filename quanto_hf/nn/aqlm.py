"""The linear layer of published AQLM checkpoints."""

from typing import Any, ClassVar

import torch
from torch import nn

from quanto_hf.nn.qlinear import QLinear
from quanto_hf.nn.slots import WEIGHT, Slot
from quanto_hf.schemes import Aqlm


class QuantizedLinear(QLinear):
    """A :class:`QLinear` whose tensors have the names of the published format: ``codes``, ``codebooks``, ``scales``.

    The arguments are those of the class of this name in the ``aqlm`` package.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        in_group_size: columns that share a code.
        out_group_size: rows that share a code.
        num_codebooks: codes of a block.
        nbits_per_codebook: bits of a code.
        bias: whether there is a bias.
        device: where the (empty) tensors are made.
        dtype: of codebooks, scales and bias.

    Raises:
        ValueError: rows or columns cannot be cut into blocks.

    Example:
        >>> layer = QuantizedLinear(16, 4, in_group_size=8, out_group_size=1, num_codebooks=2, nbits_per_codebook=8)
        >>> {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        {'codes': (4, 2, 2), 'codebooks': (2, 256, 1, 8), 'scales': (4, 1, 1, 1), 'bias': (4,)}
    """

    declared: ClassVar[tuple[Slot, ...]] = (Slot(WEIGHT, prefix=""),)

    # the type of the layer that this one stands for
    source_cls: type[nn.Module] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        in_group_size: int,
        out_group_size: int,
        num_codebooks: int,
        nbits_per_codebook: int,
        bias: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        scheme = Aqlm(num_codebooks, nbits_per_codebook, out_group_size, in_group_size)
        super().__init__(in_features, out_features, bias, scheme=scheme, device=device, dtype=dtype)

    @classmethod
    def from_module(cls, module: nn.Module, *args: Any, **kwargs: Any) -> "QuantizedLinear":
        """A PREPARED layer that shares weight and bias with ``module``, and remembers its type."""
        layer = super().from_module(module, *args, **kwargs)
        assert isinstance(layer, QuantizedLinear)
        layer.source_cls = type(module)
        return layer
