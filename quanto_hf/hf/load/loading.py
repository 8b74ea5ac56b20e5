"""The loading operation that turns a float checkpoint tensor into quantized ones, and the check before it."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from quanto_hf.flow import replace_modules
from quanto_hf.hf.load.stored_dtypes import disagreements
from quanto_hf.io import check_tensors, find_guards, without_guards
from quanto_hf.nn import QuantizedWeight
from quanto_hf.schemes import TensorSpec


def split_name(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and the parameter's own name."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def waits_for_weight(model: nn.Module, name: str) -> bool:
    """Whether a name is the float weight of a quantized layer that is to be packed on arrival."""
    return is_quantized_weight(model, name) and not split_name(model, name)[0].is_frozen


def is_quantized_weight(model: nn.Module, name: str) -> bool:
    """Whether a name is the weight of a quantized layer that holds it packed, or will. One for training does not."""
    try:
        module, leaf = split_name(model, name)
    except AttributeError:
        return False
    # beside the placeholder a layer holds the empty tensors for what is made of it
    return leaf == "weight" and isinstance(module, QuantizedWeight) and bool(module.tensors())


def stored_name(layer: QuantizedWeight, weight: str, part: str) -> str:
    """Name in the model of a stored tensor of the layer whose weight has this name."""
    return f"{weight.removesuffix('weight')}{layer.prefix}{part}"


class Later(Protocol):
    """What may want a tensor to be made later (:class:`quanto_hf.hf.offload.deferred.Deferred`)."""

    def takes(self, model: nn.Module, first: str, name: str, pieces: list[torch.Tensor]) -> bool:
        """Whether it takes this one, which is one of those that the loader makes together with ``first``."""


class QuantizeWeights(ConversionOps):  # type: ignore[misc]
    """Quantizes a float weight as it arrives from the checkpoint. It holds no model: the loader copies it often.

    Args:
        later: takes tensors that are not made now, or None.
    """

    def __init__(self, later: Later | None = None) -> None:
        self.later = later

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Names of float tensors -> names of stored tensors; what is not to be quantized passes through.

        Raises:
            ValueError: a tensor has the wrong shape, or NaN or infinite values.
        """
        assert model is not None
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            layer = split_name(model, name)[0] if waits_for_weight(model, name) else None
            pieces, names = value if isinstance(value, list) else [value], [name]
            if layer is not None:
                assert isinstance(layer, QuantizedWeight)
                _check_shape(layer, pieces, name)
            if self.later is not None and self.later.takes(model, full_layer_name, name, pieces):
                if layer is not None:
                    layer._parameters.pop("weight")
                    names += [stored_name(layer, name, part) for part in layer.tensors()]
            elif layer is not None:
                for part, tensor in quantize_into(layer, pieces, name).items():
                    result[stored_name(layer, name, part)] = tensor
            else:
                result[name] = value
                continue
            if missing_keys is not None:
                missing_keys.difference_update(names)
        return result


def quantize_into(
    layer: QuantizedWeight, weight: torch.Tensor | list[torch.Tensor], name: str
) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight; the layer gives up its placeholder.

    Args:
        layer: gets the error of the weight.
        weight: the rows, or pieces of them. A list is emptied.
        name: of the weight, for errors.

    Raises:
        ValueError: the weight has the wrong shape, or NaN or infinite values.
    """
    pieces = weight if isinstance(weight, list) else [weight]
    found = _check_shape(layer, pieces, name)
    if len(pieces) > 1 and not (layer.scheme.by_rows and layer.rows_first):
        pieces[:] = [torch.cat(pieces)]
        found = [layer.weight_shape]
    stored, errors = list[dict[str, torch.Tensor]](), list[tuple[int, float]]()
    while pieces:
        piece = pieces.pop(0)
        try:
            piece = layer.to_matrix(piece) if len(found) == 1 else piece.flatten(1)
            stored.append(layer.scheme.quantize(piece, layer.fit))
        except ValueError as reason:
            raise ValueError(f"{name}: {reason}") from None
        error = layer.measure_error(piece, stored[-1])
        if error is not None:
            errors.append((len(piece), error))
    # pieces of one weight have rows of about one size
    count = sum(rows for rows, _ in errors)
    layer.weight_error = (sum(rows * e**2 for rows, e in errors) / count) ** 0.5 if count else None
    layer._parameters.pop("weight", None)
    return stored[0] if len(stored) == 1 else {part: torch.cat([s[part] for s in stored]) for part in stored[0]}


def _check_shape(layer: QuantizedWeight, pieces: list[torch.Tensor], name: str) -> list[tuple[int, ...]]:
    wanted = layer.weight_shape
    found = [tuple(piece.shape) for piece in pieces]
    if len(found) == 1 and found[0] == wanted:
        return found
    if len(found) > 1 and all(s[1:] == wanted[1:] for s in found) and sum(s[0] for s in found) == wanted[0]:
        return found
    shapes = found[0] if len(found) == 1 else f"those of pieces, {', '.join(map(str, found))}"
    raise ValueError(f"{name} has shape {shapes} in the checkpoint, but the model needs {wanted}")


# ------------------------------------------------------------------------------------------------- before loading


def check_before_loading(
    model: Any, headers: Mapping[str, TensorSpec], conversions: Iterable[Any], pre_quantized: bool, complete: bool
) -> None:
    """Compare the headers of a checkpoint with an empty quantized model.

    Args:
        model: the model on meta, quantized layers in place.
        headers: of the checkpoint files, by the names in the files.
        conversions: what the loader will do with these names.
        pre_quantized: whether the checkpoint is quantized.
        complete: whether the checkpoint was written from the same model class, so that nothing may be missing. Else
            only quantized layers are compared, and one that the checkpoint does not have at all becomes a plain
            layer, which transformers initialises.

    Raises:
        CheckpointError: lists every missing, unexpected and mismatched tensor by name.
    """
    state = model.state_dict()
    if pre_quantized:
        headers = without_guards(headers)
    targets, unexpected, converted = _rename(model, headers, conversions, state)
    tied = set(model.all_tied_weights_keys)
    wanted: dict[str, TensorSpec] = {}
    absent: dict[str, QuantizedWeight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedWeight):
            continue
        names = _checkpoint_names(module, name, pre_quantized)
        if not complete and not any(n in targets for n in names):
            absent[name] = module
        else:
            wanted.update({n: _spec(state[n]) for n in names})
    if absent:
        _leave_in_float(model, absent)
    if pre_quantized and complete:
        ignored = _ignored(model._keys_to_ignore_on_load_missing)
        buffers = {name for name, _ in model.named_buffers()}
        wanted.update(
            {
                name: _spec(tensor)
                for name, tensor in state.items()
                if name not in tied and name not in buffers and not ignored(name)
            }
        )
    # what a converter merges or splits has other shapes in the file
    found = {name: spec for name, spec in targets.items() if name not in converted}
    wanted = {name: spec for name, spec in wanted.items() if name not in converted}
    if not pre_quantized:
        # a float checkpoint may have any dtype, and transformers reports what it does not use
        found = {name: TensorSpec(spec.shape, torch.float32) for name, spec in found.items()}
        unexpected = []
    elif not complete:
        unexpected = [name for name in unexpected if _belongs_to(model, name)]
    exact, more = (_exact(model), disagreements(model, found)) if pre_quantized else ((), ())
    check_tensors(wanted, found, unexpected, exact, more)


def _exact(model: nn.Module) -> set[str]:
    """Names of what the loader must not convert to another dtype."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight))
    return {f"{name}.{leaf}" if name else leaf for name, module in layers for leaf in module.kept_names}


def _checkpoint_names(module: QuantizedWeight, name: str, pre_quantized: bool) -> list[str]:
    made = () if pre_quantized else module.kept_names
    held = {**module._parameters, **module._buffers}
    leaves = [leaf for leaf, tensor in held.items() if tensor is not None and leaf not in made]
    return [f"{name}.{leaf}" if name else leaf for leaf in leaves]


def loader_names(
    model: Any, keys: Iterable[str], conversions: Iterable[Any], state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
    """What the loader makes of the names in a checkpoint, in its order.

    Args:
        model: the model on meta.
        keys: names in the files.
        conversions: what the loader does with these names.
        state: the state dict of ``model``.

    Yields:
        The name in the file, the (first) name in the model, and the converter that merges or splits the tensor, with
        the pattern by which it knows it, or None and an empty string. The model need not have the name.
    """
    conversions, prefix = list(conversions), model.base_model_prefix
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        made = next((c for c in converters if pattern is not None and pattern in c.source_patterns), None)
        yield key, name, made, pattern if made is not None else ""


def targets_of(converter: WeightConverter, first: str) -> list[str]:
    """The names in the model of all that a converter makes together with ``first``."""
    return [first.replace(converter.target_patterns[0], target, 1) for target in converter.target_patterns]


def _rename(
    model: Any, headers: Mapping[str, TensorSpec], conversions: Iterable[Any], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, TensorSpec], list[str], set[str]]:
    """Specs by model name, names in the file without a place in the model, and model names made by converters."""
    ignored = _ignored(model._keys_to_ignore_on_load_unexpected)
    targets: dict[str, TensorSpec] = {}
    unexpected: list[str] = []
    converted: set[str] = set()
    for key, name, converter, _ in loader_names(model, headers, conversions, state):
        if converter is not None:
            names = targets_of(converter, name)
            converted.update(names)
            targets.update(dict.fromkeys(names, headers[key]))
        elif name in state:
            targets[name] = headers[key]
        elif not ignored(name) and not name.endswith(("rotary_emb.inv_freq", "position_ids")):
            unexpected.append(key)
    return targets, unexpected, converted


def expect_guards(model: Any, headers: Mapping[str, TensorSpec], conversions: Iterable[Any]) -> None:
    """Have the loader say nothing about the guards in a checkpoint, for which a packed layer has no place. One that the
    model has a float weight for stays an error.

    Args:
        model: the model on meta, quantized layers in place.
        headers: of the checkpoint files, by the names in the files.
        conversions: what the loader will do with these names.
    """
    expected: set[str] = set()
    for _, name, converter, _ in loader_names(model, find_guards(headers), conversions, model.state_dict()):
        names = [name] if converter is None else targets_of(converter, name)
        expected.update(f"^{re.escape(name)}$" for name in names)
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *expected}


def _ignored(patterns: Iterable[str] | None) -> Any:
    if not patterns:
        return lambda name: False
    compiled = re.compile("|".join(f"({pattern})" for pattern in patterns))
    return lambda name: compiled.search(name) is not None


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _belongs_to(model: nn.Module, name: str) -> bool:
    """Whether an unexpected name is that of a quantized layer of the model."""
    try:
        return isinstance(split_name(model, name)[0], QuantizedWeight)
    except AttributeError:
        return False


def _leave_in_float(model: nn.Module, absent: Mapping[str, QuantizedWeight]) -> None:
    """Put plain layers on meta in the places of quantized ones that the checkpoint does not have."""
    names = list(absent)
    if len(names) == 1:
        said = f"{names[0]} is not in the checkpoint: it is newly initialised and stays float. Add it"
    else:
        said = (
            f"{names[0]} and {len(names) - 1} other layers are not in the checkpoint: they are newly initialised and "
            "stay float. Add them"
        )
    warnings.warn(f"{said} to modules_to_not_convert to say so yourself", stacklevel=2)
    made: dict[nn.Module, nn.Module] = {}
    for module in absent.values():
        empty = torch.empty(module.weight_shape, dtype=module.weight_dtype, device="meta")
        made[module] = plain = module.plain(empty)
        plain.quanto_hf_left = "it is not in the checkpoint"  # type: ignore[assignment]
    replace_modules(model, made)
