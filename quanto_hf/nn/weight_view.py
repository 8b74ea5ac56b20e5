"""What reading ``weight`` of a frozen layer gives: a tensor that is dequantized when its values are needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


class WeightView(torch.Tensor):
    """A float view of a quantized weight.

    Shape, dtype and device cost nothing: T5 asks for the dtype at every step. Any operation dequantizes the weight
    and returns plain tensors, which are copies: ``weight.T`` or ``weight[0]`` does not lead back to the layer. What is
    written into the view itself, or into its ``data``, is handed to the layer, which stores it or refuses. It is made
    anew at each read and never stored.

    Args:
        shape: of the weight.
        dtype: of the weight.
        device: of the weight.
        make: dequantizes the weight.
        write: takes the name of an operation, and what it has made of the weight.
    """

    _make: Callable[[], torch.Tensor]
    _write: Callable[[str, torch.Tensor], None]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], torch.Tensor],
        write: Callable[[str, torch.Tensor], None],
    ) -> "WeightView":
        """See the class."""
        view: WeightView = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._make, view._write = make, write
        return view

    # subclass handling belongs to __torch_dispatch__ alone: results are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dequantized weight.

        Raises:
            RuntimeError: the operation writes into it what the layer cannot store.
        """
        kwargs = kwargs or {}
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        into = [given.get(a.name) for a in func._schema.arguments if a.is_write]
        # a list of tensors is one argument of torch._foreach_mul_ and the like
        views = [leaf for leaf in tree_leaves(into) if isinstance(leaf, WeightView)]
        copies = [(view, view.dequantize()) for view in views]

        def plain_of(leaf: Any) -> Any:
            for view, copy in copies:
                if leaf is view:
                    return copy
            return leaf.dequantize() if isinstance(leaf, WeightView) else leaf

        result = func(*tree_map(plain_of, args), **tree_map(plain_of, kwargs))
        for view, copy in copies:
            view._write(func._schema.name.rpartition(":")[2], copy)
        # in-place operations return what they wrote into
        return tree_map(lambda leaf: next((view for view, copy in copies if leaf is copy), leaf), result)

    def dequantize(self) -> torch.Tensor:
        """A plain tensor with the same values."""
        return self._make()

    @property
    def data(self) -> torch.Tensor:
        """The view itself: what writes through ``data`` writes into it."""
        return self

    @data.setter
    def data(self, value: Any) -> None:
        if value is not self:
            self._write("data = ...", value.dequantize() if isinstance(value, WeightView) else value)

    def __setitem__(self, index: Any, value: Any) -> None:
        copy = self.dequantize()
        copy[index] = value
        self._write("weight[...] = ...", copy)

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
