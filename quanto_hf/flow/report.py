"""What happened to each parameter, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from quanto_hf.flow.notes import notes_of
from quanto_hf.flow.routers import REASON as ROUTER
from quanto_hf.nn import QuantizedWeight
from quanto_hf.nn.packed import Packed, is_matrix
from quanto_hf.nn.registry import LOAD, entry_of
from quanto_hf.nn.slots import Slot, joined, why_left
from quanto_hf.nn.subclasses import source_class


@dataclass(frozen=True)
class Row:
    """One parameter.

    Args:
        name: full name, as in the float model.
        stored: the scheme, or the dtype of a float parameter.
        shape: shape of the float parameter.
        nbytes: bytes as stored, scales and zeros included.
        error: ||Q - W|| / ||W|| of a quantized weight; None if it is not known.
        reason: why it is float; empty for quantized weights.
        kind: the type of the module that has it.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    nbytes: int
    error: float | None = None
    reason: str = ""
    kind: str = ""

    @property
    def numel(self) -> int:
        """Elements of the float parameter."""
        return torch.Size(self.shape).numel()

    @property
    def bits(self) -> float:
        """Bits per element, scales and zeros included."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Report:
    """One row per parameter, in the order of the model, and sentences about all of them. ``str(report)`` is a table,
    with the share of the weights that are packed on top."""

    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits(self) -> float:
        """Mean bits per element over all parameters."""
        numel = sum(row.numel for row in self.rows)
        return 8 * self.nbytes / numel if numel else 0.0

    @property
    def quantized_bits(self) -> float:
        """Mean bits per element over the quantized weights."""
        return Report([row for row in self.rows if not row.reason]).bits

    @property
    def packed(self) -> Packed:
        """How many weights are packed, of those that could be."""
        packed = sum(row.numel for row in self.rows if not row.reason)
        floats = sum(row.numel for row in self.rows if row.reason and is_matrix(row.name, row.shape))
        return Packed(packed, packed + floats)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=9)
        head = f"{'parameter':{width}}  {'stored':16} {'bits':>6} {'bytes':>13} {'error':>7}  why it is float"
        lines = [f"{self.packed}", head]
        for row in self.rows:
            error = "" if row.error is None else f"{row.error:.4f}"
            lines.append(
                f"{row.name:{width}}  {row.stored:16} {row.bits:6.2f} {row.nbytes:13,} {error:>7}  {row.reason}"
            )
        lines.append(f"{'total':{width}}  {'':16} {self.bits:6.2f} {self.nbytes:13,}")
        lines += self.notes
        return "\n".join(lines)


def report(model: nn.Module, reference: nn.Module | Mapping[str, torch.Tensor] | None = None) -> Report:
    """One row per parameter of a model: how it is stored, its bits, bytes and error, or why it is float.

    Args:
        model: any model, also on meta.
        reference: the float model, or its state dict, for the exact error. Without it the error is the one measured
            on up to 64 rows of each weight when it was quantized; a reloaded model has none.
    """
    exact = reference.state_dict() if isinstance(reference, nn.Module) else reference or {}
    rows: list[Row] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and module.is_frozen:
            for slot in module.slots:
                held = {id(tensor) for tensor in module.tensors(slot.name).values()}
                # one that is tied to another is the same tensors
                if not held <= seen:
                    rows.append(_quantized_row(name, module, slot, exact))
                seen |= held
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = parameter.nbytes
            dtype = str(parameter.dtype).removeprefix("torch.")
            shape, reason, kind = tuple(parameter.shape), why_float(module, leaf), kind_of(module)
            rows.append(Row(joined(name, leaf), dtype, shape, size, reason=reason, kind=kind))
    return Report(rows, notes_of(model))


def _quantized_row(name: str, module: QuantizedWeight, slot: Slot, exact: Mapping[str, torch.Tensor]) -> Row:
    full, error = slot.full(name), module.slot_errors.get(slot.name)
    if full in exact:
        wanted = exact[full].float()
        error = float((module.read_slot(slot.name).float() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    size = sum(tensor.nbytes for tensor in module.tensors(slot.name).values())
    return Row(full, str(module.scheme_of(slot)), slot.shape, size, error, kind=kind_of(module))


def kind_of(module: nn.Module) -> str:
    """The type of a module, or of the float one that a quantized one stands for."""
    return (source_class(type(module)) if isinstance(module, QuantizedWeight) else type(module)).__name__


def why_float(module: nn.Module, leaf: str) -> str:
    """Why a parameter of a module is float."""
    if (reason := why_left(module, leaf)) is not None:
        return reason
    if isinstance(module, QuantizedWeight):
        if leaf in (slot.name for slot in module.slots):
            return "not frozen"
        return "biases stay float" if leaf.endswith("bias") else "scales are float"
    kind, found = type(module).__name__, entry_of(module)
    if found is None and kind.endswith(("Router", "Gate")):
        return ROUTER
    if isinstance(module, nn.RNNBase):
        return f"{kind} gives all its weights to one function of torch, which takes floats"
    if isinstance(module, ParametrizationList):
        return (
            "a parametrization (a weight norm) computes the weight of it: make it one first, by remove_parametrizations"
        )
    if found is not None and leaf in found.quantized.slot_names:
        if LOAD in found.quantized.by_default:
            return "it has not been quantized"
        return f"{kind} is quantized only {found.quantized.on_request}"
    return f"{kind} is not a type that is quantized"
