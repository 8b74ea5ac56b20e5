"""What a fit is, what it may know of a weight besides its values, and the registry of fits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch

from quanto_hf.fit.grid import Grid
from quanto_hf.fit.scales import ScaleType

FITS: dict[str, "Fit"] = {}

# scale, and zero or None
ScaleZero = tuple[torch.Tensor, torch.Tensor | None]

F = TypeVar("F", bound="type[Fit]")


@dataclass(frozen=True, eq=False)
class Context:
    """What is known of one weight besides its values while it is quantized.

    Args:
        moment: second moment of the inputs of its layer, ``X.T @ X / n`` for n rows X: float32, shape
            (in_features, in_features), on any device; None: no data.
        seed: of what is drawn at random.
        iterations: rounds of a fit that improves its result step by step; None is its own number.
        progress: called with the steps that are done and all steps.
    """

    moment: torch.Tensor | None = None
    seed: int = 0
    iterations: int | None = None
    progress: Callable[[int, int], object] | None = None


NO_CONTEXT = Context()


class Rounded(NamedTuple):
    """What :meth:`Fit.round_rows` found.

    Args:
        codes: the storage dtype of the number type, not packed, shape (rows, columns).
        scale: float32, rounded to the scale type, shape (rows, groups).
        zero: as ``scale``, or None for a symmetric grid.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


class Fit(ABC):
    """Finds the scale, and the zero of an asymmetric grid, of groups of values. (optimum-quanto: an optimizer.)"""

    name: str
    # whether it makes use of Context.moment: then ``freeze(model, data)`` collects it, and :meth:`round_rows` is asked
    wants_moments: ClassVar[bool] = False
    # bytes of reused buffers and temporaries per value, in torch; a fit that says nothing is taken to be as hungry as
    # the hungriest one. Measured peaks: 11 (int8) to 21 (int4, odd width), 25 (nf4), 45 (hqq).
    block_bytes: ClassVar[int] = 48

    @abstractmethod
    def __call__(self, values: torch.Tensor, grid: Grid, kind: ScaleType) -> ScaleZero:
        """Scale and zero of each row.

        Args:
            values: float32, shape (groups, values of a group), not changed.
            grid: the numbers that codes can stand for.
            kind: how scale and zero are stored. Both are rounded to it here, before any code is chosen with them.

        Returns:
            float32 scale of shape (groups, 1), never 0, and zero of the same shape, None for a symmetric grid.
            The scale of a group with NaN or infinite values is not finite.
        """

    def round_rows(
        self, rows: torch.Tensor, grid: Grid, kind: ScaleType, group_size: int, context: Context
    ) -> Rounded | None:
        """Codes, scales and zeros of a whole weight, asked of a fit with ``wants_moments``: it may choose other codes
        than the nearest ones, and make up in one column for the error of those before it.

        Args:
            rows: float32, shape (rows, columns), finite, not changed.
            grid: as of a call.
            kind: as of a call.
            group_size: columns that share a scale, -1 for whole rows; the last group may be shorter.
            context: ``moment`` is None where no data reached the layer.

        Returns:
            None: the codes are the nearest ones, with the scale and zero that a call finds for each group.
        """
        return None

    def refuses(self, grid: Grid) -> str | None:
        """Why scales of this grid cannot be found, in one sentence, or None. It is asked before a model is changed."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


# what a caller may give for a fit: one, its name, or None for the default
AnyFit = Fit | str | None


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


def name_of_fit(fit: AnyFit) -> str | None:
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


def stored_scale(scale: torch.Tensor, kind: ScaleType) -> torch.Tensor:
    """A scale rounded to its type; 1 where it is 0 (a group of zeros, or one too small for the type)."""
    rounded = kind.round(scale)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
