"""The recipe "Add a kernel" of docs/architecture.md: a kernel in one file, registered by one decorator."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from quanto_hf.cli.app import app
from quanto_hf.nn import QLinear
from quanto_hf.ops import GroupedWeight, linear, linear_op
from quanto_hf.ops.registry import why_kernel_wrong
from quanto_hf.schemes import make_scheme

FACTOR = 1.0
RAN: list[str] = []


# ------------------------------------------------------------------------------------------------ the kernel, in whole


def supports(x, weight, bias):
    """The sentence why not, or None."""
    return (
        None if weight.qtype == "int4" and weight.group_size > 0 else "the toy multiplies int4 weights in groups only"
    )


def bind(refuses, weight):
    """What a module keeps: the weight is looked up once."""
    if supports(None, weight, None) is not None:
        return None
    dense = weight.dense(torch.float32)

    def call(x, bias):
        if x.shape[-1] != weight.in_features or refuses(x, weight, bias) is not None:
            return None
        RAN.append("bound")
        return F.linear(x.float(), FACTOR * dense, None if bias is None else bias.float()).to(x.dtype)

    return call


def run(x, weight, bias):
    """The product."""
    RAN.append("run")
    dense = weight.dense(torch.float32)
    return F.linear(x.float(), FACTOR * dense, None if bias is None else bias.float()).to(x.dtype)


@pytest.fixture(autouse=True)
def _toy():
    RAN.clear()
    why_kernel_wrong.cache_clear()
    before = list(linear_op.kernels)
    # the one line of registration
    linear_op.kernel("toy", supports, first=True, device="cpu", kinds=(GroupedWeight,), bind=bind, label=lambda: "toy")(
        run
    )
    yield
    linear_op.kernels[:] = before
    why_kernel_wrong.cache_clear()


# ------------------------------------------------------------------------------------------------------ what it gives


def case(weights="int4"):
    scheme = make_scheme(weights)
    return torch.randn(3, 96), scheme.weight(scheme.quantize(torch.randn(8, 96)), 96)


def test_it_is_chosen_for_the_weights_that_it_takes():
    x, weight = case()
    made = linear(x, weight)
    assert "run" in RAN
    torch.testing.assert_close(made, linear_op.reference(x, weight, None), rtol=1e-4, atol=1e-4)
    assert linear_op.explain(x, weight, None)[0] == ("toy", "runs")


def test_it_refuses_others_with_a_sentence():
    x, weight = case("int8")
    assert dict(linear_op.explain(x, weight, None))["toy"] == "the toy multiplies int4 weights in groups only"
    linear(x, weight)
    assert not RAN
    meta = case()[1].map(lambda tensor: tensor.to("meta"))
    assert dict(linear_op.explain(x.to("meta"), meta, None))["toy"] == "it runs on CPU only"


def test_a_module_keeps_its_bound_call():
    layer = QLinear.from_module(torch.nn.Linear(96, 8), make_scheme("int4"))
    layer.freeze()
    with torch.no_grad():
        x = torch.randn(3, 96)
        layer(x)
        RAN.clear()
        made = layer(x)
    assert RAN == ["bound"]
    torch.testing.assert_close(made, F.linear(x, layer.dequantized(), layer.bias), rtol=1e-4, atol=1e-4)


def test_the_command_line_lists_it():
    result = CliRunner().invoke(app, ["kernels", "--weights", "int4,int8", "--features", "96x160", "--json"])
    assert result.exit_code == 0, result.stdout
    rows = {(row["weights"].split()[0], row["op"]): row for row in json.loads(result.stdout)["kernels"]}
    assert rows["int4", "linear"]["runs"] == "toy"
    assert "toy multiplies int4" in rows["int8", "linear"]["others"]["toy"]


def test_a_wrong_one_is_reported_once_and_not_used(monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", 1.1)
    x, weight = case()
    with pytest.warns(RuntimeWarning, match="the toy kernel for int4 weights with group_size 64 disagrees") as caught:
        made = linear(x, weight)
    assert len(caught) == 1
    torch.testing.assert_close(made, linear_op.reference(x, weight, None), rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "disagrees" in dict(linear_op.explain(x, weight, None))["toy"]
