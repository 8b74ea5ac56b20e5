"""What reading ``weight`` of a frozen layer gives: a tensor that is dequantized when its values are needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class WeightView(torch.Tensor):
    """A read-only float view of a quantized weight.

    Shape, dtype and device cost nothing: T5 asks for the dtype at every step. Any operation dequantizes the weight
    and returns plain tensors; writing is an error, because nobody would ever see what was written. It is made anew at
    each read and never stored.

    Args:
        shape: of the weight.
        dtype: of the weight.
        device: of the weight.
        make: dequantizes the weight.
    """

    _make: Callable[[], torch.Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, make: Callable[[], torch.Tensor]
    ) -> "WeightView":
        """See the class."""
        view: WeightView = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._make = make
        return view

    # subclass handling belongs to __torch_dispatch__ alone: results are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dequantized weight.

        Raises:
            RuntimeError: the operation writes into it.
        """
        kwargs = kwargs or {}
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        if any(a.is_write and isinstance(given.get(a.name), WeightView) for a in func._schema.arguments):
            refuse_write()
        args, kwargs = tree_map_only(WeightView, lambda view: view.dequantize(), (args, kwargs))
        return func(*args, **kwargs)

    def dequantize(self) -> torch.Tensor:
        """A plain tensor with the same values."""
        return self._make()

    @property
    def data(self) -> torch.Tensor:
        """The view itself: what writes through ``data`` is refused too."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        refuse_write()

    def __setitem__(self, *args: Any) -> None:
        refuse_write()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """As of a plain tensor."""
        return self.dequantize().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        """As of a plain tensor."""
        return self.dequantize().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.dequantize())


def refuse_write() -> None:
    """Raise the error of everything that would change the weight of a frozen layer.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "the weight of a frozen QLinear cannot be written: it is held quantized. Replace the layer by an nn.Linear, or "
        "dequantize the model first (quanto_hf.dequantize(model), or model.dequantize()): adapters can be merged then"
    )
