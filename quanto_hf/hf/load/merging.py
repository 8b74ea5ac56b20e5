"""A weight that the loader merges from several tensors is quantized before it is merged, piece by piece.

Merged first, it would be in memory twice as floats: the model's own converter makes a copy of all of its pieces. The
experts of a layer are the most of a model: each is read, converted and quantized before the next one is read.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from quanto_hf.hf.load.names import slot_at
from quanto_hf.hf.load.pieces import Pieces

# Operations on a stack that do to the matrix of each expert what they would do to it alone, unless their dimension is
# that of the experts.
EACH = (Concatenate, Transpose, Interleave)


class ConcatenateLater(Concatenate):  # type: ignore[misc]
    """Tensors that are put together along their first dimension, except those of a slot that is to be packed, which
    stay a list: its rows are quantized each on its own, so that the pieces can be quantized first."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The merged tensor, or the list of its pieces in their order."""
        model, name = kwargs.get("model"), kwargs.get("full_layer_name", "")
        if model is None or slot_at(model, name) is None:
            merged: dict[str, torch.Tensor] = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
            return merged
        pieces: list[torch.Tensor] = []
        for pattern in source_patterns:
            found = input_dict.pop(pattern, [])
            pieces += found if isinstance(found, list) else [found]
        return {self.get_target_pattern(target_patterns): pieces}


class ExpertByExpert(ConversionOps):  # type: ignore[misc]
    """The operations of a converter that stacks the weights of experts, or changes such a stack. Those of a slot that
    is to be packed are done to one expert at a time, when its weights are asked for.

    Args:
        operations: what is done to the whole stack otherwise.
    """

    def __init__(self, operations: list[Any]) -> None:
        self.operations = operations

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        """The stack, or :class:`Pieces`, one for each expert.

        Args:
            input_dict: pattern -> tensors, or what reads them.
            full_layer_name: of the parameter.
            kwargs: for the operations.
        """
        model = kwargs.get("model")
        found = slot_at(model, full_layer_name) if model is not None else None
        if found is not None and found[1].leading:
            (target,) = kwargs["target_patterns"]
            return {target: Pieces(self._each(input_dict, found[1].shape, full_layer_name, kwargs))}
        return self._run({key: [_read(t) for t in value] for key, value in input_dict.items()}, full_layer_name, kwargs)

    def _run(self, tensors: dict[str, Any], name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, full_layer_name=name, **kwargs)
        return tensors

    def _each(
        self, tensors: dict[str, Any], shape: tuple[int, ...], name: str, kwargs: dict[str, Any]
    ) -> Iterator[torch.Tensor]:
        """The weights of each expert, shape (1, ...).

        Args:
            shape: of the parameter.
        """
        if isinstance(self.operations[0], MergeModulelist):
            counts = {len(found) for found in tensors.values()}
            if len(counts) > 1:
                texts = ", ".join(f"{len(found)} of {pattern}" for pattern, found in tensors.items())
                raise ValueError(f"{name} is merged of the weights of experts, but the checkpoint has {texts}")
            parts = ({key: [_read(found[e])] for key, found in tensors.items()} for e in range(*counts))
        else:
            whole = {key: _read(found[0]) for key, found in tensors.items()}
            if getattr(self.operations[0], "check_dims", False) and next(iter(whole.values())).shape == shape:
                # it transposes what is not as the model has it, by the shape of the whole
                yield from torch.split(next(iter(whole.values())), 1)
                return
            parts = ({key: [t[e : e + 1]] for key, t in whole.items()} for e in range(min(map(len, whole.values()))))
        for part in parts:
            (made,) = self._run(part, name, kwargs).values()
            yield made[0] if isinstance(made, list) else made
            # before the next one is read
            del part, made

    @property
    def reverse_op(self) -> ConversionOps:
        """The operations that split the stack again."""
        return ExpertByExpert([operation.reverse_op for operation in reversed(self.operations)])


def _read(tensor: Any) -> torch.Tensor:
    made: torch.Tensor = tensor() if callable(tensor) else tensor
    return made


class StackLater(WeightConverter):  # type: ignore[misc]
    """A converter that leaves it to its operation when the tensors are read."""

    __slots__ = ()

    def materialize_tensors(self) -> dict[str, list[Any]]:
        """The tensors, or what reads them."""
        if all(callable(tensor) for tensors in self.collected_tensors.values() for tensor in tensors):
            return {key: self.collected_tensors.pop(key) for key in list(self.collected_tensors)}
        made: dict[str, list[Any]] = super().materialize_tensors()
        return made


def late(conversions: list[Any]) -> list[Any]:
    """The loader's conversions, with :class:`ConcatenateLater` where a converter ends in putting rows together, and
    :class:`ExpertByExpert` where all that it does can be done to one expert at a time."""
    return [_late(entry) if isinstance(entry, WeightConverter) else entry for entry in conversions]


def _late(converter: Any) -> Any:
    operations = converter.operations
    last = operations[-1] if operations else None
    if last is not None and type(last) is Concatenate and last.dim == 0:
        made = copy.deepcopy(converter)
        made.operations = [*operations[:-1], ConcatenateLater(last.dim, last.num_shards_attribute)]
        return made
    if type(converter) is not WeightConverter or len(converter.target_patterns) > 1 or not _works_on_each(operations):
        return converter
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    made = StackLater(list(sources), list(targets), [ExpertByExpert(list(operations))], force_cpu=converter.force_cpu)
    made.scope_prefix, made.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return made


def stacks_experts(converter: WeightConverter) -> bool:
    """Whether a converter makes a stack of a tensor for each expert."""
    first = converter.operations[0]
    first = first.operations[0] if isinstance(first, ExpertByExpert) else first
    return isinstance(first, MergeModulelist) and first.dim == 0


def _works_on_each(operations: list[Any]) -> bool:
    """Whether operations on a stack of experts do to the matrix of each what they would do to it alone."""
    first, *others = operations
    merges = type(first) is MergeModulelist and first.dim == 0
    return all(
        type(operation) in EACH
        and all(getattr(operation, name) > 0 for name in ("dim", "dim0", "dim1") if hasattr(operation, name))
        and not (getattr(operation, "check_dims", False) and len(operations) > 1)
        for operation in (others if merges else operations)
    )
