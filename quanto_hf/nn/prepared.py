"""Products of rounded numbers with gradients: of PREPARED layers, and of FROZEN ones that round their input."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from quanto_hf.nn.qlinear import LinearProduct

Maybe = torch.Tensor | None


class Rounds(Protocol):
    """What rounds weight and input: a layer, or a :class:`quanto_hf.nn.rounding.Rounding`."""

    def round_input(self, x: torch.Tensor, scale: Maybe) -> torch.Tensor: ...
    def round_weight(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor: ...


def straight_through(layer: "LinearProduct", x: torch.Tensor, bias: Maybe) -> torch.Tensor:
    """``layer.multiply(x, ...)``, bit for bit the product of the FROZEN layer, with gradients to x, weight, bias and
    learned scales.

    The gradient is that of the float product of the rounded input and the rounded weight, where each rounding passes it
    straight through (Bengio et al., 2013, https://arxiv.org/abs/1308.3432), or treats it as learned scales want. x is
    kept for the backward pass as it came, and rounded again there, like the weight: no second float copy of either is
    held in between.

    Args:
        layer: in state PREPARED or FROZEN.
        x: float, shape (..., in_features).
        bias: None, or in the dtype of x.
    """
    apply: Any = _StraightThrough.apply
    result: torch.Tensor = apply(layer, x, bias, *layer.sources().values())
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: "LinearProduct", x: torch.Tensor, bias: Maybe, *sources: torch.Tensor) -> torch.Tensor:
        # while it is calibrated, x was not rounded, and is not to be observed again in the backward pass
        ctx.layer, ctx.names, ctx.observing = layer, list(layer.sources()), layer.is_observing
        ctx.save_for_backward(x, *sources)
        return layer.multiply(x, layer.quantized(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Maybe, ...]:
        (x, *sources), layer = ctx.saved_tensors, ctx.layer
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:], ctx.needs_input_grad[2]]
        named = dict(zip(ctx.names, sources, strict=True))
        grad_x, *others, grad_bias = gradients(layer, grads[0], x, named, needs, ctx.observing)
        return None, grad_x, grad_bias, *others


def gradients(
    rounds: Rounds,
    grad: torch.Tensor,
    x: torch.Tensor,
    sources: Mapping[str, torch.Tensor],
    needs: Sequence[bool],
    observing: bool = False,
) -> list[Maybe]:
    """The gradients of :func:`straight_through` to x, each of the sources, and the bias; None where none is needed.

    Args:
        grad: of the product, shape (..., out_features).
        x: as it came.
        sources: of :meth:`quanto_hf.nn.learned.LearnedScales.sources`.
        needs: whether x, each of the sources, and the bias want a gradient.
        observing: whether the layer was being calibrated, and did not round x.
    """
    grad = grad.reshape(-1, grad.shape[-1])
    *needs_leaf, needs_bias = needs
    # leaves of a graph of their own: the one that is being walked is not touched
    given = zip((x, *sources.values()), needs_leaf, strict=True)
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in given]
    with torch.enable_grad():
        leaf, named = leaves[0], dict(zip(sources, leaves[1:], strict=True))
        rounded = leaf if observing else rounds.round_input(leaf, named.get("input_scale"))
        weight = rounds.round_weight(named)
    ends = []
    if rounded.requires_grad:
        ends.append((rounded, (grad @ weight.detach().to(grad.dtype)).view_as(rounded)))
    if weight.requires_grad:
        ends.append((weight, (grad.T @ rounded.detach().reshape(-1, weight.shape[1])).to(weight.dtype)))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if ends:
        torch.autograd.backward([end for end, _ in ends], [into for _, into in ends], inputs=wanted)
    return [*(leaf.grad for leaf in leaves), grad.sum(0) if needs_bias else None]
