"""What every module with a quantized weight has in common: its states, its stored tensors, its ``weight``."""

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from quanto_hf.fit import NO_CONTEXT, Context, Fit
from quanto_hf.nn.activation import INPUT_SCALE
from quanto_hf.nn.bound_call import BoundCall, Call
from quanto_hf.nn.saved_by import layer_is_made, refuse_unknown_saver
from quanto_hf.nn.stored import StoredParameter, plain, stored_parameter
from quanto_hf.nn.subclasses import own_attributes, source_class
from quanto_hf.nn.weight_view import WeightView
from quanto_hf.nn.weight_writes import refuse_write, write_weight
from quanto_hf.ops.watched import recording
from quanto_hf.schemes import Scheme

Q = TypeVar("Q", bound="QuantizedWeight")

PREFIX = "weight_"


class State(Enum):
    """What a quantized module does with its weight."""

    FLOAT = "float"
    """It holds a float weight and uses it as it is."""
    PREPARED = "prepared"
    """It holds a float weight and rounds it in each forward pass; gradients pass straight through the rounding."""
    FROZEN = "frozen"
    """It holds the weight packed."""


class QuantizedWeight(nn.Module):
    """Mixin of modules with a quantized weight. The other base is the float module type that it stands for.

    FROZEN, the weight is held as Parameters (:class:`StoredParameter`) with the names of the scheme behind
    :attr:`prefix` (``weight_packed``, ``weight_scale`` ...), which never have a gradient and never change their dtype.
    A weight of more than 2 dimensions is stored as the matrix of :meth:`to_matrix`.
    """

    # in front of the names of the scheme
    prefix: ClassVar[str] = PREFIX
    # whether each row of the stored matrix is one entry of the weight's first dimension
    rows_first: ClassVar[bool] = True
    # attributes that the float module has from its arguments
    constants: ClassVar[tuple[str, ...]] = ()

    scheme: Scheme
    fit: Fit | str | None
    # float dtype of ``weight`` when it is read
    weight_dtype: torch.dtype
    # relative error of the weight, on some rows, from when it was frozen
    weight_error: float | None
    # whether a float weight is rounded in the forward pass
    rounding: bool
    # names of the attributes of the float module that it has too
    handed_on: tuple[str, ...] = ()
    # the name under which it was put into a model, for errors
    quantized_as: str = ""
    # it must not outlive the tensors that it was made for
    _bound: BoundCall | None

    def _setup(self, scheme: Scheme, dtype: torch.dtype | None, fit: Fit | str | None = None) -> None:
        """What a constructor sets after nn.Module's, before there are parameters."""
        self.scheme, self.fit = scheme, fit
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.weight_error = None
        self.rounding = True
        self._bound = None
        layer_is_made()

    def _adopt(self, module: nn.Module, scheme: Scheme, fit: Fit | str | None) -> None:
        """Become a PREPARED module that shares its parameters with a float one."""
        nn.Module.__init__(self)
        own = own_attributes(module)
        vars(self).update(own)
        # in_features and the like are among them
        self.handed_on = tuple({*own, *self.constants})
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        self._setup(scheme, weight.dtype, fit)
        # the weight first, as in the float module: optimizers know parameters by their order
        for name, parameter in module._parameters.items():
            self._parameters[name] = parameter
        if "weight" not in self._parameters:
            # a parametrized weight is computed from other parameters: from here on it is one
            self._parameters = {"weight": nn.Parameter(weight.detach().clone()), **self._parameters}
        self.train(module.training)

    # ------------------------------------------------------------------------------------------------ the weight

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight."""
        raise NotImplementedError

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight as it is stored."""
        rows, *rest = self.weight_shape
        return rows, torch.Size(rest).numel()

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the matrix that is quantized, each row an output."""
        return weight.reshape(self.matrix_shape)

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_matrix`."""
        return matrix.view(self.weight_shape)

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is held quantized."""
        return self._parameters.get("weight") is None

    @property
    def weight_state(self) -> State:
        """What the module does with its weight. (Not ``state``: PEFT takes an attribute of this name for one of
        bitsandbytes, and writes it.)"""
        if self.is_frozen:
            return State.FROZEN
        return State.PREPARED if self.rounding else State.FLOAT

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a float tensor in the shape of the float module's. Of a FROZEN module it is a
        :class:`WeightView`, which is dequantized when its values are used. What is written into it is stored if that is
        exact (:func:`quanto_hf.nn.weight_writes.write_weight`), and an error otherwise."""
        weight = self._parameters.get("weight")
        if weight is not None:
            return weight
        if recording():
            return self.dequantized()
        stored = next(iter(self.tensors().values()))
        write = partial(write_weight, self)
        view = WeightView(self.weight_shape, self.weight_dtype, stored.device, self.dequantized, write)
        # transformers initialises tensors that do not have this mark
        view._is_hf_initialized = True  # type: ignore[attr-defined]
        return view

    @weight.setter
    def weight(self, value: Any) -> None:
        refuse_write(self, "weight = ...")

    def dequantized(self) -> torch.Tensor:
        """The weight of a FROZEN module as a new plain tensor in ``weight_dtype``."""
        return self.from_matrix(self.scheme.dequantize(self.tensors(), self.matrix_shape[1], self.weight_dtype))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module; refuses a ``weight`` for a FROZEN module, which nothing would read, and its view."""
        # pruning and the like register what they have read
        if (name == "weight" and self.is_frozen) or isinstance(param, WeightView):
            refuse_write(self, f"{name} = nn.Parameter(...)")
        if param is not None and name in self.stored_names:
            param = self.as_stored(name, param)
        super().register_parameter(name, param)

    def as_stored(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        """A tensor as the parameter that holds it under one of :attr:`stored_names`."""
        if isinstance(tensor, StoredParameter):
            return tensor
        first, *others = self.scheme.tensors(self.matrix_shape, self.weight_dtype).items()
        if name != self.prefix + first[0]:
            return stored_parameter(tensor, like=tensor)
        # scales and zeros count themselves: together they are as many as the weights, unless these are fewer
        count = torch.Size(self.weight_shape).numel()
        count -= sum(torch.Size(spec.shape).numel() for _, spec in others)
        return stored_parameter(tensor, count if count > 0 else None, like=tensor)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold the packed weight."""
        return tuple(self.prefix + name for name in self.scheme.names)

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Names of the tensors that keep their dtype whatever the model is converted to."""
        return (*self.stored_names, INPUT_SCALE)

    @property
    def bias_held(self) -> torch.Tensor | None:
        """The bias: a Parameter, or what pruning or a parametrization has put in its place."""
        parameters = self._parameters
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias
        found: torch.Tensor | None = bias
        return found

    def held(self, name: str) -> torch.Tensor | None:
        """A parameter or buffer, or None."""
        held = self._parameters.get(name)
        return held if held is not None else self._buffers.get(name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by the names of the scheme; empty unless FROZEN."""
        held: dict[str, torch.Tensor] = {
            name: tensor
            for name in self.scheme.names
            if (tensor := self._parameters.get(self.prefix + name)) is not None
        }
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            # make_fx takes constants of the types Tensor and Parameter only
            with _disable_current_modes():
                return {name: as_tensor(tensor) for name, tensor in held.items()}
        return held

    def bound_call(self) -> Call | None:
        """The call that is prepared for the stored tensors that are held, or None where there is none."""
        bound, scale = self._bound, self._buffers.get(INPUT_SCALE)
        if bound is None or bound.input_scale is not scale or not bound.fits(self._parameters):
            tensors = self.tensors()
            call = self._prepare(tensors) if tensors else None
            held = BoundCall.holding(self.stored_names, self._parameters)
            bound = self._bound = BoundCall(call, held, scale)
        return bound.call

    def _prepare(self, tensors: Mapping[str, torch.Tensor]) -> Call | None:
        """What :meth:`bound_call` keeps for these stored tensors; a module type that has such a call makes it here."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the prepared call, which knows addresses in memory."""
        return {**self.__dict__, "_bound": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of nn.Module."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold_stored()
        layer_is_made()

    def quantized(self, context: Context = NO_CONTEXT) -> dict[str, torch.Tensor]:
        """What :meth:`freeze` would store for the float weight."""
        return self.scheme.quantize(self.to_matrix(self.weight.detach()), self.fit, context)

    def freeze(self, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Quantize the float weight and let go of it. A FROZEN module stays as it is.

        Args:
            tensors: the stored tensors, where something else has made them from the weight.

        Raises:
            ValueError: the weight has NaN or infinite values.
        """
        if self.is_frozen:
            return
        weight = self.weight
        self.weight_dtype = weight.dtype
        tensors = self.quantized() if tensors is None else tensors
        self.weight_error = self.measure_error(self.to_matrix(weight.detach()), tensors)
        del self._parameters["weight"]
        self.set_tensors(tensors)

    def make_empty(self, device: torch.device | str = "meta") -> None:
        """Let go of the float weight for empty stored tensors, for a state dict to fill."""
        self._parameters.pop("weight", None)
        specs = self.scheme.tensors(self.matrix_shape, self.weight_dtype)
        self.set_tensors({name: torch.empty(s.shape, dtype=s.dtype, device=device) for name, s in specs.items()})

    def set_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Hold these stored tensors."""
        # lets go of the tensors that were held before
        self._bound = None
        for name, tensor in tensors.items():
            self._parameters[self.prefix + name] = self.as_stored(self.prefix + name, tensor)
        # the others last, as in a module that was made frozen
        for name in [name for name in self._parameters if name not in self.stored_names]:
            self._parameters[name] = self._parameters.pop(name)

    def plain(self, weight: torch.Tensor) -> nn.Module:
        """A float module of the type that this one stands for, with this weight and the same other parameters."""
        kind: Any = source_class(type(self))
        module: nn.Module = kind.__new__(kind)
        nn.Module.__init__(module)
        for name in self.handed_on or self.constants:
            if hasattr(self, name):
                vars(module)[name] = getattr(self, name)
        module._parameters["weight"] = nn.Parameter(weight)
        if "bias" in self._parameters:
            module._parameters["bias"] = self._parameters["bias"]
        return module.train(self.training)

    def to_float(self) -> nn.Module:
        """A float module with the (dequantized) weight and the same other parameters."""
        return self.plain(self.dequantized() if self.is_frozen else self.weight.detach())

    def measure_error(self, matrix: torch.Tensor, tensors: dict[str, torch.Tensor], most: int = 64) -> float | None:
        """||Q - W|| / ||W|| over at most 64 evenly spaced rows, which costs next to nothing."""
        if matrix.numel() == 0 or matrix.device.type == "meta":
            return None
        last, count = matrix.shape[0] - 1, min(most, matrix.shape[0])
        # in integers: floats of a shorter dtype would name rows that are not there
        rows = torch.arange(count, dtype=torch.int64, device=matrix.device) * last // max(count - 1, 1)
        exact = matrix.detach()[rows].float()
        made = self.scheme.rows(tensors, rows, matrix.shape[1], torch.float32)
        return float((made - exact).norm() / exact.norm().clamp(min=1e-30))

    # ------------------------------------------------------------------------------------------------ nn.Module

    def _apply(self: Q, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Q:
        """Moves everything; converts the dtype of the bias and of ``weight``, never that of the stored tensors."""
        kept = {id(self.held(name)) for name in self.kept_names}
        # what a prepared call knows may be elsewhere now
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

    def _hold_stored(self) -> None:
        """Make what torch has put in place of stored tensors stored tensors again."""
        self._bound = None
        for name in self.stored_names:
            if (tensor := self._parameters.get(name)) is not None:
                self._parameters[name] = self.as_stored(name, tensor)

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
        guard = state_dict.get(f"{prefix}weight")
        if self.is_frozen and isinstance(guard, torch.Tensor) and guard.shape == (0,):
            # the files of a saved model have an empty tensor under this name (docs/format.md)
            state_dict = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
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


def as_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A stored tensor as a plain one, another as it is."""
    return tensor.data if isinstance(tensor, StoredParameter) else tensor
