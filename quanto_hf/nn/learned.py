"""Scales of a weight that are trained together with it."""

from collections.abc import Mapping

import torch
from torch import nn

from quanto_hf.fit import NO_CONTEXT, Context
from quanto_hf.nn.activation import INPUT_SCALE, QuantizedInput
from quanto_hf.nn.prepared_op import weight_in_graph
from quanto_hf.nn.qweight import QuantizedWeight
from quanto_hf.nn.slots import WEIGHT
from quanto_hf.ops.watched import as_a_node, transformed
from quanto_hf.schemes import Scheme

SCALE, ZERO = "learned_scale", "learned_zero"
SMALLEST = torch.finfo(torch.bfloat16).tiny


def usable(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale that a learned one stands for: not 0, and positive unless the scheme has signed ones, whatever value a
    step of the optimizer gave it. A limit at 0 would have no gradient that leads back, so a positive one is the
    magnitude."""
    if not scheme.signed_scales:
        return scale.abs().clamp(min=SMALLEST)
    # its gradient is that of the scale as it is, on its way through 0 too
    with torch.no_grad():
        away = torch.full_like(scale, SMALLEST).copysign(scale)
        short = torch.where(scale.abs() < SMALLEST, away - scale, torch.zeros_like(scale))
    return scale + short


class LearnedScales(QuantizedWeight):
    """Mixin: what of a PREPARED module has gradients, and how its weight is rounded with them.

    With :meth:`learn_scales` a module holds ``learned_scale``, and ``learned_zero`` if the scheme is asymmetric:
    float32 Parameters of the shapes in which they will be stored. :meth:`freeze` uses them instead of a fit. The
    gradients are those of :meth:`quanto_hf.schemes.Scheme.fake_quantize`.
    """

    def learn_scales(self) -> None:
        """Make scales (and zeros) trainable, from those that the fit finds now. Also a static scale of the input.

        Raises:
            ValueError: the module is FROZEN, or its scheme has no scales to learn. Nothing has been changed then.
        """
        if self.is_frozen:
            raise ValueError(f"{self} is frozen: its scales cannot be learned. Prepare the float model")
        if (reason := self.scheme.refuses_learning()) is not None:
            raise ValueError(reason)
        found = self.scheme.quantize(self.to_matrix(self.weight.detach()), self.fit)
        for name, part in ((SCALE, "scale"), (ZERO, "zero")):
            if part in found:
                self._parameters[name] = nn.Parameter(self.scheme.read_scale(found[part]))
        if isinstance(self, QuantizedInput):
            self.train_input_scale(True)

    @property
    def learns(self) -> bool:
        """Whether scales of the weight are trained."""
        return self._parameters.get(SCALE) is not None

    @property
    def kept_names(self) -> tuple[str, ...]:
        """See :class:`QuantizedWeight`."""
        return (*super().kept_names, SCALE, ZERO)

    def expect_learned(self) -> None:
        """Hold empty scales (and zeros) on meta, for a state dict to fill, as :meth:`learn_scales` would."""
        for name, spec in self.scheme.tensors(self.matrix_shape, self.weight_dtype).items():
            if name in ("scale", "zero"):
                self._parameters[f"learned_{name}"] = nn.Parameter(
                    torch.empty(spec.shape, dtype=torch.float32, device="meta")
                )
        if isinstance(self, QuantizedInput):
            self.train_input_scale(True)

    def sources(self) -> dict[str, torch.Tensor]:
        """The tensors from which the rounded numbers are computed, by name: those that may have a gradient."""
        names = (INPUT_SCALE,) if self.is_frozen else (WEIGHT, SCALE, ZERO, INPUT_SCALE)
        return {name: tensor for name in names if (tensor := self.held(name)) is not None}

    def quantized(self, name: str | None = None, context: Context = NO_CONTEXT) -> dict[str, torch.Tensor]:
        """The stored tensors, or what :meth:`freeze` would store."""
        if self.is_frozen:
            return self.tensors()
        if (scale := self._parameters.get(SCALE)) is None:
            return super().quantized(name, context)
        return self.scheme.encode(self.to_matrix(self.weight), usable(scale, self.scheme), self._parameters.get(ZERO))

    def set_tensors(self, tensors: dict[str, torch.Tensor], name: str | None = None) -> None:
        """Hold these stored tensors; learned scales have become part of them."""
        self._parameters.pop(SCALE, None)
        self._parameters.pop(ZERO, None)
        if isinstance(self, QuantizedInput):
            self.train_input_scale(False)
        super().set_tensors(tensors, name)

    def round_weight(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float weight with the numbers of the packed one; gradients pass straight through the rounding.

        Args:
            sources: of :meth:`sources`, or copies of them.
        """
        if self.is_frozen:
            return self.dequantized()
        matrix = self.to_matrix(sources[WEIGHT])
        if as_a_node() and not transformed():
            return self.from_matrix(weight_in_graph(self, matrix, sources))
        return self.from_matrix(self.round_matrix(matrix, sources))

    def round_matrix(self, matrix: torch.Tensor, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """:meth:`round_weight` of a PREPARED module for the weight as a matrix.

        Args:
            matrix: of :meth:`to_matrix`.
            sources: learned scales and zeros, if there are any, by their names.
        """
        scale, zero = sources.get(SCALE), sources.get(ZERO)
        if scale is not None:
            return self.scheme.fake_quantize(matrix, usable(scale, self.scheme), zero).to(matrix.dtype)
        with torch.no_grad():
            stored = self.scheme.quantize(matrix, self.fit)
            rounded = self.scheme.dequantize(stored, matrix.shape[1], matrix.dtype)
        # the difference is exactly 0: the result is the same number with and without a gradient
        return rounded + (matrix - matrix.detach()) if matrix.requires_grad else rounded
