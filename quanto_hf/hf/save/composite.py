"""What config.json says of a model that holds quantized layers and was not quantized itself: its parts were.

An ``EncoderDecoderModel`` with ``encoder_quantization_config``, a model of one's own around a quantized one,
``quantize(model.encoder)``, ``requantize(model, ...)``: nobody gave the outer model a quantizer, without which
transformers writes packed weights that it then does not find. While such a model is saved it has one, which describes
all of its layers.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from quanto_hf.hf.config.base import CONFIGS, FormatConfig, quantizer_class
from quanto_hf.hf.config.flags import refuse_mixed
from quanto_hf.hf.config.quanto import METHOD
from quanto_hf.hf.load.gguf import is_float_gguf
from quanto_hf.io.formats import format_of_layer
from quanto_hf.nn import QuantizedWeight

# layers of the eager mode: from_pretrained makes none
EAGER = ("quanto_hf.eager.modules.", "quanto_hf.eager.qat.")

# the models that are being saved, by id: a method that was overridden calls the one of its base class
_described: ContextVar[frozenset[int]] = ContextVar("quanto_hf_described", default=frozenset())
# what is changed meanwhile belongs to the model
_lock = threading.RLock()


def is_ours(model: Any) -> bool:
    """Whether a model has a quantizer of this library."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return isinstance(config, FormatConfig)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Name -> module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}


def is_described(model: Any) -> bool:
    """Whether :func:`described` has anything to do or to check."""
    return is_ours(model) or bool(quantized_layers(model)) or bool(_inner_configs(model.config))


@contextmanager
def described(model: Any) -> Iterator[None]:
    """While it lasts, a model of transformers has a quantizer that knows all of its quantized layers, and the only
    quantization config of ours within its config is the one that describes them all.

    Args:
        model: with or without a quantizer of its own, which is then used.

    Raises:
        ValueError: the layers do not fit into one config. Nothing has been changed then.
    """
    if id(model) in _described.get():
        yield
        return
    layers = quantized_layers(model)
    with ExitStack() as stack:
        mark = _described.set(_described.get() | {id(model)})
        stack.callback(_described.reset, mark)
        # another thread that saves the same model changes it until it is done
        with _lock:
            inner = _inner_configs(model.config)
            if layers:
                _refuse_parts_of_others(model, next(iter(layers)))
                refuse_mixed(model)
            mine = is_ours(model)
            if layers and not mine:
                # a quantizer marks the model for its card
                stack.enter_context(_holding(model, "model_tags", list(getattr(model, "model_tags", None) or ())))
            quantizer = model.hf_quantizer if mine else _quantizer(model, layers) if layers else None
            said = None if quantizer is None else quantizer.quantization_config
            # a composite has made its config of those of its parts, each of which has a dict since then
            replaced = said is not None and vars(model.config).get("quantization_config") is not said
            if inner or replaced:
                stack.enter_context(_lock)
            for config in inner:
                stack.enter_context(_without(config, "quantization_config"))
            if quantizer is not None and not mine:
                stack.enter_context(_holding(model, "hf_quantizer", quantizer))
            if replaced:
                stack.enter_context(_holding(model.config, "quantization_config", said))
        yield


@contextmanager
def _without(owner: Any, name: str) -> Iterator[None]:
    """An attribute is not there for a while."""
    value = vars(owner).pop(name)
    try:
        yield
    finally:
        setattr(owner, name, value)


@contextmanager
def _holding(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute for a while; then it is what it was, or not there."""
    there, former = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, former)
        else:
            delattr(owner, name)


def _inner_configs(config: Any) -> list[Any]:
    """The configs of parts that say that the part was quantized by us, each once."""
    import transformers

    found: dict[int, Any] = {}
    seen, todo = {id(config)}, list(vars(config).values())
    while todo:
        inner = todo.pop()
        if not isinstance(inner, transformers.PreTrainedConfig) or id(inner) in seen:
            continue
        seen.add(id(inner))
        todo += vars(inner).values()
        said = vars(inner).get("quantization_config")
        mine = isinstance(said, dict) and said.get("quant_method") == METHOD
        if mine or isinstance(said, FormatConfig):
            found[id(inner)] = inner
    return list(found.values())


def _refuse_parts_of_others(model: nn.Module, mine: str) -> None:
    for name, module in model.named_modules():
        held: Any = getattr(module, "hf_quantizer", None)
        if held is None or is_ours(module) or is_float_gguf(module):
            continue
        method = held.quantization_config.quant_method
        what = f"its {name}" if name else "as a whole it"
        raise ValueError(
            f"{type(model).__name__} cannot be saved: {mine} is quantized with {METHOD}, and {what} is quantized with "
            f"{getattr(method, 'value', method)}, but a checkpoint has one method. Save the parts each in a folder of "
            f"its own, or dequantize one of them"
        )


def _quantizer(model: nn.Module, layers: dict[str, QuantizedWeight]) -> Any:
    """A quantizer that says how the layers of a model are stored.

    Raises:
        ValueError: there is none that would make such layers.
    """
    for name, layer in layers.items():
        if any(base.__module__.startswith(EAGER) for base in type(layer).__mro__):
            raise ValueError(
                f"{type(model).__name__} cannot be saved with save_pretrained: {name} is a {type(layer).__module__}."
                f"{type(layer).__qualname__}, which from_pretrained does not make; save its state_dict()"
            )
    # the first layer of each format, that of others than ours first
    first = {format_of_layer(layer).method: name for name, layer in sorted(layers.items(), reverse=True)}
    method, *others = sorted(first, key=lambda method: method == METHOD)
    try:
        if others:
            raise ValueError(f"{first[others[0]]} in that of {others[0]}")
        config = CONFIGS[method].of_layers(layers)
    except ValueError as beside:
        raise ValueError(
            f"{type(model).__name__} cannot be saved: {first[method]} is in the format of {method!r} checkpoints, and "
            f"{beside}, but a checkpoint has one. Save the parts each in a folder of its own, or dequantize one of them"
        ) from None
    quantizer = quantizer_class(config)(config, pre_quantized=False)
    quantizer.describe(model)
    return quantizer
