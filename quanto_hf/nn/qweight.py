"""What every module with quantized parameters has in common: its states, how it is packed and read, its float twin."""

from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import nn

from quanto_hf.fit import NO_CONTEXT, Context, Fit
from quanto_hf.nn.slots import Slot
from quanto_hf.nn.twin import FloatTwin
from quanto_hf.nn.weight_view import WeightView
from quanto_hf.nn.weight_writes import refuse_write, write_weight
from quanto_hf.ops.watched import recording


class State(Enum):
    """What a quantized module does with its weight."""

    FLOAT = "float"
    """It holds a float weight and uses it as it is."""
    PREPARED = "prepared"
    """It holds a float weight and rounds it in each forward pass; gradients pass straight through the rounding."""
    FROZEN = "frozen"
    """It holds the weight packed."""


class QuantizedWeight(FloatTwin):
    """Mixin of modules with quantized parameters. The other base is the float module type that it stands for.

    A class declares which parameters are quantized, its *slots* (:class:`quanto_hf.nn.slots.Slot`); without a
    declaration there is one, ``weight``. FROZEN, each is held as Parameters
    (:class:`quanto_hf.nn.stored.StoredParameter`) with the names of the scheme behind that of the slot
    (``weight_packed``, ``weight_scale`` ...), which never have a gradient and never change their dtype. Methods that
    take the ``name`` of a slot mean the only one by None.
    """

    # of a class that declares it, like every other slot: see slot_property
    weight: torch.Tensor

    # the name under which it was put into a model, for errors
    quantized_as: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class an attribute for each slot that it declares."""
        super().__init_subclass__(**kwargs)
        cls.slot_names = tuple(slot.name for slot in cls.declared)
        for name in cls.slot_names:
            if not isinstance(getattr(cls, name, None), property):
                setattr(cls, name, slot_property(name))

    # ------------------------------------------------------------------------------------------------ the weight

    @property
    def is_frozen(self) -> bool:
        """Whether all slots are held quantized."""
        parameters = self._parameters
        for name in self.slot_schemes or self.slot_names:
            if parameters.get(name) is not None:
                return False
        return True

    @property
    def weight_state(self) -> State:
        """What the module does with its weight. (Not ``state``: PEFT takes an attribute of this name for one of
        bitsandbytes, and writes it.)"""
        if self.is_frozen:
            return State.FROZEN
        return State.PREPARED if self.rounding else State.FLOAT

    @property
    def weight_error(self) -> float | None:
        """Relative error of the first slot, on some rows, from when it was frozen."""
        return next(iter(self.slot_errors.values()), None)

    @weight_error.setter
    def weight_error(self, value: float | None) -> None:
        self.slot_errors = {self.slot_names[0]: value}

    def fit_of(self, slot: Slot) -> Fit | str | None:
        """What finds the scales of a slot."""
        return self.fit if self.slot_fits is None else self.slot_fits.get(slot.name)

    def read_slot(self, name: str) -> torch.Tensor:
        """What the attribute of a slot is: the float parameter, or of a packed one a :class:`WeightView`, which is
        dequantized when its values are used. What is written into it is stored if that is exact
        (:func:`quanto_hf.nn.weight_writes.write_weight`), and an error otherwise."""
        weight = self._parameters.get(name)
        if weight is not None:
            return weight
        if recording():
            return self.dequantized(name)
        stored = next(iter(self.tensors(name).values()))
        slot, write = self.slot(name), partial(write_weight, self, name)
        make, part = partial(self.dequantized, name), partial(self.dequantized_part, name)
        whole = not (self.scheme_of(slot).by_rows and slot.rows_first)
        view = WeightView(slot.shape, self.weight_dtype, stored.device, make, write, None if whole else part)
        # transformers initialises tensors that do not have this mark
        view._is_hf_initialized = True  # type: ignore[attr-defined]
        return view

    def rounded(self, name: str | None = None) -> torch.Tensor:
        """The parameter of a slot with the numbers that the module computes with: dequantized, rounded, or as it is in
        state FLOAT. Gradients pass straight through the rounding."""
        slot = self.slot(name)
        weight = self._parameters.get(slot.name)
        if weight is None:
            return self.dequantized(slot.name)
        if not self.rounding or (self.slot_schemes is not None and slot.name not in self.slot_schemes):
            return weight
        with torch.no_grad():
            made = self.scheme_of(slot).dequantize(self.quantized(slot.name), slot.matrix_shape[-1], weight.dtype)
            made = slot.from_matrix(made)
        # the difference is exactly 0: the result is the same number with and without a gradient
        return made + (weight - weight.detach()) if weight.requires_grad else made

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module; refuses a float parameter for a packed slot, which nothing would read, and its view."""
        # pruning and the like register what they have read
        packed = name in (self.slot_schemes or self.slot_names) and self._parameters.get(name) is None
        if packed or isinstance(param, WeightView):
            refuse_write(self, f"{name} = nn.Parameter(...)")
        if param is not None and name in self.stored_names:
            param = self.as_stored(name, param)
        super().register_parameter(name, param)

    @property
    def bias_held(self) -> torch.Tensor | None:
        """The bias: a Parameter, or what pruning or a parametrization has put in its place."""
        parameters = self._parameters
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias
        found: torch.Tensor | None = bias
        return found

    # ------------------------------------------------------------------------------------------------ packing

    def quantized(self, name: str | None = None, context: Context = NO_CONTEXT) -> dict[str, torch.Tensor]:
        """What :meth:`freeze` would store for the float parameter of a slot.

        Args:
            name: of the parameter; None is that of the only slot.
            context: what the fit may use: moments, a seed.
        """
        slot = self.slot(name)
        weight = slot.to_matrix(self.read_slot(slot.name).detach())
        return self.scheme_of(slot).quantize(weight, self.fit_of(slot), context)

    def freeze(self, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Quantize the float parameters of all slots and let go of them. A FROZEN module stays as it is.

        Args:
            tensors: the stored tensors of the only slot, where something else has made them from the weight.

        Raises:
            ValueError: a weight has NaN or infinite values.
        """
        for slot in self.slots:
            self.freeze_slot(slot, tensors)

    def freeze_slot(self, slot: Slot, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """:meth:`freeze` for one slot."""
        weight = self._parameters.get(slot.name)
        if weight is None:
            return
        self.weight_dtype = weight.dtype
        tensors = self.quantized(slot.name) if tensors is None else tensors
        self.slot_errors[slot.name] = self.measure_error(slot.to_matrix(weight.detach()), tensors, slot)
        del self._parameters[slot.name]
        self.set_tensors(tensors, slot.name)

    def measure_error(
        self, matrix: torch.Tensor, tensors: dict[str, torch.Tensor], slot: Slot | None = None, most: int = 64
    ) -> float | None:
        """||Q - W|| / ||W|| over at most 64 evenly spaced rows, which costs next to nothing.

        Args:
            matrix: the float parameter, or some rows, as of :meth:`quanto_hf.nn.slots.Slot.to_matrix`.
            tensors: its stored tensors.
            slot: None is the only one.
        """
        if matrix.numel() == 0 or matrix.device.type == "meta":
            return None
        scheme = self.scheme_of(self.slot() if slot is None else slot)
        if matrix.dim() > 2:
            # stacked: the rows of all
            matrix, tensors = matrix.flatten(0, -2), {part: t.flatten(0, -2) for part, t in tensors.items()}
        last, count = matrix.shape[0] - 1, min(most, matrix.shape[0])
        # in integers: floats of a shorter dtype would name rows that are not there
        rows = torch.arange(count, dtype=torch.int64, device=matrix.device) * last // max(count - 1, 1)
        exact = matrix.detach()[rows].float()
        made = scheme.rows(tensors, rows, matrix.shape[1], torch.float32)
        return float((made - exact).norm() / exact.norm().clamp(min=1e-30))

    # ------------------------------------------------------------------------------------------------ nn.Module

    def reset_parameters(self) -> None:
        """Refused: a quantized module has no random initial weight."""
        refuse_write(self, "reset_parameters()")

    def __prepare_scriptable__(self) -> nn.Module:
        """Refused: torch.jit.script asks for this before it compiles a module.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}; record the model with torch.jit.trace or "
            "torch.export.export, or dequantize it first (quanto_hf.dequantize(model))"
        )

    def _describe_state(self) -> str:
        """The last part of ``extra_repr``."""
        return "" if self.is_frozen else ", not frozen" if self.rounding else ", not rounded"

    def set_rounding(self, rounding: bool) -> None:
        """Let a module that is not FROZEN compute with rounded numbers (PREPARED) or as the float one (FLOAT)."""
        self.rounding = rounding


def slot_property(name: str) -> property:
    """The attribute of a slot: what :meth:`QuantizedWeight.read_slot` gives."""

    def read(self: QuantizedWeight) -> torch.Tensor:
        return self.read_slot(name)

    def write(self: QuantizedWeight, value: Any) -> None:
        refuse_write(self, f"{name} = ...")

    return property(read, write, None, f"The parameter ``{name}`` as a float tensor.")
