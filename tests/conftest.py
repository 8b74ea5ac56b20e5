"""What every test starts with: the same random numbers, and two threads whatever the machine has."""

import os
import warnings

# Before torch is imported: idle OpenMP threads sleep. Where other programs keep the cores busy, spinning ones make
# thousands of tiny products 10 times slower (test_linear.py: 6.5 s, and above 60 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch_eager import torch_quantization


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def ao():
    """``torch.ao.quantization``, to compare with while torch still has it, and without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch_quantization()


@pytest.fixture
def transformers_speaks_again():
    """For commands that run in this process, which silence transformers for good."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
