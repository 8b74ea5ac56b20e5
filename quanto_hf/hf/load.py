"""One call from a path to a quantized model."""

from os import PathLike
from typing import Any

from quanto_hf.hf.config import QuantoConfig


def load_and_quantize_model(
    path: str | PathLike[str], config: QuantoConfig | None = None, auto_class: Any = None, **kwargs: Any
) -> Any:
    """Load a model and quantize it on the way; or load one that was saved quantized.

    Args:
        path: a local folder or a hub id.
        config: how; None is ``QuantoConfig()`` (int8) for a float checkpoint, and what was saved for a quantized one.
        auto_class: the class whose ``from_pretrained`` is called; None is the class that the checkpoint names.
        **kwargs: passed to ``from_pretrained``: dtype, device_map, max_memory ...

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: the checkpoint names no class that this version of transformers has.
    """
    import transformers

    if auto_class is None or config is None:
        saved = transformers.AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in _HUB_KEYS if k in kwargs})
        if auto_class is None:
            auto_class = named_class(saved)
        if config is None and getattr(saved, "quantization_config", None) is None:
            config = QuantoConfig()
    if config is not None:
        # an AutoModel takes a None for the word that the checkpoint is not quantized
        kwargs["quantization_config"] = config
    return auto_class.from_pretrained(path, **kwargs)


_HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")


def named_class(config: Any) -> Any:
    """The model class that a config names.

    Raises:
        ValueError: transformers has none of its names.
    """
    import transformers

    names = config.architectures or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    raise ValueError(
        f"the checkpoint names {', '.join(names) or 'no class'}, which transformers {transformers.__version__} has "
        f"not; pass auto_class, such as transformers.AutoModelForCausalLM"
    )
