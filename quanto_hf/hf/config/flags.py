"""What a config says for all layers of a model at once: trained, with learned scales, with static ones of inputs."""

from torch import nn

from quanto_hf.nn import QuantizedInput, QuantizedWeight
from quanto_hf.nn.learned import LearnedScales


def flags(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Flag of the config -> name of each layer that it is about -> whether it is so there."""
    found: dict[str, dict[str, bool]] = {"qat": {}, "learn_scales": {}, "static_activations": {}}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            found["qat"][name] = not module.is_frozen
        if isinstance(module, LearnedScales):
            found["learn_scales"][name] = module.learns
        if isinstance(module, QuantizedInput) and module.activations is not None:
            found["static_activations"][name] = module.is_static
    return found


def rounded_inputs(model: nn.Module) -> dict[str, list[str]]:
    """Number type of inputs, or "None" -> the layers that round them to it."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedInput) and module.rounds_inputs:
            found.setdefault(str(module.activations), []).append(name)
    return found


def refuse_mixed(model: nn.Module) -> None:
    """Refuse a model that could be saved and not be loaded.

    Raises:
        ValueError: layers differ in what the config says for all of them.
    """
    texts = {
        "qat": ("prepared", "frozen", "quanto_hf.freeze(model)"),
        "learn_scales": ("with learned scales", "without", "layer.learn_scales() for the others"),
        "static_activations": ("with static scales of inputs", "without", "calibrate the whole model"),
    }
    for flag, layers in flags(model).items():
        yes, no, advice = texts[flag]
        first = {so: name for name, so in reversed(layers.items())}
        if len(first) == 2:
            raise ValueError(
                f"a checkpoint has one kind of layers, but {first[True]} is {yes}, and {first[False]} {no}; {advice} "
                f"before you save it"
            )
    kinds = rounded_inputs(model)
    if len(kinds) > 1:
        said = ", and ".join(f"{names[0]} has activations={kind}" for kind, names in sorted(kinds.items()))
        raise ValueError(
            f"a checkpoint has one kind of layers, but {said}; quantize all parts with the same activations before you "
            f"save it, or save the parts each in a folder of its own"
        )
