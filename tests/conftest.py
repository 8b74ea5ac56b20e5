"""What every test starts with: the same random numbers, and two threads whatever the machine has."""

import os

# Before torch is imported: idle OpenMP threads sleep. Where other programs keep the cores busy, spinning ones make
# thousands of tiny products 10 times slower (test_linear.py: 6.5 s, and above 60 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
