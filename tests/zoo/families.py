"""The families of models that transformers has: one folder of ``transformers.models`` each, and the class that shows
most of it."""

import importlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

# The first of these auto classes that has a family is taken: those whose model contains the others come first.
PREFERENCE = (
    "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "SPEECH_SEQ_2_SEQ",
    "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "CTC", "TDT", "RNNT", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "MASK_GENERATION",
    "KEYPOINT_MATCHING", "KEYPOINT_DETECTION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "TIME_SERIES_PREDICTION", "PRETRAINING", "SEQUENCE_CLASSIFICATION",
)  # fmt: skip


class Family(NamedTuple):
    """One family: the name of its folder, its model type, and the classes of its config and model."""

    name: str
    model_type: str
    config_class: Any
    model_class: Any


@cache
def names() -> dict[str, str]:
    """Name of each family -> model type, of all that have both a config and a model."""
    found: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        found.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    known = {kind for mapping in _mappings().values() for kind in mapping}
    chosen = {}
    for name, types in sorted(found.items()):
        if _modeling(name) is not None:
            same = [kind for kind in types if kind.replace("-", "_") == name]
            chosen[name] = (same or [kind for kind in types if kind in known] or types)[0]
    return chosen


def family(name: str, cls: str = "") -> Family:
    """The classes of a family. Imports its code.

    Args:
        name: of the family.
        cls: name of its model class; the preferred one if empty.
    """
    if cls:
        wanted = getattr(transformers, cls)
        return Family(name, wanted.config_class.model_type, wanted.config_class, wanted)
    model_type = names()[name]
    config_class = CONFIG_MAPPING[model_type]
    return Family(name, model_type, config_class, _class(name, model_type, config_class))


def _class(name: str, model_type: str, config_class: Any) -> Any:
    mappings = _mappings()
    for key in (*(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in PREFERENCE), "MODEL_MAPPING_NAMES", *mappings):
        listed = mappings.get(key, {}).get(model_type, ())
        for class_name in (listed,) if isinstance(listed, str) else listed:
            cls = getattr(transformers, class_name, None)
            if cls is not None and getattr(cls, "config_class", None) is config_class:
                return cls
    # a family that no auto class has
    classes = [
        cls
        for cls in vars(importlib.import_module(_modeling(name) or "")).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is config_class
    ]
    classes = [cls for cls in classes if not cls.__name__.endswith("PreTrainedModel")] or classes
    if not classes:
        raise LookupError(f"{name} has no model for {config_class.__name__}")
    return min(classes, key=lambda cls: ("For" not in cls.__name__, cls.__name__))


def _mappings() -> dict[str, Any]:
    return {key: value for key, value in vars(modeling_auto).items() if key.endswith("MAPPING_NAMES")}


def _modeling(name: str) -> str | None:
    file = Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py"
    return f"transformers.models.{name}.modeling_{name}" if file.exists() else None
