"""What reading ``weight`` of a frozen layer gives: a tensor that is dequantized when its values are needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


class WeightView(torch.Tensor):
    """A float view of a quantized weight.

    Shape, dtype and device cost nothing: T5 asks for the dtype at every step. Any operation dequantizes the weight
    and returns plain tensors, which are copies: ``weight.T`` or ``weight[0]`` does not lead back to the layer. One
    entry along the first dimension is dequantized alone: ``weight[0]`` of stacked experts, and
    ``weight.view(experts, inner, width)[0]``. What is written into the view itself, or into its ``data``, is handed to
    the layer, which stores it or refuses. It is made anew at each read and never stored.

    Args:
        shape: of the weight.
        dtype: of the weight.
        device: of the weight.
        make: dequantizes the weight.
        write: takes the name of an operation, and what it has made of the weight.
        part: dequantizes the entries from one to another along the first dimension; None where that is no less work.
    """

    _make: Callable[[], torch.Tensor]
    _part: Callable[[int, int], torch.Tensor] | None
    _write: Callable[[str, torch.Tensor], None]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], torch.Tensor],
        write: Callable[[str, torch.Tensor], None],
        part: Callable[[int, int], torch.Tensor] | None = None,
    ) -> "WeightView":
        """See the class."""
        view: WeightView = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._make, view._write, view._part = make, write, part
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
        if not kwargs and func in PARTS and isinstance(args[0], WeightView) and args[0]._part is not None:
            if (found := PARTS[func](*args)) is not None:
                return found
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


# ------------------------------------------------------------------------------------------------ parts of a weight


def _select(view: WeightView, dim: int, index: int) -> torch.Tensor | None:
    """One entry along the first dimension."""
    if dim != 0 or not -len(view) <= index < len(view):
        return None
    assert view._part is not None
    index = index + len(view) if index < 0 else index
    return view._part(index, index + 1)[0]


def _split_rows(view: WeightView, shape: list[int]) -> torch.Tensor | None:
    """The view of a weight of two dimensions as a stack of matrices, which still is one."""
    free = -1 in shape
    known = torch.Size(size for size in shape if size != -1).numel()
    sizes = [view.numel() // known if size == -1 else size for size in shape] if known else shape
    if view.dim() != 2 or len(sizes) != 3 or sizes[2] != view.shape[1] or (free and view.numel() % known):
        return None
    part, each = view._part, sizes[1]
    assert part is not None

    def rows(begin: int, end: int) -> torch.Tensor:
        return part(begin * each, end * each).view(end - begin, each, -1)

    def write(operation: str, value: torch.Tensor) -> None:
        view._write(operation, value.reshape(view.shape))

    return WeightView(tuple(sizes), view.dtype, view.device, lambda: view.dequantize().view(sizes), write, rows)


PARTS: dict[Any, Callable[..., torch.Tensor | None]] = {
    torch.ops.aten.select.int: _select,
    torch.ops.aten.view.default: _split_rows,
}
