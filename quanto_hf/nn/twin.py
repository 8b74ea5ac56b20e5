"""A quantized module and the float one that it stands for: made from it, and turned into one again."""

import copy
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import nn

from quanto_hf.fit import Fit
from quanto_hf.nn.held import HoldsStored
from quanto_hf.nn.saved_by import layer_is_made
from quanto_hf.nn.slots import note_left
from quanto_hf.nn.subclasses import own_attributes, source_class
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme

Fits = Fit | str | None | Mapping[str, Fit | str | None]


class FloatTwin(HoldsStored):
    """Base of :class:`quanto_hf.nn.QuantizedWeight`: how it takes over a float module, and gives one back."""

    # attributes that the float module has from its arguments
    constants: ClassVar[tuple[str, ...]] = ()
    # set by register_qmodule: the verbs that quantize such modules without being asked, and the float type
    by_default: ClassVar[frozenset[str]] = frozenset()
    # when other verbs quantize them, for the report
    on_request: ClassVar[str] = "where a pattern names it"
    stands_for: ClassVar[type[nn.Module]]
    # whether the quantized class of a subclass with a forward pass of its own runs that, and is its super().forward
    keeps_forward: ClassVar[bool] = False

    fit: Fit | str | None
    # slot name -> fit, as ``slot_schemes``
    slot_fits: Mapping[str, Fit | str | None] | None = None
    # whether a float weight is rounded in the forward pass
    rounding: bool
    # slot name -> relative error of the parameter, on some rows, from when it was frozen
    slot_errors: dict[str, float | None]
    # names of the attributes, and of the buffers and modules, of the float module that it has too
    handed_on: tuple[str, ...] = ()
    parts_taken: tuple[str, ...] = ()

    @classmethod
    def from_module(
        cls, module: Any, scheme: Any, activations: QType | None = None, fit: Any = None, static: bool = False
    ) -> Any:
        """A PREPARED module that shares its parameters with a float one.

        Args:
            module: the float module.
            scheme: how all slots are stored; or slot name -> scheme, where a slot that is not there stays float.
            activations: number type to which inputs are rounded, or None. Where inputs cannot be rounded, as those of
                an embedding, it is not used.
            fit: what finds the scales, None for the default of the scheme; or slot name -> fit.
            static: whether inputs are rounded with one scale that calibration finds, and not with those of each token.

        Raises:
            ValueError: :meth:`refuses_module` has a reason.
        """
        if (reason := cls.refuses_module(module)) is not None:
            raise ValueError(reason)
        made = cls.__new__(cls)
        made._adopt(module, scheme, fit)
        made._take_activations(activations, static)
        return made

    def _take_activations(self, activations: QType | None, static: bool) -> None:
        """Round inputs as :meth:`from_module` was told to; modules that do so have a method of their own."""

    @classmethod
    def refuses_module(cls, module: nn.Module) -> str | None:
        """Why a float module of the type that this class stands for cannot be quantized, or None."""
        return None

    def _setup(self, scheme: Scheme | Mapping[str, Scheme], dtype: torch.dtype | None, fit: Fits = None) -> None:
        """What a constructor sets after nn.Module's, before there are parameters."""
        if isinstance(scheme, Mapping):
            if len(self.slot_names) > 1:
                self.slot_schemes = dict(scheme)
            scheme = next(iter(scheme.values()))
        if isinstance(fit, Mapping):
            if len(self.slot_names) > 1:
                self.slot_fits = dict(fit)
            fit = next(iter(fit.values()))
        self.scheme, self.fit = scheme, fit
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.slot_errors = {}
        self.rounding = True
        self._bound = None
        layer_is_made()

    def _adopt(self, module: nn.Module, scheme: Scheme | Mapping[str, Scheme], fit: Fits) -> None:
        """Become a PREPARED module that shares its parameters with a float one."""
        nn.Module.__init__(self)
        own = own_attributes(module)
        vars(self).update(own)
        # in_features and the like are among them
        self.handed_on = tuple({*own, *self.constants})
        floats: dict[str, torch.Tensor] = {name: getattr(module, name) for name in self.slot_names}
        self.slot_shapes = {name: tuple(weight.shape) for name, weight in floats.items()}
        self._setup(scheme, next(iter(floats.values())).dtype, fit)
        # the weight first, as in the float module: optimizers know parameters by their order
        for name, parameter in module._parameters.items():
            self._parameters[name] = parameter
        computed = {name: w for name, w in floats.items() if name not in self._parameters}
        # a parametrized weight is computed from other parameters: from here on it is one
        made = {name: nn.Parameter(weight.detach().clone()) for name, weight in computed.items()}
        self._parameters = {**made, **self._parameters}
        if not computed:
            self._buffers.update(module._buffers)
            self._non_persistent_buffers_set |= module._non_persistent_buffers_set
            self._modules.update(module._modules)
            self.parts_taken = (*module._buffers, *module._modules)
        self.train(module.training)

    def plain(self, weight: Any) -> nn.Module:
        """A float module of the type that this one stands for, with this weight and the same other parameters.

        Args:
            weight: the parameter of the only slot, or slot name -> parameter.
        """
        floats = weight if isinstance(weight, Mapping) else {self.slot().name: weight}
        kind: Any = source_class(type(self))
        module: nn.Module = kind.__new__(kind)
        nn.Module.__init__(module)
        for name in self.handed_on or self.constants:
            if hasattr(self, name):
                vars(module)[name] = getattr(self, name)
        module._parameters.update({name: nn.Parameter(tensor) for name, tensor in floats.items()})
        others = {name: tensor for name, tensor in self._parameters.items() if name not in self.kept_names}
        module._parameters.update({name: tensor for name, tensor in others.items() if name not in floats})
        module._buffers.update({name: self._buffers[name] for name in self.parts_taken if name in self._buffers})
        module._non_persistent_buffers_set |= self._non_persistent_buffers_set & {*self.parts_taken}
        module._modules.update({name: self._modules[name] for name in self.parts_taken if name in self._modules})
        return module.train(self.training)

    def empty_float(self, reason: str) -> nn.Module:
        """A float module with empty parameters on meta in all slots, for a model that is not loaded yet.

        Args:
            reason: why they are float, for the report.
        """
        shapes = {slot.name: slot.shape for slot in self.slots}
        made = {name: torch.empty(s, dtype=self.weight_dtype, device="meta") for name, s in shapes.items()}
        module = self.plain(made if len(self.slot_names) > 1 else next(iter(made.values())))
        for name in made:
            for part in module.modules():
                if name in part._parameters:
                    note_left(part, name, reason)
        return module

    def to_float(self, known: dict[tuple[int, ...], nn.Parameter] | None = None) -> nn.Module:
        """A float module with the (dequantized) parameters and the same others.

        Args:
            known: float parameters that were made already, by the ``id`` of what they were made of: slots with one
                weight get one Parameter. Filled here; what it names has to stay alive meanwhile.
        """
        known, keys, made = {} if known is None else known, {}, {}
        for slot in self.slots:
            weight = self._parameters.get(slot.name)
            held = [self._parameters[name] for name in slot.names(self.scheme_of(slot))] if weight is None else [weight]
            keys[slot.name] = key = tuple(id(tensor) for tensor in held)
            weight = known.get(key, weight)
            made[slot.name] = self.dequantized(slot.name) if weight is None else weight.detach()
        module = self.plain(made if len(self.slot_names) > 1 else next(iter(made.values())))
        for name, key in keys.items():
            part = next((part for part in module.modules() if name in part._parameters), None)
            if part is not None:
                part._parameters[name] = known.setdefault(key, part._parameters[name])  # type: ignore[arg-type]
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """As of any module. A copy that PEFT makes to train it (``modules_to_save``) is a float module: a packed weight
        has no gradient, and PEFT would train nothing without a word."""
        if _is_trained_copy():
            return copy.deepcopy(self.to_float(), memo)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made


def _is_trained_copy() -> bool:
    """Whether a copy is made for a ``ModulesToSaveWrapper`` of PEFT, of the module itself or of one around it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "update" and frame.f_globals.get("__name__") == "peft.utils.other":
            return True
        frame = frame.f_back
    return False
