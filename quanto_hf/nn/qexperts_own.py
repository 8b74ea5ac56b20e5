"""Experts that are called in ways of their own: Llama 4, JetMoe, Inkling's shared experts, DBRX, and classes that
nobody knows."""

from typing import Any

import torch
from torch import nn

from quanto_hf.nn.qexperts import DOWN, GATE_UP, StackedExperts, is_gated, is_routed
from quanto_hf.nn.qweight import QuantizedWeight
from quanto_hf.nn.registry import LOAD, QUANTIZE, register_qmodule
from quanto_hf.nn.slots import WEIGHT, Slot
from quanto_hf.ops.watched import as_a_node

BOTH = (LOAD, QUANTIZE)
MODELS = "transformers.models"


def _by_its_own_forward(module: nn.Module, transposed: bool) -> bool:
    return is_gated(module, transposed) and not is_routed(module)


@register_qmodule(f"{MODELS}.llama4.modeling_llama4.Llama4TextExperts", by_default=BOTH)
class QLlama4Experts(StackedExperts):
    """The experts of Llama 4: each gets all tokens, one after the other, and those that it does not take are zero."""

    declared = (Slot(GATE_UP, leading=1, transposed=True), Slot(DOWN, leading=1, transposed=True))
    act_fn: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shape (experts * tokens, width) to the same."""
        count = self.slot_shapes[DOWN][0]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        each = torch.arange(count, dtype=torch.int64, device=x.device).repeat_interleave(len(x) // count)
        if as_a_node():
            return self._experts(x, each)
        # a row of zeros gives zeros, and is 15 of 16 rows
        taken = x.any(dim=-1).nonzero().squeeze(-1)
        made = self._experts(x[taken], each[taken])
        return torch.zeros_like(x, dtype=made.dtype).index_put((taken,), made)

    def _experts(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        gate, up = self.multiply(GATE_UP, x, experts).chunk(2, dim=-1)
        return self.multiply(DOWN, up * self.act_fn(gate), experts)


@register_qmodule(f"{MODELS}.jetmoe.modeling_jetmoe.JetMoeParallelExperts", by_default=BOTH)
class QJetMoeExperts(StackedExperts):
    """One product of JetMoe's experts, with inputs in the order of the experts."""

    declared = (Slot(WEIGHT, leading=1),)

    def forward(self, inputs: torch.Tensor, expert_size: Any) -> torch.Tensor:
        """Shape (rows, input_size) to (rows, output_size).

        Args:
            inputs: those of the first expert come first.
            expert_size: how many rows each expert has, as a list or a tensor.
        """
        sizes = torch.as_tensor(expert_size, dtype=torch.int64, device=inputs.device)
        ids = torch.arange(len(sizes), dtype=torch.int64, device=inputs.device)
        return self.multiply(WEIGHT, inputs, ids.repeat_interleave(sizes, output_size=len(inputs)))


@register_qmodule(f"{MODELS}.inkling.modeling_inkling.InklingSharedExperts", by_default=BOTH)
class QInklingSharedExperts(StackedExperts):
    """The shared experts of Inkling: every token goes through all of them, each with its own factor."""

    declared = (Slot("gate_proj", leading=1), Slot("up_proj", leading=1), Slot(DOWN, leading=1))
    act_fn: Any

    def forward(self, hidden_states: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
        """Shape (..., width) to the same.

        Args:
            hidden_states: the tokens.
            gammas: shape (..., experts).
        """
        x, count = hidden_states.reshape(-1, hidden_states.shape[-1]), self.slot_shapes[DOWN][0]
        each = torch.arange(count, dtype=torch.int64, device=x.device).repeat_interleave(len(x))
        rows = x.repeat(count, 1)
        factors = gammas.reshape(-1, count).T.reshape(-1, 1)
        inner = self.act_fn(self.multiply("gate_proj", rows, each)) * self.multiply("up_proj", rows, each) * factors
        made = self.multiply(DOWN, inner, each).float().view(count, *x.shape)
        return made.sum(dim=0).to(hidden_states.dtype).view_as(hidden_states)


@register_qmodule(f"{MODELS}.dbrx.modeling_dbrx.DbrxExpertGLU", by_default=BOTH)
class QDbrxExpertGLU(QuantizedWeight):
    """The stacks of DBRX, of two dimensions: (experts * inner, width). The module around it reads the rows of an expert
    and hands them over, so that one expert at a time is dequantized."""

    declared = (Slot("w1"), Slot("v1"), Slot("w2"))


@register_qmodule(lambda module: _by_its_own_forward(module, False), by_default=BOTH)
class QOwnExperts(StackedExperts):
    """Experts of a class that nobody knows. It goes on computing as it says; ``self.gate_up_proj[expert]`` dequantizes
    that expert alone."""

    declared = (Slot(GATE_UP, leading=1), Slot(DOWN, leading=1))


@register_qmodule(lambda module: _by_its_own_forward(module, True), by_default=BOTH)
class QOwnTransposedExperts(StackedExperts):
    """The same with inputs before outputs."""

    declared = (Slot(GATE_UP, leading=1, transposed=True), Slot(DOWN, leading=1, transposed=True))
