"""Linear layers that choose: routers of experts, gates of shared experts, input and forget gates of xLSTM.

They stay float by default. A router has one output per expert, which is next to nothing of a model, and decides which
expert runs: an error there is not a little noise, it is another expert. Many models hold their router as a raw
parameter, which stays float anyway; this rule does the same for those with a linear layer.

A layer is a router if its name says so *and* it has few outputs:

- it is called router, wg, or the like (``ROUTERS``), or is a gate of xLSTM (``LSTM_GATES``), and has at most twice as
  many outputs as there are experts, or heads (some route to keys, or to no expert as well, or hold two gates at once);
- it is the gate of a shared expert (``EXPERT_GATES``), and has at most a quarter as many outputs as inputs;
- it is called gate, is in no expert, has no twin of its shape beside it (the up projection of a gated MLP), and has at
  most as many outputs as there are experts;
- it is in a module that is called router or gate, and the last linear layer of that has as few outputs.

The number of experts is that of the config, of an attribute, or of the experts that are seen beside the layer; where
nothing tells it, a name alone is not enough.

So ``gate_proj``, ``gate_up_proj``, ``output_gate`` and other wide gates are quantized as ever.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from quanto_hf.flow.patterns import matches

REASON = "routers and gates stay float by default: an error there takes another expert, not a little precision"

ROUTERS = re.compile(r"(.*_)?(router|wg)(_.*)?")
EXPERT_GATES = re.compile(r"(.*_)?experts?_gat(e|ing)")
LSTM_GATES = re.compile(r"(.*_)?(i|f|if)gate(_.*)?")
GATES = re.compile(r"gate|gating(_network)?|gate_network|gating_layer|moe_gate|gate_layer|switch")
EXPERTS = re.compile(r"(.*_)?experts?(_.*)?")
# numbers of experts and of heads in a config, or as attributes of modules
COUNTS = re.compile(r"(.*_)?(num|n)(_[a-z]+)*_experts?|(.*_)?experts?_num|num_keys")
HEADS = re.compile(r"(num|n)(_attention)?_heads?")


def routers(model: nn.Module, config: Any = None, asked: Iterable[str] = ()) -> dict[str, str]:
    """Module name -> why it stays float, for the routers and gates of a model.

    Args:
        model: any model, also on meta.
        config: of transformers, or None: what it says of experts and heads counts, like the attributes of modules.
        asked: patterns of modules that are to be quantized all the same. One that names a module that the router is in
            does not count: ``mlp`` does not ask for ``mlp.gate``, ``gate`` does.

    Example:
        >>> experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        >>> block = nn.ModuleDict({"gate": nn.Linear(64, 4), "experts": experts})
        >>> list(routers(block)), list(routers(block, asked=["gate"]))
        (['gate'], [])
    """
    experts, heads = _counts(config, COUNTS), _counts(config, HEADS)
    modules = dict(model.named_modules())
    asked, found = list(asked), {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or any(_names(name, pattern) for pattern in asked):
            continue
        if _chooses(modules, name, module, experts, heads):
            found[name] = REASON
    return found


def _names(name: str, pattern: str) -> bool:
    """Whether a pattern names a module itself, and not only one that it is in."""
    parent = name.rpartition(".")[0]
    return matches(name, pattern) and not (parent and matches(parent, pattern))


def _chooses(
    modules: Mapping[str, nn.Module], name: str, module: nn.Linear, in_config: int, heads_in_config: int
) -> bool:
    *path, leaf = name.split(".")
    outputs, experts = module.out_features, max(in_config, _nearby(modules, path, COUNTS))
    if EXPERT_GATES.fullmatch(leaf):
        return outputs <= module.in_features // 4
    if LSTM_GATES.fullmatch(leaf):
        return outputs <= 2 * max(heads_in_config, _nearby(modules, path, HEADS))
    if ROUTERS.fullmatch(leaf):
        return outputs <= 2 * experts
    if GATES.fullmatch(leaf):
        return outputs <= experts and not _in_an_expert(path) and not _has_twin(modules, path, module)
    for depth in range(len(path), 0, -1):
        # router.layer, gate.wg, gate.router_mlp.out_proj
        around = path[depth - 1]
        if ROUTERS.fullmatch(around) or (GATES.fullmatch(around) and not _in_an_expert(path[: depth - 1])):
            whole = modules[".".join(path[:depth])]
            last = [layer for layer in whole.modules() if isinstance(layer, nn.Linear)][-1]
            return last.out_features <= 2 * experts
    return False


def _in_an_expert(path: list[str]) -> bool:
    return any(EXPERTS.fullmatch(segment) for segment in path)


def _has_twin(modules: Mapping[str, nn.Module], path: list[str], module: nn.Linear) -> bool:
    """Whether a linear layer of the same shape stands beside it."""
    beside = modules[".".join(path)].children()
    shape = module.in_features, module.out_features
    return any(
        isinstance(other, nn.Linear) and other is not module and (other.in_features, other.out_features) == shape
        for other in beside
    )


def _nearby(modules: Mapping[str, nn.Module], path: list[str], names: re.Pattern[str]) -> int:
    """The largest number of experts (or heads) that the modules around a layer tell: by an attribute, or by experts."""
    most = 0
    for depth in range(len(path), max(-1, len(path) - 4), -1):
        around = modules[".".join(path[:depth])]
        most = max([most, *_numbers(vars(around).items(), names)])
        if names is COUNTS:
            most = max([most, *_experts_of(around)])
    return most


def _experts_of(around: nn.Module) -> Iterator[int]:
    """Numbers of experts that a module holds: in a list, or in a parameter with one matrix for each."""
    tensors = [tensor for leaf, tensor in around.named_parameters(recurse=False) if EXPERTS.fullmatch(leaf)]
    for leaf, child in around.named_children():
        if EXPERTS.fullmatch(leaf):
            if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                yield len(child)
            tensors += child.parameters(recurse=False)
    yield from (tensor.shape[0] for tensor in tensors if tensor.dim() == 3)


def _counts(config: Any, names: re.Pattern[str], depth: int = 0) -> int:
    """The largest number of experts (or heads) in a config, or in one inside of it."""
    if config is None or depth > 4 or not hasattr(config, "__dict__"):
        return 0
    values = {**vars(config), **{n: getattr(config, n, None) for n in getattr(config, "attribute_map", {})}}
    found = list(_numbers(values.items(), names))
    found += [_counts(value, names, depth + 1) for value in values.values() if hasattr(value, "to_dict")]
    return max([0, *found])


def _numbers(values: Iterable[tuple[str, Any]], names: re.Pattern[str]) -> Iterator[int]:
    for name, value in values:
        if names.fullmatch(name):
            # some give one number per layer
            several = value if isinstance(value, list | tuple) else [value]
            yield from (item for item in several if isinstance(item, int) and not isinstance(item, bool))
