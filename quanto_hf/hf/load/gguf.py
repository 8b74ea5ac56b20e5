"""Models that transformers has read from a GGUF file: their weights are float, and their config says something else."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GGUF_METHOD, SUFFIX = "gguf", ".gguf"


def is_gguf(model: Any) -> bool:
    """Whether transformers has read a model from a GGUF file, and it says so still."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    return bool(getattr(method, "value", method) == GGUF_METHOD)


def is_float_gguf(model: Any) -> bool:
    """Whether a model came from a GGUF file with its weights made float, so that only its marks are those of a
    quantized one. (With a kernel for it transformers keeps the blocks of the file in layers of its own.)"""
    return is_gguf(model) and not getattr(model.hf_quantizer, "packed_modules", None)


def refuse_gguf_blocks(model: Any) -> None:
    """Raise ValueError for a model whose layers hold the blocks of a GGUF file."""
    if is_gguf(model):
        raise ValueError(
            f"the layers of this {type(model).__name__} hold the blocks of a GGUF file; load it with "
            f"quantization_config=transformers.GgufConfig(dequantize=True), and quantize that"
        )


def forget_gguf(model: Any) -> None:
    """Take the marks of a GGUF file off a model whose weights are float: from here on it is a float model, which can be
    saved, trained and quantized."""
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        # that the attribute is there at all means something to some models
        if hasattr(getattr(module, "config", None), "_is_quantized"):
            del module.config._is_quantized


def named_gguf(model: str | os.PathLike[str]) -> Path | None:
    """A path to a GGUF file that exists, or None for anything else."""
    path = Path(model).expanduser()
    return path if path.suffix.lower() == SUFFIX and path.is_file() else None


@contextmanager
def float_folder(file: Path, beside: Path, dtype: Any = "auto", auto_class: Any = None) -> Iterator[Path]:
    """A folder with the float model of a GGUF file and its tokenizer, which is removed at the end.

    Args:
        file: the GGUF file.
        beside: the folder is made next to this one, which has room for a model.
        dtype: "auto", which is the one that transformers takes, or the name of one.
        auto_class: the class whose ``from_pretrained`` is called; None is the one for the architecture.

    Raises:
        ValueError: transformers does not read this file.
        ImportError: what transformers reads it with is not installed.
    """
    import transformers

    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".quanto_hf_gguf-", dir=beside.parent) as made:
        where: dict[str, Any] = {"gguf_file": file.name}
        config = transformers.AutoConfig.from_pretrained(file.parent, **where)
        cls = auto_class or _class_of(config)
        chosen = {} if dtype == "auto" else {"dtype": dtype}
        whole = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
        if whole is not None:
            chosen["quantization_config"] = whole
        model = cls.from_pretrained(file.parent, **where, **chosen)
        if is_gguf(model):
            forget_gguf(model)
        model.save_pretrained(made)
        del model
        try:
            transformers.AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(made)
        except Exception as error:  # whatever a converter of transformers stumbles over: the model is there
            warnings.warn(
                f"{file} has no tokenizer that transformers can convert ({type(error).__name__}: {error}); copy the "
                f"one of the original model into the output folder",
                stacklevel=3,
            )
        yield Path(made)


def _class_of(config: Any) -> Any:
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel
