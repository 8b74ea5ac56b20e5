"""What is quantized: a slot, which is a parameter of a module together with its view as a matrix."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from quanto_hf.schemes import Scheme, TensorSpec

# The parameter of linear layers, convolutions and embeddings. Patterns, saved schemes and plans call its slot by the
# name of the module alone.
WEIGHT = "weight"


@dataclass(frozen=True)
class Slot:
    """A parameter that can be quantized. A scheme sees it as a matrix, each row of which gives one output.

    A module class declares its slots without shapes (:attr:`quanto_hf.nn.QuantizedWeight.declared`); those of a module
    have the shape of its parameter (:meth:`of`).

    Args:
        name: of the float parameter in its module.
        shape: of the float parameter.
        leading: number of dimensions in front that are no part of the matrix: 1 for stacked experts.
        transposed: whether outputs are the second dimension after the leading ones, and inputs the first: GPT-2's
            Conv1D, transposed convolutions, some experts.
        prefix: what the stored tensors' names begin with, before the names of the scheme; None is ``name_``.

    Example:
        >>> from quanto_hf.schemes import make_scheme
        >>> slot = Slot("up", (4, 64, 24), leading=1, transposed=True)
        >>> slot.matrix_shape, list(slot.specs(make_scheme("int8"), torch.bfloat16)), slot.label("mlp.experts")
        ((4, 24, 64), ['up_packed', 'up_scale'], 'mlp.experts.up')
    """

    name: str
    shape: tuple[int, ...] = ()
    leading: int = 0
    transposed: bool = False
    prefix: str | None = None

    def of(self, shape: tuple[int, ...]) -> "Slot":
        """The same slot of a parameter of this shape, or of a piece of it."""
        # a graph warns of what is kept
        return replace(self, shape=tuple(shape)) if torch.compiler.is_compiling() else _slot_of(self, tuple(shape))

    # ------------------------------------------------------------------------------------------------ as a matrix

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*leading, rows, columns)"""
        rows, *others = self._rows_first()
        return (*self.shape[: self.leading], rows, torch.Size(others).numel())

    def to_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """The float parameter as :attr:`matrix_shape`: itself, or a view of it."""
        if not self.transposed and tensor.dim() == self.leading + 2:
            return tensor
        return self._swapped(tensor).reshape(self.matrix_shape)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_matrix`."""
        made = matrix.view(*self.shape[: self.leading], *self._rows_first())
        return self._swapped(made).contiguous() if self.transposed else made

    @property
    def rows_first(self) -> bool:
        """Whether pieces along the first dimension of the parameter are pieces of the matrix, so that each can be
        quantized alone."""
        return self.leading > 0 or not self.transposed

    def _rows_first(self) -> tuple[int, ...]:
        """The dimensions after the leading ones, rows first."""
        first, *others = self.shape[self.leading :]
        return (others[0], first, *others[1:]) if self.transposed else (first, *others)

    def _swapped(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(self.leading, self.leading + 1) if self.transposed else tensor

    def pieces(self, shapes: list[tuple[int, ...]]) -> list["Slot"]:
        """The slots of pieces along the first dimension of the parameter; none if they do not make up the whole."""
        same = all(len(shape) == len(self.shape) and shape[1:] == self.shape[1:] for shape in shapes)
        whole = same and sum(shape[0] for shape in shapes) == self.shape[0]
        return [self.of(shape) for shape in shapes] if whole else []

    # ------------------------------------------------------------------------------------------------ as stored

    def stored(self, part: str) -> str:
        """Name in the module of a stored tensor, by its name in the scheme."""
        return (f"{self.name}_" if self.prefix is None else self.prefix) + part

    def names(self, scheme: "Scheme") -> tuple[str, ...]:
        """Names in the module of all stored tensors."""
        prefix = self.stored("")
        return tuple([prefix + part for part in scheme.names])

    def specs(self, scheme: "Scheme", dtype: torch.dtype) -> dict[str, "TensorSpec"]:
        """Name in the module -> shape and dtype of each stored tensor.

        Args:
            dtype: of the float parameter.
        """
        return {self.stored(part): spec for part, spec in scheme.tensors(self.matrix_shape, dtype).items()}

    @property
    def numel(self) -> int:
        """Elements of the float parameter."""
        return torch.Size(self.shape).numel()

    # ------------------------------------------------------------------------------------------------ its names

    def full(self, owner: str) -> str:
        """Full name of the float parameter in a model."""
        return joined(owner, self.name)

    def label(self, owner: str) -> str:
        """What patterns, plans and saved schemes call the slot; see :func:`label`."""
        return label(owner, self.name)


@lru_cache(maxsize=1024)
def _slot_of(slot: Slot, shape: tuple[int, ...]) -> Slot:
    # Kept: a layer is asked for its slots 30 times while it is loaded, and a model has few shapes.
    return replace(slot, shape=shape)


def joined(owner: str, leaf: str) -> str:
    """Full name of what a module calls ``leaf``."""
    return f"{owner}.{leaf}" if owner else leaf


def label(owner: str, leaf: str) -> str:
    """What patterns, plans and saved schemes call a parameter: its full name, without ``.weight``."""
    return owner if leaf == WEIGHT else joined(owner, leaf)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The same as ``model.get_submodule(name)``, in a fifth of the time where each module is a child of the one before:
    this is asked 10 times for each slot while a model is loaded.

    Raises:
        AttributeError: there is no such module.
    """
    found: nn.Module | None = model
    for part in name.split(".") if name else ():
        found = found._modules.get(part) if found is not None else None
    return model.get_submodule(name) if found is None else found


def find(model: nn.Module, name: str) -> tuple[str, str]:
    """Name of the module that a :func:`label` is about, and the parameter's name in it.

    Example:
        >>> find(nn.Sequential(nn.Linear(2, 2)), "0"), find(nn.Sequential(nn.Linear(2, 2)), "0.bias")
        (('0', 'weight'), ('0', 'bias'))
    """
    try:
        module_at(model, name)
    except AttributeError:
        owner, _, leaf = name.rpartition(".")
        return owner, leaf
    return name, WEIGHT


# The reasons why parameters of a module were left in float, by their names in it. A model keeps them for its report.
LEFT = "quanto_hf_left"


def note_left(module: nn.Module, leaf: str, reason: str) -> None:
    """Let a module know why a parameter of it stays float."""
    vars(module)[LEFT] = {**vars(module).get(LEFT, {}), leaf: reason}


def why_left(module: nn.Module, leaf: str) -> str | None:
    """What :func:`note_left` noted, or None."""
    reason: str | None = vars(module).get(LEFT, {}).get(leaf)
    return reason
