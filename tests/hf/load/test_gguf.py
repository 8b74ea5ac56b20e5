"""GGUF files: the float model that transformers makes of one is quantized, saved and reloaded like any other."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from gguf_file import F16, F32, Q8_0, write_gguf
from tiny_models import build, output, qlinears
from typer.testing import CliRunner

import quanto_hf
from quanto_hf import CheckpointError, QuantoConfig, freeze
from quanto_hf.cli.app import app
from quanto_hf.hf.convert.convert import convert_checkpoint

pytest.importorskip("gguf")
NAME = "model.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small language model of the package, in blocks of 8 bits."""
    made = tmp_path_factory.mktemp("gguf")
    model = tf.AutoModelForCausalLM.from_pretrained(quanto_hf.tiny_lm(), dtype=torch.float32)
    write_gguf(model, made / NAME, Q8_0, Path(quanto_hf.tiny_lm()))
    return made


def load(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME)


def ids():
    return tf.AutoTokenizer.from_pretrained(quanto_hf.tiny_lm())("Return the number of", return_tensors="pt").input_ids


@torch.no_grad()
def logits(model):
    return model(ids()).logits


def test_the_written_file_is_the_model(tmp_path):
    model = build("llama")
    for kind in (F32, F16):
        write_gguf(model, tmp_path / NAME, kind)
        made = load(tmp_path)
        exact = kind == F32
        torch.testing.assert_close(output(made, "llama"), output(model, "llama"), rtol=0, atol=0 if exact else 0.05)


@pytest.mark.parametrize("weights", ["int8", "int4", "nf4"])
def test_it_is_quantized_saved_and_reloaded_bit_equal(weights, folder, tmp_path):
    model = freeze(quanto_hf.quantize(load(folder), weights))
    assert len(qlinears(model)) == 14 and model.config.quantization_config.quant_method == "quanto_hf"
    model.save_pretrained(tmp_path)
    assert "gguf" not in (tmp_path / "config.json").read_text()
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(made), logits(model))
    # and the weights are those of the file
    plain = load(folder)
    layer = quanto_hf.QLinear.from_module(
        plain.model.layers[0].mlp.down_proj, qlinears(model)["model.layers.0.mlp.down_proj"].scheme
    )
    layer.freeze()
    assert torch.equal(layer.weight + 0, made.model.layers[0].mlp.down_proj.weight + 0)


def test_quantized_it_can_be_dequantized_and_saved_in_float(folder, tmp_path):
    model = freeze(quanto_hf.quantize(load(folder), "int8"))
    wanted = logits(model)
    model.dequantize()
    model.save_pretrained(tmp_path)
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not qlinears(made)
    torch.testing.assert_close(logits(made), wanted, rtol=1e-4, atol=1e-4)


def test_a_part_of_it_is_quantized_and_the_whole_is_saved(folder, tmp_path):
    model = load(folder)
    freeze(quanto_hf.quantize(model.model.layers, "int4"))
    model.save_pretrained(tmp_path)
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(made), logits(model)) and len(qlinears(made)) == 14


def test_a_value_that_is_not_allowed_leaves_it_as_it_was(folder):
    model = load(folder)
    with pytest.raises(ValueError, match="weights='int3'"):
        quanto_hf.quantize(model, "int3")
    assert model.hf_quantizer.quantization_config.quant_method == "gguf"


def test_layers_that_hold_blocks_are_refused_with_what_to_do(folder):
    model = load(folder)
    model.hf_quantizer.packed_modules = {"model.layers.0.mlp.down_proj.weight": model.model.layers[0].mlp.down_proj}
    with pytest.raises(
        ValueError, match=r"hold the blocks of a GGUF file; load it with .*GgufConfig\(dequantize=True\)"
    ):
        quanto_hf.quantize(model)
    assert not qlinears(model)


def test_the_command_converts_it_with_its_tokenizer(folder, tmp_path, transformers_speaks_again):
    words = ["quantize", str(folder / NAME), str(tmp_path / "out"), "--weights", "int4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    made = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    float_model = load(folder)
    float_model.hf_quantizer.remove_quantization_config(float_model)
    float_model.save_pretrained(tmp_path / "float")
    usual = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig("int4"))
    assert torch.equal(logits(made), logits(usual)) and len(qlinears(made)) == 14
    assert torch.equal(
        tf.AutoTokenizer.from_pretrained(tmp_path / "out")("Return the number of", return_tensors="pt").input_ids, ids()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out"]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0 and "was complete already" in again.stdout
    other = CliRunner().invoke(app, [*words[:-1], "int8"])
    assert other.exit_code == 1 and "the same settings, or another folder" in other.stderr


def test_a_file_without_a_tokenizer_is_converted_with_a_warning(tmp_path):
    model = build("llama")
    write_gguf(model, tmp_path / NAME, F32)
    with pytest.warns(UserWarning, match="has no tokenizer that transformers can convert"):
        done = convert_checkpoint(tmp_path / NAME, tmp_path / "out", QuantoConfig("int8"), dtype="float32")
    assert done.nbytes_before == (tmp_path / NAME).stat().st_size
    wanted = freeze(quanto_hf.quantize(model, "int8"))
    assert torch.equal(output(tf.LlamaForCausalLM.from_pretrained(tmp_path / "out"), "llama"), output(wanted, "llama"))


def test_a_folder_with_nothing_but_a_gguf_file_is_told_from_others(folder, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"it has no config\.json; give one of its GGUF files, such as .*model\.gguf"
    ):
        convert_checkpoint(folder, tmp_path / "out")
