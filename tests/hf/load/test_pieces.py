"""A weight that comes in pieces, which the loader would have merged, is quantized like the whole one."""

import pytest
import torch
from torch import nn

from quanto_hf.hf.load.loading import quantize_into
from quanto_hf.nn import qmodule_for
from quanto_hf.schemes import make_scheme

MODULES = {
    "linear": lambda: nn.Linear(64, 24),
    "convolution": lambda: nn.Conv1d(8, 24, 3),
    # whose first dimension is not that of the stored rows
    "transposed convolution": lambda: nn.ConvTranspose1d(24, 6, 3),
    "transposed convolution, square": lambda: nn.ConvTranspose2d(24, 24, 3),
}


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("kind", MODULES)
def test_pieces_give_the_same_stored_tensors_as_the_whole_weight(kind, weights):
    module = MODULES[kind]()
    weight = module.weight.detach()
    made = []
    for given in (weight, [weight[:10], weight[10:11], weight[11:]]):
        layer = qmodule_for(module).from_module(module, make_scheme(weights))
        made.append(quantize_into(layer, given, "a.weight"))
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    layer.set_tensors(made[1])
    assert layer.weight.shape == weight.shape
