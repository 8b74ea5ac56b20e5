"""What models of transformers answer differently once they have quantized layers: one call for all of it."""

from quanto_hf.hf.load.model_dtype import know_dtypes
from quanto_hf.hf.load.resizing import watch_resizing
from quanto_hf.hf.load.ties import know_ties
from quanto_hf.hf.save.other_savers import watch_other_savers
from quanto_hf.hf.save.saving import watch_saving


def watch_models() -> None:
    """Let the model classes of transformers that exist now save, resize and tie quantized layers, and tell the dtype
    that they stand for. May be called again; nothing changes for models without such layers."""
    watch_saving()
    watch_other_savers()
    watch_resizing()
    know_dtypes()
    know_ties()
