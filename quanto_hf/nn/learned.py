"""Scales of a weight that are trained together with it."""

from collections.abc import Mapping

import torch
from torch import nn

from quanto_hf.fit import NO_CONTEXT, Context
from quanto_hf.nn.activation import INPUT_SCALE, QuantizedInput
from quanto_hf.nn.prepared_op import weight_in_graph
from quanto_hf.nn.qweight import QuantizedWeight
from quanto_hf.nn.rounding import SCALE, ZERO, Rounding
from quanto_hf.nn.slots import WEIGHT
from quanto_hf.ops.watched import as_a_node, transformed


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
        """The tensors from which the rounded numbers are computed, by name: those that may have a gradient. The weight
        as the matrix that is quantized."""
        names = (INPUT_SCALE,) if self.is_frozen else (WEIGHT, SCALE, ZERO, INPUT_SCALE)
        held = {name: tensor for name in names if (tensor := self.held(name)) is not None}
        if WEIGHT in held:
            held[WEIGHT] = self.to_matrix(held[WEIGHT])
        return held

    def quantized(self, name: str | None = None, context: Context = NO_CONTEXT) -> dict[str, torch.Tensor]:
        """The stored tensors, or what :meth:`freeze` would store."""
        if self.is_frozen:
            return self.tensors()
        return self.how.stored(self.sources(), context)

    def set_tensors(self, tensors: dict[str, torch.Tensor], name: str | None = None) -> None:
        """Hold these stored tensors; learned scales have become part of them."""
        self._parameters.pop(SCALE, None)
        self._parameters.pop(ZERO, None)
        if isinstance(self, QuantizedInput):
            self.train_input_scale(False)
        super().set_tensors(tensors, name)

    def round_weight(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The matrix of the weight with the numbers of the packed one; gradients pass straight through the rounding.

        Args:
            sources: of :meth:`sources`, or copies of them.
        """
        if self.is_frozen:
            return self.scheme.dequantize(self.tensors(), self.matrix_shape[-1], self.weight_dtype)
        if as_a_node() and not transformed():
            return weight_in_graph(self, self.how, sources)
        return self.how.round_weight(sources)

    @property
    def how(self) -> Rounding:
        """How weight and input are rounded."""
        return Rounding(self.scheme, self.fit, getattr(self, "activations", None))
