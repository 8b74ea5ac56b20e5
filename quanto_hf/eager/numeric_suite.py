"""torch.ao's numeric suite for eager mode, by name: weights and outputs of a float and a quantized model side by side.

The results have the keys of torch.ao. Unlike there, the functions that run a model leave it as it was, whole batches
are logged, models may be called with keyword arguments, and quantized weights are float tensors. See also
:func:`quanto_hf.compare`, which measures.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from quanto_hf.eager.loggers import Logger, OutputLogger, Shadow, ShadowLogger
from quanto_hf.eager.modules import StoredWeights
from quanto_hf.eager.stored_weight import dequantized
from quanto_hf.flow.batches import device_of, moved

__all__ = [
    "Logger",
    "OutputLogger",
    "Shadow",
    "ShadowLogger",
    "compare_model_outputs",
    "compare_model_stub",
    "compare_weights",
    "get_logger_dict",
    "get_matching_activations",
    "prepare_model_outputs",
    "prepare_model_with_stubs",
]

LOGGER = "output_logger"
# The float module types whose outputs torch.ao logs, but for Sequential, and Dropout, which it skips again.
LOGGED = (
    nn.ELU, nn.Hardswish, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.BatchNorm2d, nn.BatchNorm3d, nn.Conv1d, nn.Conv2d,
    nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.GRU, nn.GRUCell, nn.LSTM, nn.LSTMCell, nn.RNNCell,
    nn.Embedding, nn.EmbeddingBag,
)  # fmt: skip

Stats = dict[str, dict[str, Any]]


def compare_weights(
    float_dict: Mapping[str, torch.Tensor], quantized_dict: Mapping[str, torch.Tensor] | nn.Module
) -> dict[str, dict[str, torch.Tensor]]:
    """Float and quantized weights by name.

    Args:
        float_dict: state dict of the float model.
        quantized_dict: state dict of the quantized model, or the model itself.

    Returns:
        Key -> ``{"float": weight, "quantized": weight as dequantized}``. The keys are those of torch.ao: a quantized
        linear layer ``fc`` is ``fc._packed_params._packed_params``, everything else has the float name.

    Raises:
        ValueError: the tensors of a state dict do not say what type of number they hold, as symmetric 4-bit and float8
            ones; give the model.

    Example:
        >>> from quanto_hf import freeze, quantize
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> qmodel = freeze(quantize(copy.deepcopy(model), weights="int8"))
        >>> list(compare_weights(model.state_dict(), qmodel.state_dict()))
        ['0._packed_params._packed_params']
    """
    modules = dict(quantized_dict.named_modules()) if isinstance(quantized_dict, nn.Module) else {}
    state = quantized_dict.state_dict() if isinstance(quantized_dict, nn.Module) else quantized_dict
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        if leaf not in ("weight", "weight_packed") or isinstance(modules.get(name), StoredWeights):
            continue
        prefix = f"{name}." if name else ""
        # a fused module has its weight in the first of its parts
        weight = float_dict.get(f"{prefix}weight", float_dict.get(f"{prefix}0.weight"))
        if weight is None:
            continue
        if leaf == "weight":
            found[key] = {"float": weight, "quantized": tensor}
            continue
        made = modules[name].dequantized() if modules else dequantized(prefix, state, weight)
        linear = isinstance(modules[name], nn.Linear) if modules else weight.dim() == 2
        shown = f"{prefix}_packed_params._packed_params" if linear else f"{prefix}weight"
        found[shown] = {"float": weight, "quantized": made}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        # several weights, as of an LSTM, in 8 bits or float16
        for leaf, made in module.weights().items() if isinstance(module, StoredWeights) else ():
            if (weight := float_dict.get(prefix + leaf, float_dict.get(f"{prefix}0.{leaf}"))) is not None:
                shown = f"{prefix}_packed_params._packed_params" if isinstance(module, nn.Linear) else prefix + leaf
                found[shown] = {"float": weight, "quantized": made}
    return found


def prepare_model_outputs(
    float_module: nn.Module,
    q_module: nn.Module,
    logger_cls: Callable[[], Logger] = OutputLogger,
    allow_list: Iterable[type[nn.Module]] | None = None,
) -> None:
    """Log the outputs of modules of both models from now on, in place.

    Args:
        float_module: the float model.
        q_module: the quantized model, with modules of the same names.
        logger_cls: makes the logger of one module; it is called with each output.
        allow_list: float or quantized module types to log. None means ``LOGGED``, and all modules that have another
            type in the quantized model.
    """
    floats = dict(float_module.named_modules())
    shared = {name: (floats[name], module) for name, module in q_module.named_modules() if name in floats}
    types = LOGGED if allow_list is None else tuple(allow_list)
    names = [name for name, pair in shared.items() if type(pair[0]) in types or type(pair[1]) in types]
    if allow_list is None:
        replaced = [name for name, (one, other) in shared.items() if type(one) is not type(other)]
        names += [
            name
            for name in replaced
            if name not in names and not any(other != name and _within(other, name) for other in [*replaced, *names])
        ]
    for name in names:
        for module in shared[name]:
            logger = logger_cls()
            logger.handle = module.register_forward_hook(logger.record)
            module.add_module(LOGGER, logger)


def _within(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def get_logger_dict(mod: nn.Module, prefix: str = "") -> Stats:
    """``{"<module>.stats": stats}`` of all loggers in a model."""
    found: Stats = {}
    for name, module in mod.named_modules():
        if isinstance(module, Logger):
            parts = [part for part in (prefix, name.rpartition(".")[0], "stats") if part]
            found[".".join(parts)] = module.stats
    return found


def get_matching_activations(float_module: nn.Module, q_module: nn.Module) -> Stats:
    """What :func:`prepare_model_outputs` logged in both models: ``{"<module>.stats": {"float": [...], "quantized":
    [...]}}`` with a tensor for each call."""
    floats = get_logger_dict(float_module)
    return {
        key: {"float": floats[key]["tensor_val"], "quantized": stats["tensor_val"]}
        for key, stats in get_logger_dict(q_module).items()
        if key in floats and stats["tensor_val"]
    }


def compare_model_outputs(
    float_model: nn.Module,
    q_model: nn.Module,
    *data: Any,
    logger_cls: Callable[[], Logger] = OutputLogger,
    allow_list: Iterable[type[nn.Module]] | None = None,
    **batch: Any,
) -> Stats:
    """Outputs of the modules of both running models: the error that has come together up to each.

    Args:
        float_model: the float model.
        q_model: the quantized model.
        data: positional arguments of both.
        logger_cls: as of :func:`prepare_model_outputs`.
        allow_list: as of :func:`prepare_model_outputs`.
        batch: keyword arguments of both.

    Returns:
        As :func:`get_matching_activations`.
    """
    try:
        prepare_model_outputs(float_model, q_model, logger_cls, allow_list)
        for model in (float_model, q_model):
            _run(model, data, batch)
        return get_matching_activations(float_model, q_model)
    finally:
        for model in (float_model, q_model):
            for module in list(model.modules()):
                if isinstance(logger := module._modules.get(LOGGER), Logger):
                    logger.remove()
                    del module._modules[LOGGER]


def prepare_model_with_stubs(
    float_module: nn.Module,
    q_module: nn.Module,
    module_swap_list: Iterable[type[nn.Module]],
    logger_cls: Callable[[], Logger] = ShadowLogger,
) -> None:
    """Put a :class:`Shadow` in the place of each quantized module whose float module has one of these types, in place.

    Args:
        float_module: the float model.
        q_module: the quantized model, with modules of the same names.
        module_swap_list: float module types, of containers too.
        logger_cls: makes the logger of one pair; it is called with both outputs, the quantized one first.
    """
    types = set(module_swap_list)
    children = dict(float_module.named_children())
    for name, module in list(q_module.named_children()):
        source = children.get(name)
        if source is None:
            continue
        if type(source) not in types:
            prepare_model_with_stubs(source, module, types, logger_cls)
        elif [type(one) for one in module.modules()] != [type(one) for one in source.modules()]:
            q_module._modules[name] = Shadow(module, source, logger_cls)


def compare_model_stub(
    float_model: nn.Module,
    q_model: nn.Module,
    module_swap_list: Iterable[type[nn.Module]],
    *data: Any,
    logger_cls: Callable[[], Logger] = ShadowLogger,
    **batch: Any,
) -> Stats:
    """Outputs of quantized modules and of their float ones for the same input, that of the running quantized model: the
    error that each module adds.

    Args:
        float_model: the float model.
        q_model: the quantized model.
        module_swap_list: as of :func:`prepare_model_with_stubs`.
        data: positional arguments of the quantized model.
        logger_cls: as of :func:`prepare_model_with_stubs`.
        batch: keyword arguments of the quantized model.

    Returns:
        ``{"<module>.stats": {"float": [...], "quantized": [...]}}`` with a tensor for each call.
    """
    try:
        prepare_model_with_stubs(float_model, q_model, module_swap_list, logger_cls)
        _run(q_model, data, batch)
        return get_logger_dict(q_model)
    finally:
        for module in list(q_model.modules()):
            for name, child in module._modules.items():
                if isinstance(child, Shadow):
                    module._modules[name] = child.orig_module


def _run(model: nn.Module, data: tuple[Any, ...], batch: dict[str, Any]) -> None:
    with torch.no_grad():
        model(*moved(data, device_of(model)), **moved(batch, device_of(model)))
