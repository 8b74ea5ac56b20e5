"""Fusing modules in a row: the same numbers, hooks at both ends, and errors that say why not."""

import copy

import pytest
import torch
from eager_models import ConvNet, images, warmed
from torch import nn

from quanto_hf import eager
from quanto_hf.eager import fuse_modules, fuse_modules_qat, fused, get_fuser_method


def norm(dims, features=4):
    made = getattr(nn, f"BatchNorm{dims}d")(features)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    nn.init.normal_(made.weight)
    return made


ROWS = {
    **{f"conv{n}d-bn": (n, lambda n=n: [conv(n), norm(n)], f"Conv{n}d", f"ConvBn{n}d") for n in (1, 2, 3)},
    **{
        f"conv{n}d-bn-relu": (n, lambda n=n: [conv(n), norm(n), nn.ReLU()], f"ConvReLU{n}d", f"ConvBnReLU{n}d")
        for n in (1, 2, 3)
    },
    **{f"conv{n}d-relu": (n, lambda n=n: [conv(n), nn.ReLU()], f"ConvReLU{n}d", f"ConvReLU{n}d") for n in (1, 2, 3)},
    **{
        f"transposed{n}d-bn": (
            n, lambda n=n: [getattr(nn, f"ConvTranspose{n}d")(3, 4, 2), norm(n)], f"ConvTranspose{n}d", None)
        for n in (1, 2, 3)
    },
    "linear-bn": (0, lambda: [nn.Linear(3, 4), norm(1)], "Linear", "LinearBn1d"),
    "linear-relu": (0, lambda: [nn.Linear(3, 4), nn.ReLU()], "LinearReLU", "LinearReLU"),
    "bn2d-relu": (2, lambda: [norm(2, 3), nn.ReLU()], "BNReLU2d", "BNReLU2d"),
    "bn3d-relu": (3, lambda: [norm(3, 3), nn.ReLU()], "BNReLU3d", "BNReLU3d"),
}  # fmt: skip


def conv(dims):
    return getattr(nn, f"Conv{dims}d")(3, 4, 2, bias=dims != 2)


@pytest.mark.parametrize("row", ROWS)
def test_a_fused_row_gives_the_same_numbers(row):
    dims, make, name, trained_name = ROWS[row]
    modules = make()
    names = [str(i) for i in range(len(modules))]
    model, x = nn.Sequential(*modules).eval(), torch.randn(2, 3, *[5] * dims)
    made = fuse_modules(model, names)
    torch.testing.assert_close(made(x), model(x), atol=1e-5, rtol=1e-5)
    assert [type(m).__name__ for m in made] == [name] + ["Identity"] * (len(modules) - 1)
    model.train()
    if trained_name is None:
        with pytest.raises(AssertionError, match="trained"):
            fuse_modules_qat(model, names)
        return
    made = fuse_modules_qat(model, names)
    assert type(made[0]) is getattr(fused, trained_name)
    torch.testing.assert_close(made(x), copy.deepcopy(model)(x), atol=1e-5, rtol=1e-5)


def test_a_list_of_rows_in_place_or_not():
    net = warmed(ConvNet(eager))
    x = images()
    made = fuse_modules(net, ConvNet.fusible)
    torch.testing.assert_close(made(x), net(x), atol=1e-5, rtol=1e-4)
    assert type(net.conv) is nn.Conv2d and fuse_modules(net, ConvNet.fusible, inplace=True) is net
    assert type(net.conv) is fused.ConvReLU2d


def test_hooks_at_both_ends_stay_and_run_once():
    model, calls = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU()).eval(), []
    model[0].register_forward_pre_hook(lambda *args, **kwargs: calls.append("first"), with_kwargs=True)
    model[2].register_forward_hook(lambda *args, **kwargs: calls.append("last"), with_kwargs=True)
    fuse_modules(model, ["0", "1", "2"])(torch.randn(1, 3, 4, 4))
    assert calls == ["first", "last"]


def test_what_cannot_be_fused_says_why():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(5))
    with pytest.raises(AssertionError, match="Conv2d, Tanh"):
        fuse_modules(model.eval(), ["0", "2"])
    with pytest.raises(AssertionError, match="training mode"):
        fuse_modules(model.train(), ["0", "1"])
    with pytest.raises(AssertionError, match="batch norm of 5"):
        fuse_modules(model.eval(), ["0", "3"])
    model[1].train()
    with pytest.raises(AssertionError, match="same mode"):
        fuse_modules_qat(model, ["0", "1"])
    with pytest.raises(AttributeError):
        fuse_modules(model, ["0", "nowhere"])
    bare = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, affine=False)).train()
    with pytest.raises(AssertionError, match="no weight to train"):
        fuse_modules_qat(bare, ["0", "1"])


def test_a_way_of_ones_own_counts_first():
    made = fuse_modules(
        nn.Sequential(nn.Linear(2, 2), nn.Tanh()),
        ["0", "1"],
        fuse_custom_config_dict={
            "additional_fuser_method_mapping": {(nn.Linear, nn.Tanh): lambda is_qat, *row: nn.Sequential(*row)}
        },
    )
    assert type(made[0]) is nn.Sequential and len(made[0]) == 2
    assert get_fuser_method((nn.Linear, nn.ReLU))(False, nn.Linear(1, 1), nn.ReLU()).__class__ is fused.LinearReLU
