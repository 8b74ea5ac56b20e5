"""The stored tensors of a module as torch sees them: Parameters that are moved, saved and loaded, never converted."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from quanto_hf.nn.activation import INPUT_SCALE
from quanto_hf.nn.bound_call import BoundCall, Call
from quanto_hf.nn.saved_by import layer_is_made, refuse_unknown_saver
from quanto_hf.nn.slots import WEIGHT, Slot
from quanto_hf.nn.stored import StoredParameter, plain, stored_parameter
from quanto_hf.schemes import Scheme

H = TypeVar("H", bound="HoldsStored")

# what was made of an ordinary parameter, as an attribute of it
STORED = "quanto_hf_stored"


class HoldsStored(nn.Module):
    """Base of :class:`quanto_hf.nn.QuantizedWeight`: its slots, and what it holds for those that are packed."""

    # the slots of the class, without shapes
    declared: ClassVar[tuple[Slot, ...]] = (Slot(WEIGHT),)
    # their names
    slot_names: ClassVar[tuple[str, ...]] = (WEIGHT,)

    scheme: Scheme
    # Slot name -> scheme, for a module whose slots are not all stored by ``scheme``: one that is not there stays float.
    slot_schemes: Mapping[str, Scheme] | None = None
    # Slot name -> shape of the float parameter, of a class that does not compute ``weight_shape``
    slot_shapes: Mapping[str, tuple[int, ...]]
    # float dtype of the parameters when they are read
    weight_dtype: torch.dtype
    # it must not outlive the tensors that it was made for
    _bound: BoundCall | None

    # ------------------------------------------------------------------------------------------------ the slots

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float parameter of a module with one slot."""
        return self.slot_shapes[self.slot_names[0]]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that are quantized."""
        return tuple([self.slot(name) for name in self.slot_schemes or self.slot_names])

    def _declared_slots(self) -> tuple[Slot, ...]:
        """:attr:`slots` without shapes, which names do not need: a layer is asked for these 10 times while it is
        loaded."""
        if not self.slot_schemes:
            return self.declared
        return tuple(self.declared[self.slot_names.index(name)] for name in self.slot_schemes)

    def slot(self, name: str | None = None) -> Slot:
        """A slot of this module; None is the only one.

        Raises:
            ValueError: there are several.
        """
        if len(self.slot_names) == 1:
            return self.declared[0].of(self.weight_shape)
        if name is None:
            raise ValueError(f"{type(self).__name__} has several quantized parameters: {', '.join(self.slot_names)}")
        return self.declared[self.slot_names.index(name)].of(self.slot_shapes[name])

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the only slot as it is stored."""
        rows, columns = self.slot().matrix_shape
        return rows, columns

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter of the only slot as the matrix that is quantized, each row an output."""
        return self.slot().to_matrix(weight)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_matrix`."""
        return self.slot().from_matrix(matrix)

    def scheme_of(self, slot: Slot) -> Scheme:
        """How a slot is stored."""
        return self.scheme if self.slot_schemes is None else self.slot_schemes[slot.name]

    def slot_stored_as(self, name: str) -> Slot | None:
        """The slot that a stored tensor of this name belongs to."""
        found = (slot for slot in self._declared_slots() if name in slot.names(self.scheme_of(slot)))
        return next((self.slot(slot.name) for slot in found), None)

    # ------------------------------------------------------------------------------------------------ their tensors

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold packed weights."""
        return tuple([name for slot in self._declared_slots() for name in slot.names(self.scheme_of(slot))])

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the tensors that keep their dtype whatever the model is converted to."""
        return (*self.stored_names, INPUT_SCALE)

    def holds(self, slot: Slot) -> bool:
        """Whether a slot is held packed, or its empty tensors are there to be filled."""
        return any(self._parameters.get(name) is not None for name in slot.names(self.scheme_of(slot)))

    def held(self, name: str) -> torch.Tensor | None:
        """A parameter or buffer, or None."""
        held = self._parameters.get(name)
        return held if held is not None else self._buffers.get(name)

    def tensors(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """The stored tensors of a slot by the names of the scheme; empty unless it is packed.

        Args:
            name: of the slot; None is the only one.
        """
        slot = self.slot(name)
        held: dict[str, torch.Tensor] = {
            part: tensor
            for part in self.scheme_of(slot).names
            if (tensor := self._parameters.get(slot.stored(part))) is not None
        }
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            # make_fx takes constants of the types Tensor and Parameter only
            with _disable_current_modes():
                return {part: as_tensor(tensor) for part, tensor in held.items()}
        return held

    def dequantized(self, name: str | None = None) -> torch.Tensor:
        """The parameter of a packed slot as a new plain tensor in ``weight_dtype``."""
        slot = self.slot(name)
        columns = slot.matrix_shape[-1]
        return slot.from_matrix(self.scheme_of(slot).dequantize(self.tensors(slot.name), columns, self.weight_dtype))

    def dequantized_part(self, name: str | None, begin: int, end: int) -> torch.Tensor:
        """:meth:`dequantized` for the entries from ``begin`` to ``end`` along the first dimension of the parameter of a
        slot whose rows are stored each on its own."""
        slot = self.slot(name)
        part = slot.of((end - begin, *slot.shape[1:]))
        # stored rows follow each other as those of the parameter do
        each = {key: len(tensor) // slot.shape[0] for key, tensor in self.tensors(slot.name).items()}
        held = {key: tensor[begin * each[key] : end * each[key]] for key, tensor in self.tensors(slot.name).items()}
        return part.from_matrix(self.scheme_of(slot).dequantize(held, part.matrix_shape[-1], self.weight_dtype))

    def set_tensors(self, tensors: dict[str, torch.Tensor], name: str | None = None) -> None:
        """Hold these stored tensors, named as by the scheme, for a slot."""
        # lets go of the tensors that were held before
        self._bound = None
        slot = self.slot(name)
        for part, tensor in tensors.items():
            name = slot.stored(part)
            self._parameters[name] = self.as_stored(name, tensor, slot)
        # the others last, as in a module that was made frozen
        stored = self.stored_names
        for other in [other for other in self._parameters if other not in stored]:
            self._parameters[other] = self._parameters.pop(other)

    def make_empty(self, device: torch.device | str = "meta") -> None:
        """Let go of the float parameters of all slots for empty stored tensors, for a state dict to fill."""
        for slot in self.slots:
            self._parameters.pop(slot.name, None)
            specs = self.scheme_of(slot).tensors(slot.matrix_shape, self.weight_dtype)
            empty = {part: torch.empty(s.shape, dtype=s.dtype, device=device) for part, s in specs.items()}
            self.set_tensors(empty, slot.name)

    def as_stored(self, name: str, tensor: torch.Tensor, slot: Slot | None = None) -> nn.Parameter:
        """A tensor as the parameter that holds it under one of :attr:`stored_names`.

        Args:
            slot: that it is of; None: it is looked up.
        """
        if isinstance(tensor, StoredParameter):
            return tensor
        known = vars(tensor).get(STORED) if isinstance(tensor, nn.Parameter) else None
        if known is not None and known.device == tensor.device and known.data_ptr() == tensor.data_ptr():
            # the other layer of a tied pair has made it of the same parameter, which came out of a pickle
            return known  # type: ignore[no-any-return]
        slot = self.slot_stored_as(name) if slot is None else slot
        assert slot is not None
        first, count = _first_stored(slot, self.scheme_of(slot), self.weight_dtype)
        made = stored_parameter(tensor, count if name == first else None, like=tensor)
        if isinstance(tensor, nn.Parameter) and made is not tensor:
            vars(made).pop(STORED, None)
            vars(tensor)[STORED] = made
        return made

    def _hold_stored(self) -> None:
        """Make what torch has put in place of stored tensors stored tensors again."""
        self._bound = None
        for name in self.stored_names:
            if (tensor := self._parameters.get(name)) is not None:
                self._parameters[name] = self.as_stored(name, tensor)

    # ------------------------------------------------------------------------------------------------ the bound call

    def bound_call(self) -> Call | None:
        """The call that is bound to the stored tensors that are held, or None where there is none."""
        bound, scale = self._bound, self._buffers.get(INPUT_SCALE)
        if bound is None or bound.input_scale is not scale or not bound.fits(self._parameters):
            tensors = self.tensors()
            call = self._bind_stored(tensors) if tensors else None
            held = BoundCall.holding(self.stored_names, self._parameters)
            bound = self._bound = BoundCall(call, held, scale)
        return bound.call

    def _bind_stored(self, tensors: Mapping[str, torch.Tensor]) -> Call | None:
        """What :meth:`bound_call` keeps for these stored tensors; a module type that has such a call makes it here."""
        return None

    # ------------------------------------------------------------------------------------------------ nn.Module

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the bound call, which knows addresses in memory."""
        return {**self.__dict__, "_bound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of nn.Module."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold_stored()
        layer_is_made()

    def _apply(self: H, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> H:
        """Moves everything; converts the dtype of the bias and of ``weight``, never that of the stored tensors."""
        kept = {id(self.held(name)) for name in self.kept_names}
        # what a bound call knows may be elsewhere now
        self._bound = None

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) not in kept:
                return result
            # plain: torch makes a Parameter of it where parameters are swapped or overwritten on conversion
            return plain(result if result.dtype == tensor.dtype else tensor.to(result.device))

        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        # torch makes ordinary parameters where the type of device changes
        self._hold_stored()
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu"))
        if probe.is_floating_point():
            self.weight_dtype = probe.dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As of nn.Module.

        Raises:
            ValueError: the ``save_pretrained`` that asks writes what its ``from_pretrained`` does not read.
        """
        refuse_unknown_saver(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: Any
    ) -> None:
        """As of nn.Module; a stored tensor of another dtype is an error, not a conversion."""
        errors = args[-1]
        for name in self.slot_schemes or self.slot_names:
            guard = state_dict.get(prefix + name)
            if self._parameters.get(name) is None and isinstance(guard, torch.Tensor) and guard.shape == (0,):
                # the files of a saved model have an empty tensor under this name (docs/format.md)
                state_dict = {key: value for key, value in state_dict.items() if key != prefix + name}
        for name in self.kept_names:
            tensor, key = self.held(name), prefix + name
            if tensor is None:
                continue
            given = state_dict.get(key)
            if isinstance(given, torch.Tensor) and given.dtype != tensor.dtype:
                errors.append(f"dtype mismatch for {key}: the state dict has {given.dtype}, {self} has {tensor.dtype}")
                # go on with what is held already, so that the other bad keys are named as well
                state_dict = {**state_dict, key: tensor}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)
        # torch may have swapped them
        self._hold_stored()


@lru_cache(maxsize=1024)
def _first_stored(slot: Slot, scheme: Scheme, dtype: torch.dtype) -> tuple[str, int | None]:
    """Name of the first stored tensor of a slot, and how many numbers it counts: scales and zeros count themselves, so
    that together they are as many as the weights, unless these are fewer."""
    (first, _), *others = slot.specs(scheme, dtype).items()
    count = slot.numel - sum(torch.Size(spec.shape).numel() for _, spec in others)
    return first, count if count > 0 else None


def as_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor as a plain one, another as it is."""
    return tensor.data if isinstance(tensor, StoredParameter) else tensor
