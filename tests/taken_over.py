"""Methods of transformers that quanto_hf serves for a while, and no longer."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers.quantizers import auto

import quanto_hf


@contextmanager
def taken_over(*methods: str) -> Iterator[None]:
    """``quanto_hf.install`` of the methods. At the end it is as before, whatever else was installed meanwhile."""
    register = importlib.import_module("quanto_hf.hf.load.register")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(register, "_overrides", set())
        mappings = [auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
        before = [dict(mapping) for mapping in mappings]
        for method in methods:
            quanto_hf.install(override=method)
        try:
            yield
        finally:
            for mapping, items in zip(mappings, before, strict=True):
                mapping.clear()
                mapping.update(items)
