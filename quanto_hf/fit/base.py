"""What a fit is, and the registry of fits."""

from abc import ABC, abstractmethod
from typing import TypeVar

import torch

from quanto_hf.fit.grid import Grid

FITS: dict[str, "Fit"] = {}

# scale, and zero or None
ScaleZero = tuple[torch.Tensor, torch.Tensor | None]

F = TypeVar("F", bound="type[Fit]")


class Fit(ABC):
    """Finds the scale, and the zero of an asymmetric grid, of groups of values. (optimum-quanto: an optimizer.)"""

    name: str

    @abstractmethod
    def __call__(self, values: torch.Tensor, grid: Grid, dtype: torch.dtype) -> ScaleZero:
        """Scale and zero of each row.

        Args:
            values: float32, shape (groups, values of a group), not changed.
            grid: the numbers that codes can stand for.
            dtype: the dtype in which scale and zero are stored. Both are rounded to it here, before any code is
                chosen with them.

        Returns:
            float32 scale of shape (groups, 1), never 0, and zero of the same shape, None for a symmetric grid.
            The scale of a group with NaN or infinite values is not finite.
        """

    def refuses(self, grid: Grid) -> str | None:
        """Why scales of this grid cannot be found, in one sentence, or None. It is asked before a model is changed."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def register(cls: F) -> F:
    """Class decorator: make the fit known by its name."""
    FITS[cls.name] = cls()
    return cls


def fit_by_name(fit: "Fit | str") -> Fit:
    """The fit of a name; a :class:`Fit` is returned as it is.

    Raises:
        ValueError: there is no fit of this name.
    """
    if isinstance(fit, Fit):
        return fit
    # a list of the names: what is not hashable is no name either
    if fit not in list(FITS):
        raise ValueError(f"fit={fit!r} is not known; choose one of {', '.join(sorted(FITS))}")
    return FITS[fit]


def name_of_fit(fit: Fit | str | None) -> str | None:
    """The name by which :func:`fit_by_name` finds a fit that computes the same, or None: a fit with other arguments
    than the registered one, or of a class of the user's own, has no such name.

    Example:
        >>> from quanto_hf.fit import Hqq
        >>> name_of_fit(Hqq()), name_of_fit(Hqq(p=0.5)), name_of_fit("mse")
        ('hqq', None, 'mse')
    """
    if not isinstance(fit, Fit):
        return fit
    known = FITS.get(getattr(fit, "name", ""))
    # a copy of a layer has a copy of its fit
    same = known is fit or (type(known) is type(fit) and known.__dict__ == fit.__dict__)
    return fit.name if same else None


def stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to the stored dtype, as float32."""
    return tensor.to(dtype).float()


def stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale rounded to the stored dtype; 1 where it is 0 (a group of zeros, or one too small for the dtype)."""
    rounded = stored(scale, dtype)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
