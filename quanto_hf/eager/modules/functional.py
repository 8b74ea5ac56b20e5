"""Operations that are no modules, such as the addition of a residual, as modules that can be observed."""

from collections.abc import Sequence

import torch
from torch import nn

from quanto_hf.eager.modules.on_grid import OnGrid


class Functional(nn.Module):
    """The operations, with a rounding of the output that subclasses define."""

    # whether it was called, and only with numbers, which needs no grid; None if it was not called
    only_scalars: bool | None = None

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """What happens to an output."""
        raise NotImplementedError

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Refused: it is an operation that is called, by its name.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{type(self).__name__} is not called itself; call its add, mul, cat, matmul ...")

    def _scalar(self) -> None:
        """What happens when a scalar comes: nothing, once a grid has been taken or was not needed."""

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x + y."""
        return self.finish(torch.add(x, y))

    def add_relu(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """ReLU of x + y."""
        return self.finish(torch.add(x, y).relu())

    def mul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x * y."""
        return self.finish(torch.mul(x, y))

    def matmul(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x @ y."""
        return self.finish(torch.matmul(x, y))

    def cat(self, x: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        """The tensors of ``x`` side by side in dimension ``dim``."""
        return self.finish(torch.cat(list(x), dim=dim))

    def add_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        """x + y for a number y: the codes of x with another zero point, so that nothing is rounded."""
        self._scalar()
        return torch.add(x, y)

    def mul_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        """x * y for a number y: the codes of x with another scale, so that nothing is rounded."""
        self._scalar()
        return torch.mul(x, y)


class FloatFunctional(Functional):
    """Operations on float tensors, whose outputs ``prepare`` observes.

    Example:
        >>> FloatFunctional().add(torch.ones(2), torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_post_process: nn.Module = nn.Identity()

    def _scalar(self) -> None:
        """Noted. Setting an attribute in a compiled graph would make another graph."""
        if self.only_scalars is None and not torch.compiler.is_compiling():
            self.only_scalars = True

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Observed."""
        self.only_scalars = False
        observed: torch.Tensor = self.activation_post_process(out)
        return observed


class QFunctional(OnGrid, Functional):
    """Operations whose outputs are on the grid of an observer."""

    def take_grid(self, mod: nn.Module) -> None:
        """Take over the scale and the zero point that the observer of ``mod`` has found.

        An operation that calibration has called with scalars only has no grid, and needs none.

        Raises:
            RuntimeError: the observer has seen nothing.
            QConfigError: there is no observer.
        """
        if not self.only_scalars:
            super().take_grid(mod)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """On the grid.

        Raises:
            RuntimeError: there is none.
        """
        if self.only_scalars:
            raise RuntimeError(
                "this QFunctional has no scale: calibration has called only its add_scalar and mul_scalar. Run the "
                "prepared model on data that reaches its other operations before you convert it"
            )
        return self.on_grid(out)
