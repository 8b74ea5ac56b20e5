"""Tensors of other methods as floats: the bits that transformers makes of them; errors for parts that do not fit."""

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from quanto_hf.io import CheckpointError
from quanto_hf.io.decoders import DECODERS, EncodedFiles, as_floats, decodable, decoder_of
from quanto_hf.io.decoders.fp8 import Fp8Decoder
from quanto_hf.io.decoders.mxfp4 import Mxfp4Decoder
from quanto_hf.schemes import TensorSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same_bits(made, wanted):
    """Equal, NaN and the sign of zero too."""
    assert made.dtype == wanted.dtype and made.shape == wanted.shape
    as_integer = torch.int32 if made.dtype.itemsize == 4 else torch.int16
    nan = made.isnan()
    assert torch.equal(nan, wanted.isnan())
    made, wanted = made.masked_fill(nan, 0), wanted.masked_fill(nan, 0)
    return torch.equal(made.contiguous().view(as_integer), wanted.contiguous().view(as_integer))


def test_methods_are_found_by_name_whatever_the_type_of_the_name():
    from transformers.utils.quantization_config import QuantizationMethod

    assert isinstance(decoder_of({"quant_method": "mxfp4"}), Mxfp4Decoder)
    assert decoder_of({"quant_method": QuantizationMethod.FP8}) == Fp8Decoder(None)
    assert decoder_of({"quant_method": "fp8", "weight_block_size": [128, 64]}) == Fp8Decoder((128, 64))
    assert decoder_of({"quant_method": "awq"}) is decoder_of({}) is decoder_of({"quant_method": 4}) is None
    assert decodable() == "fp8, mxfp4 and mxfp8" and sorted(DECODERS) == ["fp8", "mxfp4", "mxfp8"]


# ------------------------------------------------------------------------------------------------------------- MXFP4


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mxfp4_has_the_bits_of_transformers_for_every_pair_of_codes_and_every_scale(dtype):
    # each scale with each byte of codes
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    made = Mxfp4Decoder().decode({"blocks": blocks[0], "scales": scales[0]}, dtype)
    wanted = _convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0]
    # the last scale is no number, by the specification
    assert made.shape == (512, 256) and made[:, 255].isnan().all()
    assert same_bits(made[:, :255], wanted[:, :255])


def test_mxfp4_tensors_are_found_by_both_parts():
    headers = {
        "e.gate_up_proj_blocks": TensorSpec((4, 192, 2, 16), torch.uint8),
        "e.gate_up_proj_scales": TensorSpec((4, 192, 2), torch.uint8),
        "e.gate_up_proj_bias": TensorSpec((4, 192), torch.bfloat16),
    }
    (found,) = Mxfp4Decoder().find(headers).items()
    assert found[0] == "e.gate_up_proj" and found[1].shape == (4, 64, 192) and found[1].main == "e.gate_up_proj_blocks"
    assert as_floats(Mxfp4Decoder(), headers) == {
        "e.gate_up_proj": TensorSpec((4, 64, 192), torch.bfloat16),
        "e.gate_up_proj_bias": TensorSpec((4, 192), torch.bfloat16),
    }
    short = {**headers, "e.gate_up_proj_scales": TensorSpec((4, 192, 3), torch.uint8)}
    with pytest.raises(
        CheckpointError, match=r"blocks is \[4, 192, 2, 16\], and .*_scales is torch.uint8 \[4, 192, 3\]"
    ):
        Mxfp4Decoder().find(short)
    del headers["e.gate_up_proj_scales"]
    with pytest.raises(CheckpointError, match=r"has e\.gate_up_proj_blocks \(MXFP4\) without e\.gate_up_proj_scales"):
        Mxfp4Decoder().find(headers)


# --------------------------------------------------------------------------------------------------------------- FP8


def theirs(codes, scales, dtype):
    return Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_has_the_bits_of_torch_for_every_code(kind):
    codes, one = torch.arange(256, dtype=torch.uint8).view(1, 256).view(kind), torch.ones(1, 1)
    assert same_bits(Fp8Decoder().decode({"codes": codes, "scales": one}, torch.float32), codes.float())
    # and where there is no NaN among them
    codes = codes[:, (codes.float().isfinite())[0]]
    assert same_bits(Fp8Decoder().decode({"codes": codes, "scales": one}, torch.float32), codes.float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "grid"),
    [((256, 384), (2, 3)), ((64, 96), (1, 3)), ((5, 64), (5, 2)), ((700, 512), (1, 1)), ((33, 2048), (33, 64))],
)
def test_fp8_has_the_bits_of_transformers_where_blocks_are_of_one_size(shape, grid, dtype):
    codes = draw(*shape).clamp(max=0x7E).view(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.01
    for factors in (scales, scales.bfloat16(), scales.to(torch.float8_e8m0fnu), draw(*grid) // 8 + 110):
        made = Fp8Decoder().decode({"codes": codes, "scales": factors}, dtype)
        assert same_bits(made, theirs(codes, factors, dtype))


@pytest.mark.parametrize("factor", [torch.tensor(0.25), torch.tensor([0.25])])
def test_fp8_takes_one_factor_for_the_whole_matrix(factor):
    codes = draw(8, 16).clamp(max=0x7E).view(torch.float8_e4m3fn)
    decoder = Fp8Decoder((128, 128))
    found = decoder.find({"a.weight": TensorSpec((8, 16), codes.dtype), "a.weight_scale_inv": _spec(factor)})
    assert found["a.weight"].shape == (8, 16)
    made = decoder.decode({"codes": codes, "scales": factor}, torch.bfloat16)
    assert same_bits(made, theirs(codes, factor, torch.bfloat16))


@pytest.mark.parametrize("shape", [(192, 160), (576, 200), (1, 1), (128, 129), (4100, 130)])
def test_the_last_blocks_may_be_smaller(shape):
    rows, columns = shape
    codes = draw(*shape).clamp(max=0x7E).view(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(1)) + 0.5
    wanted = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert torch.equal(Fp8Decoder((128, 128)).decode({"codes": codes, "scales": scales}, torch.float32), wanted)


@pytest.mark.parametrize("kind", [torch.int8, torch.float4_e2m1fn_x2], ids=str)
def test_two_numbers_in_a_byte(kind, tmp_path):
    codes, scales = draw(64, 32).view(kind), (draw(64, 2) // 8 + 110).view(torch.float8_e8m0fnu)
    save_file({"a.weight": codes, "a.scale": scales}, tmp_path / "model.safetensors")
    files = EncodedFiles(Fp8Decoder((128, 128)), [tmp_path / "model.safetensors"])
    assert files.headers == {"a.weight": TensorSpec((64, 64), torch.bfloat16)}
    assert same_bits(files.read("a.weight", torch.bfloat16), theirs(codes, scales, torch.bfloat16))


def _spec(tensor):
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def test_fp8_tensors_are_found_by_their_dtype_and_the_names_of_their_factors():
    eight, factors = TensorSpec((256, 130), torch.float8_e4m3fn), TensorSpec((2, 2), torch.float32)
    plain, norm = TensorSpec((256, 130), torch.bfloat16), TensorSpec((3,), torch.float32)
    headers = {
        **{"a.weight": eight, "a.weight_scale_inv": factors, "a.activation_scale": norm},
        **{"b.weight": eight, "b.scale": factors, "c.weight": eight, "c.qscale_weight": factors},
        **{"d.weight": plain, "d.scale": norm},
        **{"e.up": TensorSpec((5, 256, 130), eight.dtype), "e.up_scale_inv": TensorSpec((5, 2, 2), torch.float32)},
    }
    decoder = Fp8Decoder((128, 128))
    found = decoder.find(headers)
    assert sorted(found) == ["a.weight", "b.weight", "c.weight", "e.up"] and found["e.up"].leading == 1
    assert sorted(as_floats(decoder, headers)) == ["a.weight", "b.weight", "c.weight", "d.scale", "d.weight", "e.up"]
    with pytest.raises(CheckpointError, match=r"has b\.weight \(FP8\) without b\.weight_scale_inv"):
        decoder.find({"b.weight": eight})
    with pytest.raises(
        CheckpointError, match=r"b\.weight has shape \[256, 130\], and b\.scale \[3, 2\].* of 128 x 128"
    ):
        decoder.find({"b.weight": eight, "b.scale": TensorSpec((3, 2), torch.float32)})


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_read_by_the_names_of_floats(tmp_path):
    blocks, scales = draw(3, 8, 2, 16), draw(3, 8, 2) // 8 + 110
    tensors = {"e.down_proj_blocks": blocks, "norm": torch.rand(5), "e.down_proj_bias": torch.rand(3, 8)}
    save_file(tensors, tmp_path / "1.safetensors")
    save_file({"e.down_proj_scales": scales}, tmp_path / "2.safetensors")
    files = EncodedFiles(Mxfp4Decoder(), sorted(tmp_path.iterdir()))
    assert set(files.headers) == {"e.down_proj", "norm", "e.down_proj_bias"}
    wanted = _convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    made = files.read("e.down_proj", torch.bfloat16)
    assert made.is_contiguous() and torch.equal(made, wanted)
    assert torch.equal(torch.stack(list(files.matrices("e.down_proj", torch.bfloat16))), wanted)
    assert torch.equal(files.read("norm"), tensors["norm"])


def test_other_files_and_names_that_come_twice_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.bin is no safetensors file: mxfp4 is decoded from those only"):
        EncodedFiles(Mxfp4Decoder(), [tmp_path / "model.bin"])
    for name in "ab":
        save_file({"norm": torch.rand(5)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"norm is in more than one file of the checkpoint, also in .*b\.safe"):
        EncodedFiles(Mxfp4Decoder(), sorted(tmp_path.iterdir()))
