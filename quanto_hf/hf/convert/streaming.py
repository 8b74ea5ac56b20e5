"""The tensors of a quantized checkpoint, one after the other, from those of a float one."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from quanto_hf.hf.convert.tensors import Files, Merged, Source
from quanto_hf.hf.load.decoding import DecodeAlone, plain_converter
from quanto_hf.hf.load.loading import quantize_into
from quanto_hf.hf.load.names import loader_names, split_name, targets_of
from quanto_hf.hf.memory.sizes import kept_dtypes, loaded_dtype
from quanto_hf.hf.memory.skeleton import Skeleton
from quanto_hf.hf.offload.deferred import Origin
from quanto_hf.io import check_tensors, read_headers
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import TensorSpec


class NotStreamable(Exception):
    """Why a checkpoint cannot be converted tensor by tensor."""


def find_sources(skeleton: Skeleton) -> dict[str, Source | Merged]:
    """Name in the float model -> where the checkpoint has it, by the names that the loader gives.

    Raises:
        NotStreamable: a tensor of the checkpoint is split into several of the model.
        CheckpointError: a shape is wrong.
    """
    model, conversions = skeleton.model, skeleton.conversions
    if not skeleton.files or not all(file.endswith(".safetensors") for file in skeleton.files):
        raise NotStreamable("it is not in safetensors files")
    entries = _entries(skeleton)
    state = model.state_dict()
    found: dict[str, Source | Merged] = {}
    for key, name, converter, pattern in loader_names(model, entries, conversions, state):
        if name not in state:
            # the loader leaves it out too
            continue
        if converter is None or isinstance(converter, DecodeAlone):
            if name in found:
                raise NotStreamable(f"its tensors are merged on loading without being converted, such as {key}")
            found[name] = entries[key]
            continue
        if len(targets_of(converter, name)) > 1:
            raise NotStreamable(f"its tensors are split on loading, such as {key}")
        merged = found.setdefault(name, Merged(Origin(plain_converter(converter))))
        assert isinstance(merged, Merged)
        merged.origin.parts.append((key, pattern))
        merged.sources[key] = entries[key]
    alone = {name: source.spec.shape for name, source in found.items() if isinstance(source, Source)}
    check_tensors(
        {name: TensorSpec(tuple(state[name].shape), torch.float32) for name in alone},
        {name: TensorSpec(shape, torch.float32) for name, shape in alone.items()},
    )
    _tie(model, found, state)
    return found


def _entries(skeleton: Skeleton) -> dict[str, Source]:
    """By the names that the checkpoint would have as a float one."""
    if (files := skeleton.quantizer.decoding.files) is None:
        return {key: Source(file, key, spec) for file in skeleton.files for key, spec in read_headers([file]).items()}
    mains = {name: encoded.main for name, encoded in files.encoded.items()}
    return {
        name: Source(files.file_of[mains.get(name, name)], name, spec, files if name in mains else None)
        for name, spec in files.headers.items()
    }


def _tie(model: Any, found: dict[str, Source | Merged], state: Mapping[str, torch.Tensor]) -> None:
    """Tie the skeleton as the loader does, and give names that share a parameter the same source; every other name
    has to have its own."""
    files = Files()
    for target, source in model.all_tied_weights_keys.items():
        if target in found and source in found:
            first, second = (files.whole(found[n], n, torch.float32, model) for n in (target, source))
            # with two values they are not tied; the loader compares them too
            if torch.equal(first, second):
                del found[target]
    files.close()
    missing = {name for name in state if _float_name(model, name) not in found}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    by_id = {id(model.get_parameter_or_buffer(name)): source for name, source in found.items()}
    for name in sorted(state):
        owner, leaf = split_name(model, name)
        if name in found or (isinstance(owner, QuantizedWeight) and leaf in owner.kept_names):
            continue
        if id(getattr(owner, leaf)) not in by_id:
            raise NotStreamable(f"it lacks {name}, which is newly initialised")
        found[name] = by_id[id(getattr(owner, leaf))]


def _float_name(model: Any, name: str) -> str:
    """The name of the float parameter that a stored tensor is made of; any other name as it is."""
    owner, leaf = split_name(model, name)
    slot = owner.slot_stored_as(leaf) if isinstance(owner, QuantizedWeight) else None
    return name if slot is None else slot.full(name.rpartition(".")[0])


def freeze_empty(skeleton: Skeleton) -> None:
    """Make the skeleton what the loaded model is, still on meta: stored tensors only, and its config."""
    model = skeleton.model
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            for slot in module.slots:
                module._parameters.pop(slot.name, None)
    model._weight_conversions = [entry for entry in skeleton.conversions if entry.was_used()]
    model.hf_quantizer = skeleton.quantizer
    skeleton.quantizer.postprocess_model(model)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]


def output_tensors(skeleton: Skeleton) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in the saved checkpoint -> name in the model, and an empty tensor; in the order of ``save_pretrained``.

    Raises:
        NotStreamable: a tensor of the model is not one tensor of the output.
    """
    model = skeleton.model
    state = model.state_dict()
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    state = remove_tied_weights_from_state_dict(state, model)
    kept = kept_dtypes(model, skeleton.dtype)
    state = {name: torch.empty_like(t, dtype=loaded_dtype(model, name, t.dtype, kept)) for name, t in state.items()}
    names = {id(tensor): name for name, tensor in state.items()}
    saved = revert_weight_conversion(model, state)
    if {id(tensor) for tensor in saved.values()} != set(names):
        raise NotStreamable("its tensors are merged or split on saving")
    return {saved_name: (names[id(tensor)], tensor) for saved_name, tensor in saved.items()}


class Reader:
    """Makes the tensors of the output. Files stay mapped while it is open.

    Args:
        skeleton: frozen (:func:`freeze_empty`).
        sources: of :func:`find_sources`.
    """

    def __init__(self, skeleton: Skeleton, sources: Mapping[str, Source | Merged]) -> None:
        self.skeleton, self.sources, self._files = skeleton, sources, Files()
        self._weight, self._stored = "", dict[str, torch.Tensor]()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.close()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the quantized model by its name there.

        Raises:
            ValueError: a weight has NaN or infinite values.
        """
        model = self.skeleton.model
        owner, leaf = split_name(model, name)
        if not (isinstance(owner, QuantizedWeight) and leaf in owner.kept_names):
            return self._files.whole(self.sources[name], name, dtype, model)
        slot = owner.slot_stored_as(leaf)
        assert slot is not None
        weight = slot.full(name.rpartition(".")[0])
        if weight != self._weight:
            # codes, scales and zeros follow each other, so a layer is quantized once
            pieces = self._files.pieces(self.sources[weight], weight, self.skeleton.dtype, model)
            parts = quantize_into(owner, pieces, weight)
            self._stored = {slot.stored(part): tensor for part, tensor in parts.items()}
            self._weight = weight
        return self._stored[leaf]
