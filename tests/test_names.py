"""The public names: the few that are listed, those that live in a module of their own, and those of before."""

import importlib
import subprocess
import sys

import pytest
from torch import nn

import quanto_hf

# what `quanto_hf` had at its top before there were quanto_hf.aqlm and quanto_hf.compat
BEFORE = (
    "AbsmaxOptimizer AqlmConfig Calibration CheckpointError HqqOptimizer MaxOptimizer QConv2d QEmbedding QLinear QType "
    "QuantoConfig QuantoHfQuantizer calibrate collect_moments compare convert_checkpoint dequantize freeze freeze_aqlm "
    "heldout_text install load_and_quantize_model plan qfloat8 qfloat8_e4m3fn qfloat8_e5m2 qfp4 qint2 qint4 qint8 qnf4 "
    "qtype quantization_map quantize replace_with_aqlm_linear replace_with_quanto_layers report requantize smooth "
    "tiny_lm tune_blocks tune_codebooks tune_end_to_end"
).split()


def test_a_user_sees_few_names_and_those_of_before_go_on_working():
    assert len(quanto_hf.__all__) <= 20
    assert set(quanto_hf.__all__) < set(BEFORE) <= {*dir(quanto_hf)}
    for name in BEFORE:
        assert getattr(quanto_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = quanto_hf.quantise


@pytest.mark.parametrize("module", ["aqlm", "compat"])
def test_each_module_lists_what_it_has(module):
    found = importlib.import_module(f"quanto_hf.{module}")
    assert found.__all__ == sorted(set(found.__all__))
    for name in found.__all__:
        assert getattr(found, name) is (getattr(quanto_hf, name) if name in BEFORE else getattr(found, name))


def test_the_import_loads_no_quantizer_of_transformers():
    program = (
        "import sys, quanto_hf, quanto_hf.aqlm, quanto_hf.compat; print('transformers.quantizers.auto' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def net():
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


@pytest.mark.parametrize("quantize", [quanto_hf.quantize, quanto_hf.flow.quantize], ids=["quanto_hf", "flow"])
def test_quantize_and_the_config_share_their_words_and_older_ones_are_taken(quantize):
    new = quantize(net(), "int4", fit="hqq", modules_to_not_convert="1")
    old = quantize(net(), "int4", optimizer="hqq", exclude="1")
    for model in (new, old):
        assert type(model[0]) is quanto_hf.QLinear and model[0].fit == "hqq" and type(model[1]) is nn.Linear
    with pytest.raises(ValueError, match="means the same as modules_to_not_convert='1'; give"):
        quantize(net(), "int4", exclude="1", modules_to_not_convert="1")
