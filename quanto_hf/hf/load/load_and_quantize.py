"""One call from a path to a quantized model."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from quanto_hf.hf.config.quanto import QuantoConfig
from quanto_hf.hf.config.refusals import refuse_no_config


def load_and_quantize_model(
    path: str | PathLike[str], config: QuantoConfig | None = None, auto_class: Any = None, **kwargs: Any
) -> Any:
    """Load a model and quantize it on the way; or load one that was saved quantized.

    Args:
        path: a local folder or a hub id.
        config: how; None is ``QuantoConfig()`` (int8) for a float checkpoint, and what was saved for a quantized one.
        auto_class: the class whose ``from_pretrained`` is called; None is the class that the checkpoint names.
        **kwargs: passed to ``from_pretrained``: dtype, device_map, max_memory, revision ... With
            ``trust_remote_code=True`` the class may be in the checkpoint's own code.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: the checkpoint names no class that this version of transformers has.
    """
    import transformers

    refuse_no_config(config, "config")
    if auto_class is None or config is None:
        saved = transformers.AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in HUB_KEYS if k in kwargs})
        if auto_class is None:
            auto_class = named_class(saved, bool(kwargs.get("trust_remote_code")))
        if config is None and getattr(saved, "quantization_config", None) is None:
            config = QuantoConfig()
    if config is not None:
        # an AutoModel takes a None for the word that the checkpoint is not quantized
        kwargs["quantization_config"] = config
    return auto_class.from_pretrained(path, **kwargs)


# what from_pretrained takes to find a checkpoint and its code
HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")


def named_class(config: Any, trust_remote_code: bool = False) -> Any:
    """The model class that a config names; for a class in the checkpoint's own code the AutoModel that loads it.

    Args:
        config: a ``PreTrainedConfig``.
        trust_remote_code: whether code of the checkpoint may be run. It then counts more than transformers' own.

    Raises:
        ValueError: transformers has none of its names.
    """
    import transformers

    names, own = config.architectures or [], own_code(config)
    if own is not None and trust_remote_code:
        return getattr(transformers, own[0])
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    said = (
        f"the checkpoint names {', '.join(names) or 'no class'}, which transformers {transformers.__version__} has not"
    )
    if own is not None:
        raise ValueError(
            f"{said}: it is in the checkpoint's own code, {own[1]}; pass trust_remote_code=True to run that"
        )
    raise ValueError(f"{said}; pass auto_class, such as transformers.AutoModelForCausalLM")


def own_code(config: Any) -> tuple[str, str] | None:
    """The AutoModel that loads the model from the checkpoint's own code, and where the class is there, such as
    ``("AutoModelForCausalLM", "modeling_mine.MineForCausalLM")``; None if it has no code of its own."""
    import transformers

    found = {
        name: where
        for name, where in (getattr(config, "auto_map", None) or {}).items()
        if name.startswith("AutoModel") and isinstance(where, str) and hasattr(transformers, name)
    }
    named = [name for name, where in found.items() if where.rpartition(".")[2] in (config.architectures or [])]
    if named or len(found) == 1:
        name = (named or list(found))[0]
        return name, found[name]
    return None


def class_without_files(config: Any, auto_class: Any, hub: Mapping[str, Any]) -> Any:
    """A class whose ``from_pretrained`` takes a config and no checkpoint.

    Args:
        config: a ``PreTrainedConfig``.
        auto_class: the class that is asked for; None is the one that the config names.
        hub: values of :data:`HUB_KEYS`.
    """
    trust = bool(hub.get("trust_remote_code"))
    cls = named_class(config, trust) if auto_class is None else auto_class
    where = (getattr(config, "auto_map", None) or {}).get(cls.__name__)
    from transformers.models.auto.auto_factory import _get_model_class, add_generation_mixin_to_remote_model

    if not trust or where is None:
        # an auto class looks for files
        known = type(config) in (getattr(cls, "_model_mapping", None) or ())
        return _get_model_class(config, cls._model_mapping) if known else cls
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = {key: value for key, value in hub.items() if key not in ("trust_remote_code", "subfolder")}
    return add_generation_mixin_to_remote_model(get_class_from_dynamic_module(where, config.name_or_path, **named))
