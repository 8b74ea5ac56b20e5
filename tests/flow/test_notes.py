"""The sentence about codebooks that cost more than they are worth."""

import doctest
import importlib
import warnings

import pytest
import torch
from torch import nn

from quanto_hf.flow import notes_of, quantize

module = importlib.import_module("quanto_hf.schemes.aqlm")


def test_quantize_says_so_before_anything_is_fitted():
    with pytest.warns(UserWarning, match=r"codebooks of 1 AQLM layer take more than 0\.5 bits per weight"):
        model = quantize(nn.Sequential(nn.Linear(64, 64)), "aqlm-1x8")
    # not frozen: there are no codebooks yet
    assert notes_of(model) == ()


def test_nothing_is_said_of_other_weights_and_of_layers_that_are_large_enough():
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        quantize(nn.Sequential(nn.Linear(64, 64)), "int4")
        quantize(nn.Sequential(nn.Linear(4096, 4096)), "aqlm-2x8")


def test_the_examples_in_the_docstrings_are_true():
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
