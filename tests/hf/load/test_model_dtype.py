"""The dtype of a quantized model is that of the float model, whatever is stored first; reloads have the same bits."""

import json

import pytest
import torch
import transformers as tf
from foreign import run
from tiny_models import lively

import quanto_hf
from quanto_hf import QuantoConfig


def patch_tst():
    config = tf.PatchTSTConfig(
        context_length=32, patch_length=8, patch_stride=8, d_model=32, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=64, num_input_channels=2,
    )  # fmt: skip
    return tf.PatchTSTModel, config, {"past_values": torch.randn(2, 32, 2)}


def beit():
    config = tf.BeitConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72, image_size=16, patch_size=4,
        vocab_size=30, use_relative_position_bias=True,
    )  # fmt: skip
    return tf.BeitModel, config, {"pixel_values": torch.randn(2, 3, 16, 16)}


def granite_moe():
    config = tf.GraniteMoeConfig(
        vocab_size=91, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return tf.GraniteMoeForCausalLM, config, {"input_ids": torch.randint(3, 90, (2, 7))}


def t5():
    config = tf.T5Config(vocab_size=90, d_model=40, d_kv=10, d_ff=70, num_layers=2, num_heads=4)
    ids = torch.randint(3, 90, (2, 7))
    return tf.T5ForConditionalGeneration, config, {"input_ids": ids, "decoder_input_ids": ids}


FAMILIES = {made.__name__: made for made in (patch_tst, beit, granite_moe, t5)}


def outputs(model, inputs):
    dtype = model.dtype
    with torch.no_grad():
        made = model(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()})
    return [value for value in made.to_tuple() if isinstance(value, torch.Tensor)]


def dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reload_has_the_dtypes_the_memory_and_the_bits_of_what_was_saved(family, weights, dtype, tmp_path):
    torch.manual_seed(0)
    cls, config, inputs = FAMILIES[family]()
    lively(cls(config)).save_pretrained(tmp_path / "float")
    model = cls.from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=QuantoConfig(weights))
    assert model.dtype == dtype
    for name, size in (("one", "1GB"), ("several", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        again = cls.from_pretrained(tmp_path / name)
        assert {n: t.dtype for n, t in again.state_dict().items()} == {
            n: t.dtype for n, t in model.state_dict().items()
        }
        assert again.get_memory_footprint() == model.get_memory_footprint()
        assert all(map(torch.equal, outputs(again.eval(), inputs), outputs(model.eval(), inputs)))


def test_parts_of_a_model_and_models_in_memory_have_the_dtype_too(tmp_path):
    cls, config, _ = patch_tst()
    model = quanto_hf.quantize(cls(config).to(torch.bfloat16), weights="int8")
    quanto_hf.freeze(model)
    assert model.dtype == model.encoder.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert model.to(torch.float16).dtype == torch.float16
    assert quanto_hf.dequantize(model).dtype == torch.float16


def test_a_model_that_comes_from_another_process_has_the_dtype_too(tmp_path):
    cls, config, _ = patch_tst()
    model = quanto_hf.quantize(cls(config).to(torch.bfloat16), weights="int8")
    quanto_hf.freeze(model)
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch\nprint(torch.load(sys.argv[1], weights_only=False).dtype)"
    assert run(code, tmp_path / "model.pt").strip() == "torch.bfloat16"


def test_the_dtype_of_a_float_model_is_what_it_was():
    cls, config, _ = patch_tst()
    assert cls(config).dtype == torch.float32 and cls(config).to(torch.float16).dtype == torch.float16


def test_floats_of_a_file_that_others_have_written_are_copied_where_they_are_not_at_a_cache_line(tmp_path):
    from safetensors.torch import load_file, save_file

    cls, config, inputs = beit()
    lively(cls(config)).save_pretrained(tmp_path / "float")
    model = cls.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig("int8")).eval()
    model.save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    assert (8 + length) % 64 == 0
    # the header is 8 bytes longer
    save_file(load_file(file), file, {"format": "pt", "quanto_hf_format": "2"})
    again = cls.from_pretrained(tmp_path / "int8").eval()
    floats = [tensor for tensor in again.state_dict().values() if tensor.dtype == torch.float32 and tensor.ndim > 1]
    held = [tensor for tensor in floats if tensor.shape[-1] != 1]
    assert held and all(tensor.data_ptr() % 64 == 0 for tensor in held)
    assert all(map(torch.equal, outputs(again, inputs), outputs(model, inputs)))
