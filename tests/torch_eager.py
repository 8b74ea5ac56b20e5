"""torch's own eager mode, to compare with while torch still has it."""

import warnings

import pytest


def torch_quantization():
    """``torch.ao.quantization``; the test is skipped where torch has no longer got it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch.ao.quantization")
