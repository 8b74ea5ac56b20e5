"""The transformers quantizer: empty quantized layers first, then each weight is quantized as it arrives."""

import copy
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key
from transformers.quantizers.base import HfQuantizer

from quanto_hf.flow import Assignment
from quanto_hf.flow.refuse import DTYPES
from quanto_hf.hf.config.base import CONFIGS, FormatConfig
from quanto_hf.hf.config.flags import flags, refuse_mixed
from quanto_hf.hf.config.quanto import METHOD, QuantoConfig
from quanto_hf.hf.load import building
from quanto_hf.hf.load.assigning import new_assignment, saved_assignment, was_written_from
from quanto_hf.hf.load.checking import check_before_loading, expect_guards
from quanto_hf.hf.load.decoding import Decoding
from quanto_hf.hf.load.expert_names import packed_conversions
from quanto_hf.hf.load.finishing import dequantized, finish_layers, finish_offload
from quanto_hf.hf.load.finite import refuse_not_finite
from quanto_hf.hf.load.left_in_float import warn_before_loading
from quanto_hf.hf.load.legacy import LegacyHooks
from quanto_hf.hf.load.loading import QuantizeWeights
from quanto_hf.hf.load.merging import late
from quanto_hf.hf.load.names import waiting_slot
from quanto_hf.hf.load.own_floats import own_floats
from quanto_hf.hf.load.owner import Owned
from quanto_hf.hf.load.register import register
from quanto_hf.hf.load.replace import replace_by_assignment
from quanto_hf.hf.load.stored_dtypes import kept_tensors, take_stored_dtypes
from quanto_hf.hf.load.ties import know_ties
from quanto_hf.hf.load.watching import watch_models
from quanto_hf.hf.memory.sizes import (
    Kept,
    Transient,
    kept_dtypes,
    largest_transient,
    loaded_element_size,
    lower_by_transient,
)
from quanto_hf.hf.offload.deferred import Deferred
from quanto_hf.hf.save.card import TAG
from quanto_hf.hf.save.own_files import write_own_files
from quanto_hf.hf.save.saving import given_state
from quanto_hf.io import CheckpointError
from quanto_hf.io.formats import Format
from quanto_hf.ops.scratch import free
from quanto_hf.schemes import TensorSpec

# Bytes up to which a float tensor of a quantized checkpoint is copied from the disk where it does not begin at a cache
# line: in memory it would. A larger one was left there for its size, and begins at one in the files that we write.
COPIED = 1 << 20


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
        self.decoding, config.decoder = Decoding(config.decoder), None
        kwargs["pre_quantized"] = kwargs.get("pre_quantized", True) and self.decoding.decoder is None
        super().__init__(config, **kwargs)
        know_ties()
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
        watch_models()

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
        assignment = self._saved_assignment(model) if self.pre_quantized else self._new_assignment(model)
        if not self.pre_quantized:
            warn_before_loading(model, assignment, self.quantization_config)
        replace_by_assignment(model, assignment, self.quantization_config, self.pre_quantized, self.format.layer)
        self._files = files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        self._headers = self.decoding.open(files, self._dtype, kept_dtypes(model, self._dtype)) if files else None
        if self.pre_quantized:
            take_stored_dtypes(model, self._headers or {})
        self.kept, self._stored = kept_dtypes(model, self._dtype), kept_tensors(model)
        self._device_map = kwargs.get("device_map")
        return model

    def _new_assignment(self, model: Any) -> Assignment:
        """How each module of a float model is quantized."""
        return new_assignment(model, self.quantization_config, self._dtype)

    def _saved_assignment(self, model: Any) -> Assignment:
        """The assignment that was saved with the checkpoint, with names for this model class."""
        config = self.quantization_config
        return saved_assignment(model, self.format.schemes(config.to_dict(), {}), config, self._dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The conversions of the model, with pieces of quantized weights merged late. The last hook before the weights
        are read, so the check of the checkpoint is here."""
        # the first hook after the model was built
        if building.end():
            building.tie_alone(model)
        made: list[Any] = super().update_weight_conversions(weight_conversions, model)
        conversions = [*made, *packed_conversions(made, model)] if self.pre_quantized else late(made)
        if self._headers is not None:
            seen, complete = copy.deepcopy(conversions), was_written_from(model)
            try:
                check_before_loading(model, self._headers, seen, self.pre_quantized, complete)
            except CheckpointError as error:
                hint = self.quantization_config.hint()
                raise (CheckpointError(f"{error}\n({hint})") if hint else error) from None
            if self.pre_quantized:
                expect_guards(model, self._headers, copy.deepcopy(conversions))
            self._headers = None
        conversions = self._conversions = self.decoding.conversions(conversions, model)
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
        waits = waiting_slot(model, param_name) is not None
        return waits or (later is not None and later.wants(model, param_name))

    def get_quantize_ops(self) -> QuantizeWeights:
        """The operation that quantizes one weight. What goes to disk is made after loading."""
        self.decoding.check()
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
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------- after loading

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        building.tie_as_ever(model)
        if not self.pre_quantized or self.format.copies_floats:
            own_floats(model, every=not self.pre_quantized)
        self._finish_offload(model)
        self.decoding.finish(model)
        free()
        finish_layers(model, self.quantization_config)
        self.belongs_to(model)
        if self.pre_quantized:
            refuse_not_finite(model)
        config = self.quantization_config
        self.describe(model)
        watch_models()
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
        finish_offload(model, self._deferred, COPIED if self.pre_quantized and self.format.copies_floats else 0)
        self._deferred, self._conversions = None, []

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Float weights in plain layers. Everything else keeps its dtype unless one is given: transformers would
        convert the whole model, and round the frequencies of rotary embeddings, which are kept in float32."""
        model = self._dequantize(model, dtype=dtype)
        self.remove_quantization_config(model)
        if TAG in (getattr(model, "model_tags", None) or ()):
            model.model_tags.remove(TAG)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        return dequantized(model, dtype)

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


# for when this module, and not transformers, was the first one to ask for transformers' quantizers
register()
