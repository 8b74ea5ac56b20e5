"""What happened to each parameter, and why."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quanto_hf.flow.notes import notes_of
from quanto_hf.nn import QuantizedWeight, why_no_qmodule
from quanto_hf.nn.registry import entry_of
from quanto_hf.nn.slots import Slot, joined, label, why_left


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
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    nbytes: int
    error: float | None = None
    reason: str = ""

    @property
    def bits(self) -> float:
        """Bits per element, scales and zeros included."""
        numel = torch.Size(self.shape).numel()
        return 8 * self.nbytes / numel if numel else 0.0


@dataclass(frozen=True)
class Report:
    """One row per parameter, in the order of the model, and sentences about all of them. ``str(report)`` is a table."""

    rows: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits(self) -> float:
        """Mean bits per element over all parameters."""
        numel = sum(torch.Size(row.shape).numel() for row in self.rows)
        return 8 * self.nbytes / numel if numel else 0.0

    @property
    def quantized_bits(self) -> float:
        """Mean bits per element over the quantized weights."""
        return Report([row for row in self.rows if not row.reason]).bits

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=9)
        lines = [f"{'parameter':{width}}  {'stored':16} {'bits':>6} {'bytes':>13} {'error':>7}  why it is float"]
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
            rows.append(Row(joined(name, leaf), dtype, tuple(parameter.shape), size, reason=_reason(module, leaf)))
    return Report(rows, notes_of(model))


def _quantized_row(name: str, module: QuantizedWeight, slot: Slot, exact: Mapping[str, torch.Tensor]) -> Row:
    full, error = slot.full(name), module.slot_errors.get(slot.name)
    if full in exact:
        wanted = exact[full].float()
        error = float((module.read_slot(slot.name).float() - wanted).norm() / wanted.norm().clamp(min=1e-30))
    size = sum(tensor.nbytes for tensor in module.tensors(slot.name).values())
    return Row(full, str(module.scheme_of(slot)), slot.shape, size, error)


def _reason(module: nn.Module, leaf: str) -> str:
    if (reason := why_left(module, leaf)) is not None:
        return reason
    if isinstance(module, QuantizedWeight):
        if leaf in (slot.name for slot in module.slots):
            return "not frozen"
        return "biases stay float" if leaf.endswith("bias") else "scales are float"
    kind, found = type(module).__name__, entry_of(module)
    if found is not None and leaf in found.quantized.slot_names:
        return f"{kind} is quantized only where a pattern names it"
    return f"{kind} is not a type that is quantized"


def not_quantizable(model: nn.Module, chosen: Collection[str] = ()) -> tuple[float, list[str]]:
    """Share of the weights of a model that are in modules of a type that cannot be quantized, and these types.

    Embeddings, and parameters of less than 2 dimensions, do not count: nobody expects them to be quantized. A subclass
    of ``nn.Linear`` counts by what it computes (:func:`quanto_hf.nn.why_no_qmodule`).

    Args:
        model: float or quantized, also on meta.
        chosen: names of slots that are to be quantized.

    Example:
        >>> not_quantizable(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1)))
        (0.5, ['Conv2d'])
    """
    total = 0
    types: dict[str, int] = {}
    for owner, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        if isinstance(module, QuantizedWeight):
            total += sum(slot.numel for slot in module.slots)
            continue
        if isinstance(module, nn.Linear) and (type(module) is nn.Linear or why_no_qmodule(module) is None):
            total += module.in_features * module.out_features
            continue
        large = {leaf: p.numel() for leaf, p in module.named_parameters(recurse=False) if p.dim() > 1}
        total += sum(large.values())
        numel = sum(count for leaf, count in large.items() if label(owner, leaf) not in chosen)
        if numel:
            name = type(module).__name__
            types[name] = types.get(name, 0) + numel
    return (sum(types.values()) / total if total else 0.0), sorted(types, key=lambda name: -types[name])
