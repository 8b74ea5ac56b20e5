"""The transformers quantizer: empty quantized layers first, then each weight is quantized as it arrives."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import dot_natural_key
from transformers.quantizers.base import HfQuantizer

from quanto_hf.flow import (
    Choice,
    Plan,
    asked_by,
    dequantize,
    first_match,
    make_plan,
    not_quantizable,
    warn_of_notes,
)
from quanto_hf.hf.config.base import CONFIGS, FormatConfig
from quanto_hf.hf.config.flags import flags, refuse_mixed
from quanto_hf.hf.config.quanto import METHOD, QuantoConfig
from quanto_hf.hf.config.refusals import refuse_optimum_quanto
from quanto_hf.hf.config.skips import default_skips
from quanto_hf.hf.load import building
from quanto_hf.hf.load.finite import refuse_not_finite
from quanto_hf.hf.load.legacy import LegacyHooks
from quanto_hf.hf.load.loading import QuantizeWeights, check_before_loading, expect_guards, waits_for_weight
from quanto_hf.hf.load.merging import merge_late
from quanto_hf.hf.load.model_dtype import know_dtypes
from quanto_hf.hf.load.owner import Owned
from quanto_hf.hf.load.register import register
from quanto_hf.hf.load.replace import finish_prepared, replace_by_plan
from quanto_hf.hf.load.stored_dtypes import take_stored_dtypes
from quanto_hf.hf.memory.sizes import (
    Kept,
    Transient,
    kept_dtypes,
    largest_transient,
    loaded_element_size,
    lower_by_transient,
)
from quanto_hf.hf.offload.deferred import Deferred
from quanto_hf.hf.offload.hooks import add_to_index, folder_of, offload_hooks, use_in_place, where_it_runs
from quanto_hf.hf.save.card import TAG
from quanto_hf.hf.save.other_savers import watch_other_savers
from quanto_hf.hf.save.own_files import write_own_files
from quanto_hf.hf.save.saving import given_state, watch_saving
from quanto_hf.io import CheckpointError, aligned, read_headers
from quanto_hf.io.formats import Format
from quanto_hf.io.pickled import read_pickled_headers
from quanto_hf.nn import QuantizedInput, QuantizedWeight, qmodule_for
from quanto_hf.ops.scratch import free
from quanto_hf.schemes import TensorSpec

# Share of the weights from which on it is worth a warning that they cannot be quantized.
LEFT_IN_FLOAT = 0.1

# Bytes up to which a float tensor of a quantized checkpoint is copied from the disk where it does not begin at a cache
# line: in memory it would. A larger one was left there for its size, and begins at one in the files that we write.
COPIED = 1 << 20

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantoHfQuantizer(Owned, LegacyHooks, HfQuantizer):  # type: ignore[misc]
    """Quantizes a model while ``from_pretrained`` loads it, or loads one that was saved quantized.

    Args:
        quantization_config: the config of a format, or transformers' own for the same method.
        pre_quantized: whether the checkpoint is quantized.
    """

    requires_calibration = False
    required_packages = ("accelerate",)

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # a copy: what is resolved for this model is written into it
        config = copy.deepcopy(quantization_config)
        if not isinstance(config, FormatConfig):
            config = CONFIGS.get(config.quant_method, QuantoConfig).of(config)
        # of a config that asks for an empty model, it is another one
        config.quant_method = config.format.method
        super().__init__(config, **kwargs)
        if self.pre_quantized and (problem := self.format.refuses_saved(config.to_dict())) is not None:
            raise ValueError(problem)
        self._dtype = torch.float32
        self._headers: dict[str, TensorSpec] | None = None
        self._device_map: Any = None
        self._files: list[str] = []
        self._conversions: list[Any] = []
        self._deferred: Deferred | None = None
        # what is known of the model once its layers are replaced: sizes are asked for parts of it too
        self.kept: Kept = []
        self._stored: dict[str, torch.dtype] = {}
        self.transient = Transient()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a model that comes from another process, which may be the first one in this."""
        super().__setstate__(state)
        know_dtypes()

    @property
    def format(self) -> Format:
        """How the model is saved."""
        return type(self.quantization_config).format  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------- before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to compile, nothing to install: every device map is fine. transformers gives the final one of
        "auto" and the like here."""
        self._device_map = kwargs.get("device_map")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the float parts.

        Raises:
            ValueError: it is not float32, bfloat16 or float16.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} cannot be quantized; choose one of {', '.join(map(str, DTYPES))}")
        self._dtype = dtype
        # the last hook before the model is built
        building.begin()
        return dtype

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        plan = self._saved_plan(model) if self.pre_quantized else self._new_plan(model)
        if not self.pre_quantized:
            _warn_of_floats(model, plan)
            warn_of_notes(model, plan)
        replace_by_plan(model, plan, self.quantization_config, self.pre_quantized, self.format.layer)
        self._files = files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        if files:
            safe = all(file.endswith(".safetensors") for file in files)
            self._headers = read_headers(files) if safe else read_pickled_headers(files)
            refuse_optimum_quanto(self._headers or (), files)
        if self.pre_quantized:
            take_stored_dtypes(model, self._headers or {})
        self.kept = kept_dtypes(model, self._dtype)
        self._stored = {
            f"{name}.{leaf}" if name else leaf: tensor.dtype
            for name, module in model.named_modules()
            if isinstance(module, QuantizedWeight)
            for leaf in module.kept_names
            if (tensor := module.held(leaf)) is not None
        }
        self._device_map = kwargs.get("device_map")
        return model

    def _new_plan(self, model: Any) -> Plan:
        """How each module of a float model is quantized."""
        config = self.quantization_config
        return make_plan(
            model,
            config.choice(),
            exclude=config.modules_to_not_convert or (),
            skip=default_skips(model, self._dtype, config.default_skips, asked_by(config.overrides)),
            overrides=config.overrides,
        )

    def _saved_plan(self, model: Any) -> Plan:
        """The plan that was saved with the checkpoint, with names for this model class."""
        schemes = self.format.schemes(self.quantization_config.to_dict(), {})
        known = {name for name, module in model.named_modules() if qmodule_for(module) is not None}
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        chosen: dict[str, Choice] = {}
        absent: list[str] = []
        for saved, scheme in schemes.items():
            # a head was added or removed: AutoModel loads what AutoModelForCausalLM saved, and the other way round
            names = (saved, saved.removeprefix(prefix), prefix + saved)
            name = next((name for name in names if name in known), None)
            if name is None:
                absent.append(saved)
            else:
                chosen[name] = Choice(scheme, fit=self._saved_fit(saved))
        if absent and (not chosen or was_written_from(model)):
            raise ValueError(
                f"{len(absent)} of the {len(schemes)} quantized modules of the checkpoint are not in "
                f"{type(model).__name__}; the first one is {absent[0]!r}"
            )
        # for the reasons only: an entry of 'schemes' counts more than a default
        skip = default_skips(model, self._dtype, self.quantization_config.default_skips)
        skip.update((name, "it was saved in float") for name in known if name not in chosen and name not in skip)
        left = make_plan(model, self.quantization_config.choice(), skip=skip).left
        return Plan(chosen, {name: reason for name, reason in left.items() if name not in chosen})

    def _saved_fit(self, name: str) -> str | None:
        """The fit that goes on finding the scales of a layer in training, by the config; packed weights need none."""
        config = self.quantization_config
        if not config.qat:
            return None
        values = config.overrides.get(first_match(name, config.overrides) or "", {})
        fit: str | None = config.choice().override(values).fit
        return fit

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The conversions of the model, with pieces of quantized weights merged late. The last hook before the weights
        are read, so the check of the checkpoint is here."""
        # the first hook after the model was built
        if building.end():
            building.tie_alone(model)
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            conversions = self._conversions = merge_late(conversions)
        if self._headers is not None:
            # a copy: conversions remember which names they have seen
            seen = copy.deepcopy(conversions)
            try:
                check_before_loading(model, self._headers, seen, self.pre_quantized, complete=was_written_from(model))
            except CheckpointError as error:
                hint = self.quantization_config.hint()
                raise (CheckpointError(f"{error}\n({hint})") if hint else error) from None
            if self.pre_quantized:
                expect_guards(model, self._headers, copy.deepcopy(conversions))
            self._headers = None
        # after the check, which puts plain layers in the place of those that the checkpoint does not have
        self.measure(model)
        return conversions

    def measure(self, model: Any) -> None:
        """Find what quantizing the largest layer of an empty model will take."""
        self.transient = Transient() if self.pre_quantized else largest_transient(model, self._dtype, self.kept)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Room on each accelerator for the float weight and the temporaries of the largest layer, if weights are
        quantized there on arrival; on the CPU for what AQLM weights are made in."""
        return lower_by_transient(max_memory, self.transient)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element once the model is loaded, for device maps; the float placeholder does not count."""
        dequantize = self.quantization_config.dequantize
        return loaded_element_size(model, param_name, param, self.kept, self.pre_quantized, dequantize)

    # ------------------------------------------------------------------------------------------- while loading

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the float weight of a quantized layer, or is merged or split and goes to disk."""
        later = self._later()
        return waits_for_weight(model, param_name) or (later is not None and later.wants(model, param_name))

    def get_quantize_ops(self) -> QuantizeWeights:
        """The operation that quantizes one weight. What goes to disk is made after loading."""
        return QuantizeWeights(self._later())

    def _later(self) -> Deferred | None:
        """What goes to disk, if anything does."""
        has_disk = isinstance(self._device_map, dict) and "disk" in self._device_map.values()
        if self._deferred is None and has_disk:
            self._deferred = Deferred(self._device_map, self._files, self._conversions)
        return self._deferred

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype in which a tensor of a quantized checkpoint is loaded. Scales keep theirs: a model that keeps a
        layer in float32 does so for its weight, and the loader would convert whatever begins with this name."""
        stored = self._stored.get(converter.target_patterns[0])
        if stored is not None and stored.is_floating_point:
            return stored
        found: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return found

    # ------------------------------------------------------------------------------------------- after loading

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        building.tie_as_ever(model)
        if not self.pre_quantized or self.format.copies_floats:
            _own_floats(model, every=not self.pre_quantized)
        self._finish_offload(model)
        free()
        self._finish_layers(model)
        self.belongs_to(model)
        if self.pre_quantized:
            refuse_not_finite(model)
        config = self.quantization_config
        self.describe(model)
        watch_saving()
        watch_other_savers()
        know_dtypes()
        if config.dequantize:
            self.dequantize(model)
        return model

    def describe(self, model: Any) -> None:
        """Bring the config up to date with the layers of a model, which calibration and freezing change."""
        config = self.quantization_config
        if self.format.method == METHOD and hasattr(model, "add_model_tags"):
            # for every card that transformers or its Trainer makes
            model.add_model_tags([TAG])
        found = {flag: any(layers.values()) for flag, layers in flags(model).items()}
        for name, value in {**found, **self.format.describe(model, self.pre_quantized)}.items():
            setattr(config, name, value)

    def _finish_offload(self, model: Any) -> None:
        """Write what goes to disk, and use it, and the checkpoint's own files, in place."""
        hooks = offload_hooks(model)
        if self._deferred is not None and self._deferred.taken:
            folder = folder_of(hooks)
            if folder is None:
                raise ValueError(
                    f"device_map leaves {len(self._deferred.taken)} weights on disk that are quantized or merged now, "
                    "but no offload_folder says where; give offload_folder=... to from_pretrained, or save the model "
                    "quantized and load that"
                )
            add_to_index(hooks, self._deferred.write(model, folder))
        self._deferred, self._conversions = None, []
        if hooks:
            use_in_place(model, hooks, COPIED if self.pre_quantized and self.format.copies_floats else 0)

    def _finish_layers(self, model: Any) -> None:
        absent, config = [], self.quantization_config
        # only now: until here they said what the checkpoint holds
        for flag in config.asked:
            setattr(config, flag, True)
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedWeight):
                continue
            weight = module._parameters.get("weight")
            if weight is not None and weight.device.type == "meta":
                absent.append(f"{name}.weight")
                continue
            if config.qat:
                finish_prepared(module, config)
                continue
            # a converter whose first tensor stays float hands the others over as they are
            module.freeze()
            if config.static_activations and isinstance(module, QuantizedInput) and not module.is_static:
                module.make_static(device=where_it_runs(module))
            for kept in module.kept_names:
                # the loader marks every float parameter as trainable
                if (tensor := module.held(kept)) is not None:
                    tensor.requires_grad_(False)
        if absent:
            raise ValueError(
                "the checkpoint does not fit the model:\n  " + "\n  ".join(f"missing: {name}" for name in absent)
            )

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Float weights in plain layers. Everything else keeps its dtype unless one is given: transformers would
        convert the whole model, and round the frequencies of rotary embeddings, which are kept in float32."""
        model = self._dequantize(model, dtype=dtype)
        self.remove_quantization_config(model)
        if TAG in (getattr(model, "model_tags", None) or ()):
            model.model_tags.remove(TAG)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        places = getattr(model, "hf_device_map", {}).values()
        if "disk" in places or any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise ValueError("a model with offloaded weights cannot be dequantized; load it without disk offload first")
        dequantize(model)
        if isinstance(dtype, str):
            # save_pretrained leaves the name of the dtype in the config, from where transformers takes it
            dtype = getattr(torch, dtype)
        return model if dtype is None else model.to(dtype)

    # ------------------------------------------------------------------------------------------- what it can do

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """True: ``save_pretrained`` writes plain tensors in safetensors files."""
        return True

    def get_state_dict_and_metadata(self, model: Any, *args: Any) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The plain state dict, and what the header of each file says.

        Of an offloaded model transformers splits it into files in the order in which it comes, of others in its own
        order: so that both give the same files, it comes in that order.
        """
        refuse_mixed(model)
        # config.json is written after this
        self.describe(model)
        write_own_files()
        state = given_state()
        if state is None and hasattr(model, "hf_device_map"):
            state = dict(sorted(model.state_dict().items(), key=lambda item: dot_natural_key(item[0])))
        return state, self.format.metadata()

    @property
    def is_trainable(self) -> bool:
        """True: gradients reach the inputs of quantized layers, their biases, and every float parameter."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the model can be trained as it is: whether any of its parameters wants a gradient now, as float
        weights do with ``QuantoConfig(qat=True)``, or a float head on a quantized backbone. ``transformers.Trainer``
        asks, and refuses a quantized model without adapters where the answer is False."""
        model = self.owner
        if model is None:
            return bool(self.quantization_config.qat)
        return any(parameter.requires_grad for parameter in model.parameters())

    @property
    def is_compileable(self) -> bool:
        """True: every op has a fake, so that torch.compile sees one graph."""
        return True


def was_written_from(model: Any) -> bool:
    """Whether the checkpoint was written from the class of this model, so that everything fits or it is damaged."""
    return type(model).__name__ in (model.config.architectures or [])


def _own_floats(model: Any, every: bool) -> None:
    """Copy floats out of the mapped files. (Weights that go to disk are on meta, and are mapped later.)

    Args:
        every: of a float checkpoint, which would stay mapped as a whole for the sake of some norms. Of a quantized one
            only those that do not begin at a cache line, whose products would have other last bits.
    """
    stored = {id(t) for m in model.modules() if isinstance(m, QuantizedWeight) for t in m.tensors().values()}
    # the former ones too, so that no other tensor gets the number of one that is gone
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    # tensors of inference mode, in which the caller may be, cannot be trained later
    with torch.inference_mode(False):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.device.type == "cpu" and id(tensor) not in stored:
                        if id(tensor) not in made:
                            made[id(tensor)] = tensor, _owned(tensor, every)
                        tensors[name] = made[id(tensor)][1]


def _owned(tensor: torch.Tensor, always: bool) -> torch.Tensor:
    """The tensor with memory of its own; a new one in the place of one that was made in inference mode.

    Args:
        always: False copies only what does not begin at a cache line.
    """
    data = tensor.data
    if not tensor.is_inference():
        tensor.data = data.clone() if always else aligned(data)
        return tensor
    return nn.Parameter(data.clone(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data.clone()


def _warn_of_floats(model: Any, plan: Plan) -> None:
    """Say so when much less is quantized than the user will think."""
    share, types = not_quantizable(model)
    if share > LEFT_IN_FLOAT:
        warnings.warn(
            f"{share:.0%} of the weights of {type(model).__name__} stay in float, because they are in modules of a "
            f"type that quanto_hf does not quantize: {', '.join(types[:5])}",
            stacklevel=2,
        )
    elif not plan.chosen:
        warnings.warn(
            f"no linear layer of {type(model).__name__} is quantized; call quanto_hf.report(model) for the reasons",
            stacklevel=2,
        )


# for when this module, and not transformers, was the first one to ask for transformers' quantizers
register()
