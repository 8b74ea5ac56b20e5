"""Models in the published AQLM format: loaded, made and saved without the ``aqlm`` package."""

import warnings
from typing import Any

from torch import nn

from quanto_hf.flow import Plan, first_match
from quanto_hf.flow.plan import shared_weights
from quanto_hf.hf.config.aqlm import AQLM_METHOD, SIZES, AqlmConfig
from quanto_hf.hf.config.quanto import METHOD
from quanto_hf.hf.config.skips import default_skips
from quanto_hf.hf.load.quantizer import QuantoHfQuantizer
from quanto_hf.hf.load.replace import replace_by_plan
from quanto_hf.hf.save.own_files import WRITER_KEY
from quanto_hf.io import CheckpointError
from quanto_hf.nn import QuantizedLinear, QuantizedWeight, source_of, why_no_qmodule


def aqlm_plan(
    model: nn.Module, config: AqlmConfig, not_to_quantize: list[str], prefixes: tuple[str, ...] = ("",)
) -> Plan:
    """Which linear layers get codes: all but those that a list names, by parameter or by module, and those that share
    their weight with another module.

    Args:
        model: usually on meta.
        config: the layout.
        not_to_quantize: names of parameters, or names or patterns of modules.
        prefixes: what may stand before a name of ``model`` in the list.
    """
    shared, plan = shared_weights(model), Plan()
    for name, module in model.named_modules():
        if source_of(module) is not nn.Linear:
            continue
        found = (pattern for prefix in prefixes if (pattern := first_match(prefix + name, not_to_quantize)) is not None)
        reason = next((f"{pattern!r} is not to be quantized" for pattern in found), None)
        if reason is None and name in shared:
            reason = f"its weight is tied to {shared[name]}"
        if reason is None:
            reason = why_no_qmodule(module)
        if reason is None:
            plan.chosen[name] = config.choice()
        else:
            plan.left[name] = reason
    return plan


def replace_with_aqlm_linear(
    model: nn.Module,
    quantization_config: Any = None,
    linear_weights_not_to_quantize: list[str] | None = None,
    current_key_name: list[str] | None = None,
    has_been_replaced: bool = False,
) -> tuple[nn.Module, bool]:
    """Replace the linear layers of a model by empty :class:`quanto_hf.nn.QuantizedLinear` ones, in place.

    Args:
        model: a model, usually on meta.
        quantization_config: an :class:`AqlmConfig`, or transformers' own; None is ``AqlmConfig()``.
        linear_weights_not_to_quantize: what stays float besides what the config names: parameters ("lm_head.weight") or
            modules ("lm_head").
        current_key_name: segments of the name of ``model`` inside a larger one, to which these names refer.
        has_been_replaced: what is returned if nothing is replaced.

    Returns:
        The model itself, and whether anything has been replaced.

    Raises:
        ValueError: the weight of a layer cannot be cut into blocks; the text names the layer. Nothing is changed then.

    Example:
        >>> config = AqlmConfig(num_codebooks=2, nbits_per_codebook=8)
        >>> model, replaced = replace_with_aqlm_linear(nn.Sequential(nn.Linear(16, 4)), config)
        >>> replaced, model[0].codes.device.type
        (True, 'meta')
    """
    config = read_config(quantization_config if quantization_config is not None else AqlmConfig())
    names = [*(linear_weights_not_to_quantize or []), *(config.linear_weights_not_to_quantize or [])]
    plan = aqlm_plan(model, config, names, ("".join(f"{segment}." for segment in current_key_name or []),))
    check_sizes(model, plan)
    replace_by_plan(model, plan, config, True, QuantizedLinear)
    for name in plan.chosen:
        model.get_submodule(name).requires_grad_(False)
    if not plan.chosen:
        warnings.warn("no linear layer of this model has been replaced by an AQLM one", stacklevel=2)
        return model, has_been_replaced
    return model, True


def read_config(config: Any) -> AqlmConfig:
    """A config of this format, whoever's class it is."""
    if isinstance(config, AqlmConfig):
        return config
    return AqlmConfig(**{name: getattr(config, name) for name in (*SIZES, "linear_weights_not_to_quantize")})


def check_sizes(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError for layers that cannot be cut into blocks."""
    problems = []
    for name, choice in plan.chosen.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if (reason := choice.scheme().refuses((layer.out_features, layer.in_features))) is not None:
            problems.append(f"{name}: {reason}")
    if problems:
        raise ValueError("the model cannot have AQLM weights of this layout:\n  " + "\n  ".join(problems))


class AqlmQuantizer(QuantoHfQuantizer):
    """Loads a model in the AQLM format, or makes one of a float model, without data.

    Args:
        quantization_config: an :class:`AqlmConfig`, or transformers' own.
        pre_quantized: whether the checkpoint is quantized.
    """

    layer_class = QuantizedLinear
    # in published files hardly anything begins at a cache line; in those that are saved here nearly everything does
    copies_floats = False

    @staticmethod
    def read_config(config: Any) -> AqlmConfig:
        """A config that is given, in our own class."""
        found = read_config(config)
        # of a config that asks for an empty model
        found.quant_method = AQLM_METHOD
        return found

    @staticmethod
    def check_saved(config: Any) -> None:
        """All that loading needs has a default."""

    def _saved_plan(self, model: Any) -> Plan:
        plan = self._plan(model)
        check_sizes(model, plan)
        return plan

    def _new_plan(self, model: Any) -> Plan:
        if (refusal := self.quantization_config.choice().refusal()) is not None:
            raise ValueError(refusal)
        plan = self._plan(model)
        for name, reason in default_skips(model, self._dtype).items():
            if plan.chosen.pop(name, None) is not None:
                plan.left[name] = reason
        for name, choice in list(plan.chosen.items()):
            layer = model.get_submodule(name)
            if (refusal := choice.scheme().refuses((layer.out_features, layer.in_features))) is not None:
                del plan.chosen[name]
                plan.left[name] = refusal
        return plan

    def _plan(self, model: Any) -> Plan:
        config = self.quantization_config
        # AutoModel loads what AutoModelForCausalLM saved, whose names have a prefix
        prefixes = ("", f"{model.base_model_prefix}.") if model.base_model_prefix else ("",)
        plan = aqlm_plan(model, config, config.linear_weights_not_to_quantize, prefixes)
        for name, reason in default_skips(model, self._dtype, heads=False).items():
            if plan.chosen.pop(name, None) is not None:
                plan.left[name] = reason
        return plan

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """See :class:`QuantoHfQuantizer`; an error also says which values of the config decide what a layer holds."""
        try:
            return super().update_weight_conversions(weight_conversions, model)
        except CheckpointError as error:
            sizes = ", ".join(f"{name}={getattr(self.quantization_config, name)}" for name in SIZES)
            raise CheckpointError(
                f"{error}\n(config.json says {sizes}, and by linear_weights_not_to_quantize which layers have no codes)"
            ) from None

    def describe(self, model: Any) -> None:
        """Name what stayed float in a model that was not in this format before."""
        if self.pre_quantized:
            return
        stored = {
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedWeight)
            for leaf in (*module.stored_names, "bias")
        }
        self.quantization_config.linear_weights_not_to_quantize = [n for n in model.state_dict() if n not in stored]

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The plain state dict: this format has no version."""
        state, _ = super().get_state_dict_and_metadata(model, *args)
        return state, {WRITER_KEY: METHOD}
