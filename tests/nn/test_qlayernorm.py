"""The layer norm with a rounded output: nn.LayerNorm in everything else."""

import copy

import pytest
import torch
from torch import nn

from quanto_hf.nn import QLayerNorm, qmodule_for
from quanto_hf.nn.activation import fake_quantize
from quanto_hf.qtypes import QType, qfloat8, qint8

every_type = pytest.mark.parametrize("kind", [qint8, qfloat8], ids=str)
LAYERS = {
    "plain": lambda: nn.LayerNorm(16),
    "no-bias": lambda: nn.LayerNorm(16, bias=False),
    "no-weight": lambda: nn.LayerNorm(16, elementwise_affine=False),
    "two-dimensions": lambda: nn.LayerNorm((3, 16), eps=1e-2),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def trained(make) -> nn.LayerNorm:
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@every_layer
@every_type
def test_the_output_is_that_of_the_layer_norm_rounded_per_token(make, kind: QType):
    layer, x = trained(make), torch.randn(2, 3, 16)
    with torch.no_grad():
        made, normed = QLayerNorm.from_module(layer, kind)(x), layer(x)
    assert torch.equal(made, fake_quantize(normed, kind))
    assert not torch.equal(made, normed)


@every_layer
def test_without_a_type_for_activations_it_is_the_layer_norm(make):
    layer, x = trained(make), torch.randn(2, 3, 16)
    assert torch.equal(QLayerNorm.from_module(layer, None)(x), layer(x))


@every_layer
def test_parameters_names_settings_and_mode_are_those_of_the_layer_norm(make):
    layer = trained(make).eval()
    made = QLayerNorm.from_module(layer, qint8)
    assert isinstance(made, nn.LayerNorm) and not made.training
    assert made.weight is layer.weight and made.bias is layer.bias
    assert (made.normalized_shape, made.eps) == (layer.normalized_shape, layer.eps)
    assert made.elementwise_affine == layer.elementwise_affine
    assert list(made.state_dict()) == list(layer.state_dict())


def test_it_is_what_replaces_exactly_a_layer_norm():
    class Other(nn.LayerNorm):
        pass

    assert qmodule_for(nn.LayerNorm(16)) is QLayerNorm
    assert qmodule_for(Other(16)) is None


@every_type
def test_gradients_are_those_of_the_layer_norm(kind: QType):
    layer, x, grad = trained(LAYERS["plain"]), torch.randn(3, 16), torch.randn(3, 16)
    layer(x).backward(grad)
    expected, layer.weight.grad = layer.weight.grad, None
    QLayerNorm.from_module(layer, kind)(x).backward(grad)
    assert torch.equal(layer.weight.grad, expected)


def test_a_copy_keeps_its_type_and_the_class_keeps_none():
    made = copy.deepcopy(QLayerNorm.from_module(nn.LayerNorm(16), qint8))
    assert made.activations == qint8
    assert QLayerNorm(16).activations is None


def test_its_text_names_the_type():
    assert "(16,)" in repr(QLayerNorm.from_module(nn.LayerNorm(16), qint8))
    assert "activations=int8" in repr(QLayerNorm.from_module(nn.LayerNorm(16), qint8))
