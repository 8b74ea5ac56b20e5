"""Fused experts of a mixture of experts: one parameter holds the weights of all experts, stacked.

Most classes of transformers have ``gate_up_proj`` of shape (experts, 2 * inner, width) and ``down_proj`` of shape
(experts, width, inner), and are called with the tokens, the experts that each takes, and the weights of these. Their
flags (``use_experts_implementation``) or, without a decorator, the shapes tell how the parameters lie. Which
implementation the model asks for (``experts_implementation``) does not matter here: only the experts that have tokens
are read, and the tokens of one are multiplied together.
"""

import inspect
import sys
import warnings
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.nn.expert_product import ExpertProduct
from quanto_hf.nn.qweight import QuantizedWeight
from quanto_hf.nn.registry import LOAD, QUANTIZE, register_qmodule
from quanto_hf.nn.rounded import autocasts
from quanto_hf.nn.slots import Slot
from quanto_hf.ops.watched import as_a_node

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
# the module and the function that puts adapters on parameters
PEFT = ("peft.tuners.tuners_utils", "_inject_parameters")


class StackedExperts(QuantizedWeight):
    """Mixin of modules whose parameters are stacks of the weights of experts."""

    _products: dict[str, ExpertProduct]

    def multiply(
        self, name: str, x: torch.Tensor, experts: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x[i] @ weight[experts[i]].T + bias[experts[i]]`` for each row i, with the weights of a slot.

        Args:
            name: of the slot.
            x: shape (rows, inputs).
            experts: int64, shape (rows,).
            bias: None, or shape (experts, outputs).

        Returns:
            Shape (rows, outputs), in the dtype of ``x``.
        """
        if torch._C._is_any_autocast_enabled() and autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if self._parameters.get(name) is None:
            return self._product(name)(x, experts, self._parameters, bias)
        return each_expert(x, experts, self.slot(name).to_matrix(self.rounded(name)).to(x.dtype), bias)

    def _product(self, name: str) -> ExpertProduct:
        """What multiplies with a packed slot; it is made once."""
        products: dict[str, ExpertProduct] = self.__dict__.setdefault("_products", {})
        if name not in products:
            slot = self.slot(name)
            products[name] = ExpertProduct(self.scheme_of(slot), slot.matrix_shape[-1], slot.stored(""))
        return products[name]

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """As of nn.Module. PEFT looks here for what its ``target_parameters`` name.

        Warns:
            UserWarning: it looks for the weights of packed experts, which cannot have an adapter.
        """
        if not recurse:
            warn_of_adapters(self, sys._getframe(1))
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def extra_repr(self) -> str:
        """Shape and scheme of each slot."""
        texts = [f"{slot.name}={slot.shape}, weights={self.scheme_of(slot)}" for slot in self.slots]
        return ", ".join(texts) + self._describe_state()


def warn_of_adapters(module: QuantizedWeight, caller: FrameType) -> None:
    """Say that packed weights of experts get no adapter, if PEFT is who looks for them. It goes on without a word."""
    if (caller.f_globals.get("__name__"), caller.f_code.co_name) != PEFT:
        return
    targets = [str(name).rpartition(".")[2] for name in caller.f_locals.get("target_names", ())]
    packed = [slot for slot in module.slots if slot.name in targets and module._parameters.get(slot.name) is None]
    if packed:
        warnings.warn(
            f"{' and '.join(slot.name for slot in packed)} of the experts are packed ({module.scheme_of(packed[0])}) "
            "and get no adapter: target_parameters of PEFT takes float parameters. Adapters of the other layers are "
            "trained; to train experts as well, load them in float: QuantoConfig(modules_to_not_convert=['experts'])",
            stacklevel=2,
        )


def each_expert(
    x: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """:meth:`StackedExperts.multiply` with a float weight of shape (experts, outputs, inputs), which gets gradients."""
    if as_a_node():
        # no operator of a graph depends on what the ids are
        product = torch.bmm(weight[experts], x.unsqueeze(-1)).squeeze(-1)
        return product if bias is None else product + bias[experts]
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=len(weight)).tolist()
    made = [
        F.linear(rows, weight[e], None if bias is None else bias[e])
        for e, rows in enumerate(torch.split(x[order], counts))
        if len(rows)
    ]
    return torch.cat(made)[torch.argsort(order)] if made else x.new_empty((0, weight.shape[1]))


class RoutedExperts(StackedExperts):
    """Mixin of modules that are called with tokens, and the experts that each token takes."""

    # the slot that comes first
    first: ClassVar[str] = GATE_UP
    # of the float class
    act_fn: Any
    post_expert_norm: Any

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum over the experts of each token.

        Args:
            hidden_states: shape (tokens, width).
            top_k_index: numbers of experts, int64, shape (tokens, k). One that is too large is an expert that is on
                another device, whose part is zero, or the identity where the module has such experts.
            top_k_weights: shape (tokens, k).

        Returns:
            Shape (tokens, width), in the dtype of ``hidden_states``.
        """
        tokens, k = top_k_index.shape
        x = hidden_states.reshape(tokens, hidden_states.shape[-1])
        experts, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        if tokens == 1:
            made = self._routed(x.expand(k, -1).contiguous(), experts) * weights
        else:
            # rows of an expert side by side: no product has to gather them
            order = torch.argsort(experts, stable=True)
            made = self._routed(x[order // k], experts[order]) * weights[order]
            made = torch.empty_like(made).index_copy(0, order, made)
        return made.view(tokens, k, made.shape[-1]).sum(dim=1).to(hidden_states.dtype).view_as(hidden_states)

    def _routed(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What the expert of each row makes of it."""
        count = self.slot_shapes[DOWN][0]
        here = experts < count
        if as_a_node():
            made = self._experts(rows, experts.clamp(max=count - 1))
            return torch.where(here.unsqueeze(-1), made, self._elsewhere(rows).to(made.dtype))
        if bool(here.all()):
            return self._experts(rows, experts)
        out = self._elsewhere(rows)
        made = self._experts(rows[here], experts[here])
        return out.to(made.dtype).index_put((here.nonzero().squeeze(-1),), made)

    def _elsewhere(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of experts that this module does not have."""
        identity = getattr(self, "identity_expert", None)
        made: torch.Tensor = torch.zeros_like(rows) if identity is None else identity(rows)
        return made

    def _experts(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """The two products of an expert, and what stands between and after them."""
        inner = self.multiply(self.first, rows, experts, self._bias_of(self.first))
        gate = getattr(self, "_apply_gate", None)
        if self.first == UP:
            inner = self.act_fn(inner)
        elif gate is not None:
            inner = gate(inner)
        else:
            gates, ups = inner.chunk(2, dim=-1)
            inner = self.act_fn(gates) * ups
        made = self.multiply(DOWN, inner, experts, self._bias_of(DOWN))
        return self.post_expert_norm(made) if getattr(self, "has_post_expert_norm", False) else made

    def _bias_of(self, name: str) -> torch.Tensor | None:
        return getattr(self, f"{name}_bias", None)


# ------------------------------------------------------------------------------------------------ which they are


def stack(module: nn.Module, name: str) -> torch.Size | None:
    """Shape of a parameter of a module if it has three dimensions."""
    parameter = module._parameters.get(name)
    return parameter.shape if parameter is not None and parameter.dim() == 3 else None


def is_routed(module: nn.Module) -> bool:
    """Whether a module of experts is called with tokens, experts and their weights, by transformers' flag, or as one of
    transformers' own that is not flagged."""
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        return True
    inputs = list(inspect.signature(type(module).forward).parameters)[1:]
    return type(module).__module__.startswith("transformers.") and inputs == [
        "hidden_states", "top_k_index", "top_k_weights",
    ]  # fmt: skip


def is_gated(module: nn.Module, transposed: bool) -> bool:
    """Whether a module has ``gate_up_proj`` and ``down_proj`` with inputs last, or, ``transposed``, with outputs last.
    Its flag says so, or else its shapes."""
    up, down = stack(module, GATE_UP), stack(module, DOWN)
    if up is None or down is None:
        return False
    flag = getattr(module, "is_transposed", None)
    if flag is not None:
        return bool(flag) is transposed
    inner, width = (down[1], down[2]) if transposed else (down[2], down[1])
    return tuple(up[1:]) == ((width, 2 * inner) if transposed else (2 * inner, width))


@register_qmodule(lambda module: is_gated(module, False) and is_routed(module), by_default=[LOAD, QUANTIZE])
class QExperts(RoutedExperts):
    """Experts with ``gate_up_proj`` (experts, 2 * inner, width) and ``down_proj`` (experts, width, inner)."""

    declared = (Slot(GATE_UP, leading=1), Slot(DOWN, leading=1))


@register_qmodule(lambda module: is_gated(module, True) and is_routed(module), by_default=[LOAD, QUANTIZE])
class QTransposedExperts(RoutedExperts):
    """Experts with ``gate_up_proj`` (experts, width, 2 * inner) and ``down_proj`` (experts, inner, width)."""

    declared = (Slot(GATE_UP, leading=1, transposed=True), Slot(DOWN, leading=1, transposed=True))


def _is_ungated(module: nn.Module) -> bool:
    return getattr(module, "has_gate", None) is False and not getattr(module, "is_transposed", False)


@register_qmodule(
    lambda module: _is_ungated(module) and stack(module, UP) is not None and stack(module, DOWN) is not None,
    by_default=[LOAD, QUANTIZE],
)
class QUngatedExperts(RoutedExperts):
    """Experts with ``up_proj`` (experts, inner, width) and ``down_proj`` (experts, width, inner), and no gate."""

    first = UP
    declared = (Slot(UP, leading=1), Slot(DOWN, leading=1))
