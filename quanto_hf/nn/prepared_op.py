"""PREPARED layers as operators of torch: what torch.compile and export see of them is one node.

A search for scales has hundreds of steps for each weight, which take minutes to compile and gain nothing by it; and
encoding looks at values, which a graph cannot. The operators run the code of eager mode on their tensors, so that
numbers and gradients have the same bits. What no node can stand for breaks the graph, and runs between its parts.
"""

from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from quanto_hf.fit import Fit, name_of_fit
from quanto_hf.nn.activation import INPUT_SCALE
from quanto_hf.nn.prepared import gradients, straight_through
from quanto_hf.nn.rounding import SCALE, ZERO, Rounding
from quanto_hf.nn.slots import WEIGHT
from quanto_hf.ops.watched import traced
from quanto_hf.qtypes import QTYPES
from quanto_hf.schemes import scheme_from_dict

if TYPE_CHECKING:
    from quanto_hf.nn.learned import LearnedScales
    from quanto_hf.nn.qlinear import LinearProduct

Maybe = torch.Tensor | None

# what a layer holds, as LearnedScales.sources names it: of the weight, and of the input
OF_WEIGHT = (WEIGHT, SCALE, ZERO)
NAMES = (*OF_WEIGHT, INPUT_SCALE)


def _has_name(layer: "LearnedScales") -> bool:
    """Whether a graph can say how the weight of a layer is rounded: a fit of the user's own has no name."""
    return layer.learns or layer.fit is None or name_of_fit(layer.fit) is not None


def linear_in_graph(layer: "LinearProduct", x: torch.Tensor, bias: Maybe) -> torch.Tensor:
    """:func:`quanto_hf.nn.prepared.straight_through` of a PREPARED layer."""
    if layer.is_observing or not _has_name(layer):
        return _outside(straight_through, layer, x, bias)
    held, activations = layer.sources(), None if layer.activations is None else layer.activations.name
    made: torch.Tensor = torch.ops.quanto_hf.prepared_linear.default(
        x, *(held.get(name) for name in NAMES), *_description(layer.how), activations, bias
    )
    return made


def weight_in_graph(layer: "LearnedScales", rounding: Rounding, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """:meth:`quanto_hf.nn.rounding.Rounding.round_weight` of a PREPARED layer."""
    if not _has_name(layer):
        return _outside(_round_weight, layer, rounding, sources)
    made: torch.Tensor = torch.ops.quanto_hf.prepared_weight.default(
        *(sources.get(name) for name in OF_WEIGHT), *_description(rounding)
    )
    return made


def _round_weight(layer: "LearnedScales", rounding: Rounding, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return rounding.round_weight(sources)


def _outside(run: Callable[..., torch.Tensor], layer: "LearnedScales", *args: Any) -> torch.Tensor:
    """Break the graph, and run this as it is. Here and not at the import, which would import the compiler: 2 s."""
    if traced():
        raise RuntimeError(
            f"{layer} cannot be traced while it is calibrated, or with a fit that has no name: a trace has no place "
            "for Python code. Finish calibration, and freeze the model first (quanto_hf.freeze(model))"
        )
    args = (layer, *args)
    eager: Any = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    made: torch.Tensor = eager(*args)
    return made


def _description(rounding: Rounding) -> tuple[str, str | None]:
    """How the weight is rounded. The text of the dict is a Python literal; json.dumps cannot be traced."""
    fit = rounding.fit
    return str(rounding.scheme.to_dict()), fit.name if isinstance(fit, Fit) else fit


@cache
def _rounding(scheme: str, fit: str | None, activations: str | None = None) -> Rounding:
    kind = None if activations is None else QTYPES[activations]
    return Rounding(scheme_from_dict(literal_eval(scheme)), fit, kind)


def _named(sources: Sequence[Maybe]) -> dict[str, torch.Tensor]:
    """The sources that there are, by name."""
    return {name: tensor for name, tensor in zip(NAMES, sources, strict=False) if tensor is not None}


# ---------------------------------------------------------------------------------------------------- the product


def _linear(x: torch.Tensor, *args: Any) -> torch.Tensor:
    *sources, scheme, fit, activations, bias = args
    return _rounding(scheme, fit, activations).product(x, _named(sources), bias).contiguous()


def _linear_fake(x: Any, weight: Any, *args: Any) -> Any:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_grad(grad: torch.Tensor, x: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    """Gradients of x, the sources and the bias: those that ``needs`` asks for."""
    *sources, scheme, fit, activations, (x_needs, *source_needs, bias_needs) = args
    held = [need for need, source in zip(source_needs, sources, strict=True) if source is not None]
    rounding = _rounding(scheme, fit, activations)
    made = gradients(rounding, grad, x, _named(sources), [x_needs, *held, bias_needs])
    return [tensor.contiguous() for tensor in made if tensor is not None]


def _linear_grad_fake(grad: Any, x: Any, *args: Any) -> list[Any]:
    *sources, _, _, _, (*needs, bias_needs) = args
    made = [like.new_empty(like.shape) for need, like in zip(needs, (x, *sources), strict=True) if need]
    return [*made, grad.new_empty(grad.shape[-1:])] if bias_needs else made


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scheme, ctx.fit, ctx.activations, _ = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
    *tensors, _, _, _, bias = ctx.needs_input_grad
    needs = [*tensors, bias]
    made = iter(
        torch.ops.quanto_hf.prepared_linear_grad.default(
            grad, *ctx.saved_tensors, ctx.scheme, ctx.fit, ctx.activations, needs
        )
    )
    *of_tensors, of_bias = [next(made) if need else None for need in needs]
    return *of_tensors, None, None, None, of_bias


# ---------------------------------------------------------------------------------------------------- the weight


def _weight(*args: Any) -> torch.Tensor:
    *sources, scheme, fit = args
    return _rounding(scheme, fit).round_weight(_named(sources)).contiguous()


def _weight_fake(weight: Any, *args: Any) -> Any:
    return weight.new_empty(weight.shape)


def _weight_grad(grad: torch.Tensor, *args: Any) -> list[torch.Tensor]:
    """Gradients of weight, learned scale and zero: those that ``needs`` asks for."""
    *sources, scheme, fit, needs = args
    given = zip(sources, needs, strict=True)
    leaves = [None if tensor is None else tensor.detach().requires_grad_(need) for tensor, need in given]
    with torch.enable_grad():
        named = {name: leaf for name, leaf in zip(OF_WEIGHT, leaves, strict=True) if leaf is not None}
        rounded = _rounding(scheme, fit).round_weight(named)
    wanted = [leaf for leaf in named.values() if leaf.requires_grad]
    return [made.contiguous() for made in torch.autograd.grad(rounded, wanted, grad)]


def _weight_grad_fake(grad: Any, *args: Any) -> list[Any]:
    *sources, _, _, needs = args
    return [like.new_empty(like.shape) for need, like in zip(needs, sources, strict=True) if need]


def _weight_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scheme, ctx.fit = inputs
    ctx.learned = tensors[1] is not None
    if ctx.learned:
        ctx.save_for_backward(*tensors)


def _weight_backward(ctx: Any, grad: torch.Tensor) -> tuple[Maybe, ...]:
    if not ctx.learned:
        return grad, None, None, None, None
    needs = list(ctx.needs_input_grad[: len(OF_WEIGHT)])
    made = iter(torch.ops.quanto_hf.prepared_weight_grad.default(grad, *ctx.saved_tensors, ctx.scheme, ctx.fit, needs))
    return *(next(made) if need else None for need in needs), None, None


# ---------------------------------------------------------------------------------------------------- as operators

_LIBRARY = torch.library.Library("quanto_hf", "FRAGMENT")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor weight, Tensor? learned_scale, Tensor? learned_zero"
_LINEAR = f"Tensor x, {_WEIGHT}, Tensor? input_scale, str scheme, str? fit, str? activations"


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    full = f"quanto_hf::{name}"
    torch.library.define(full, schema, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, "default", run, lib=_LIBRARY)
    torch.library.register_fake(full, fake, lib=_LIBRARY)


def _differentiate(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"quanto_hf::{name}", backward, setup_context=setup, lib=_LIBRARY)


_define("prepared_linear", f"({_LINEAR}, Tensor? bias) -> Tensor", _linear, _linear_fake)
_define("prepared_linear_grad", f"(Tensor grad, {_LINEAR}, bool[] needs) -> Tensor[]", _linear_grad, _linear_grad_fake)
_differentiate("prepared_linear", _linear_backward, _linear_setup)
_define("prepared_weight", f"({_WEIGHT}, str scheme, str? fit) -> Tensor", _weight, _weight_fake)
_define(
    "prepared_weight_grad", f"(Tensor grad, {_WEIGHT}, str scheme, str? fit, bool[] needs) -> Tensor[]", _weight_grad,
    _weight_grad_fake,
)  # fmt: skip
_differentiate("prepared_weight", _weight_backward, _weight_setup)
