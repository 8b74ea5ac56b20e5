"""One row per parameter: how it is stored, or why it is float."""

import pytest
import torch
from torch import nn

from quanto_hf import freeze, quantize, report


def model(**kwargs):
    net = nn.Sequential(nn.Embedding(20, 96), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 40, bias=False))
    return freeze(quantize(net, **{"weights": "int4", "exclude": "3", **kwargs}))


def test_every_parameter_has_one_row_under_its_name_in_the_float_model():
    rows = report(model()).rows
    assert [row.name for row in rows] == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight"]
    assert [row.shape for row in rows] == [(20, 96), (64, 96), (64,), (64,), (64,), (40, 64)]


def test_every_float_parameter_has_a_reason_and_no_quantized_one_has():
    reasons = {row.name: row.reason for row in report(model()).rows}
    assert reasons == {
        "0.weight": "Embedding is quantized only with embeddings='int8' or the like, or where a pattern names it",
        "1.weight": "",
        "1.bias": "biases stay float",
        "2.weight": "LayerNorm is not a type that is quantized",
        "2.bias": "LayerNorm is not a type that is quantized",
        "3.weight": "it matches '3' of the modules not to convert",
    }


def test_a_layer_that_is_not_frozen_says_so():
    rows = {row.name: row for row in report(quantize(nn.Sequential(nn.Linear(8, 8)), weights="int8")).rows}
    assert (rows["0.weight"].stored, rows["0.weight"].reason) == ("float32", "not frozen")


def test_bytes_and_bits_count_scales_and_zeros():
    result = report(model())
    row = result.rows[1]
    # 96 columns in groups of 64: 2 scales and 2 zeros of 2 bytes per row
    assert row.stored == "int4 g64 asym" and row.nbytes == 64 * (96 // 2 + 2 * 2 * 2)
    assert row.bits == 8 * row.nbytes / (64 * 96) == result.quantized_bits


def test_the_total_is_the_bytes_of_the_model():
    net = model()
    assert report(net).nbytes == sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8", "nf4", "fp4"])
def test_the_error_is_the_relative_error_of_the_weight(weights):
    exact = nn.Sequential(nn.Linear(96, 64))
    weight = exact[0].weight.detach().clone()
    net = freeze(quantize(exact, weights=weights))
    wanted = float((net[0].weight - weight).norm() / weight.norm())
    # 64 rows: the sample that is measured at quantization is the whole weight
    assert report(net).rows[0].error == pytest.approx(wanted, rel=1e-4)
    assert report(net, {"0.weight": weight}).rows[0].error == pytest.approx(wanted, rel=1e-6)


def test_a_reference_model_gives_the_error_of_a_model_that_has_none():
    exact = nn.Sequential(nn.Linear(32, 200))
    net = freeze(quantize(nn.Sequential(nn.Linear(32, 200)).requires_grad_(False), weights="int8"))
    net[0].weight_error = None
    assert report(net).rows[0].error is None
    # two different random weights: the distance of independent ones is about sqrt(2)
    assert 1 < report(net, exact).rows[0].error < 2


def test_a_shared_parameter_is_counted_once():
    net = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8, bias=False))
    net[1].weight = net[0].weight
    quantize(net)
    assert [row.name for row in report(net).rows] == ["0.weight"]


def test_the_text_has_one_line_per_parameter_a_head_and_a_total():
    lines = str(report(model())).splitlines()
    assert len(lines) == 9
    # 20 x 96 and 40 x 64 stay float
    assert lines[0] == "packed: 57.8% of the weights that could be (6,144 of 10,624)"
    assert lines[1].split() == ["parameter", "stored", "bits", "bytes", "error", "why", "it", "is", "float"]
    assert lines[3].startswith("1.weight") and "int4 g64 asym" in lines[3] and "4.67" in lines[3]
    assert lines[-1].startswith("total")


def test_an_empty_model_has_an_empty_report():
    result = report(nn.Sequential(nn.ReLU()))
    assert (result.rows, result.nbytes, result.bits, result.quantized_bits) == ([], 0, 0.0, 0.0)


def test_a_plan_can_be_reported_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 64))
    assert report(quantize(net, weights="int4")).nbytes == (64 * 64 + 64) * 4
