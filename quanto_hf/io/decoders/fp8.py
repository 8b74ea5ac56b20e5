"""FP8 in blocks, as DeepSeek-V3 is published: float8 weights, of which a block (128 rows of 128 columns, one row of 32
columns, or the whole matrix) shares a factor.

The parts of ``q_proj.weight`` are itself, [rows, columns], and ``q_proj.weight_scale_inv`` [blocks of rows, blocks of
columns], with which it is multiplied; the last blocks may be smaller. Some checkpoints call the factors
``q_proj.scale`` or ``q_proj.qscale_weight``. A stacked parameter has stacked factors. A weight of bytes holds two
numbers of 4 bits in each (e2m1, DeepSeek-V4's experts), and factors of bytes are powers of two (e8m0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quanto_hf.io.checkpoint import CheckpointError
from quanto_hf.io.decoders.base import Decoder, Encoded, register_decoder
from quanto_hf.io.decoders.mxfp4 import unpack_e2m1
from quanto_hf.schemes import TensorSpec

SCALE, OTHER_SCALES = "_scale_inv", (".scale", ".qscale_weight")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# two numbers in each byte; headers count the numbers of F4, and the bytes of int8
PAIRS, NUMBERS = (torch.int8, torch.float4_e2m1fn_x2), "F4"
# numbers that are decoded at once
CHUNK = 1 << 18


@register_decoder("fp8", "mxfp8")
@dataclass(frozen=True)
class Fp8Decoder(Decoder):
    """See the module.

    Args:
        block: rows and columns of a block, or None where the checkpoint does not say: then all are of one size. Weights
            for which it does not fit have blocks of one size too.
    """

    block: tuple[int, int] | None = None

    unused = ("activation_scale", "input_scale", "qscale_act")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Fp8Decoder":
        """See :class:`Decoder`."""
        size = config.get("weight_block_size")
        return cls(None if size is None else (int(size[0]), int(size[1])))

    def find(self, headers: Mapping[str, TensorSpec]) -> dict[str, Encoded]:
        """See :class:`Decoder`."""
        scale_of: dict[str, str] = {}
        for key in headers:
            if key.endswith(SCALE):
                scale_of[key.removesuffix(SCALE)] = key
            elif key.endswith(OTHER_SCALES):
                weight = f"{key.rpartition('.')[0]}.weight"
                if _is_encoded(headers.get(weight)):
                    scale_of[weight] = key
        found: dict[str, Encoded] = {}
        for name, spec in headers.items():
            if not _is_encoded(spec):
                continue
            if name not in scale_of:
                if spec.dtype in FLOAT8:
                    raise CheckpointError(f"the checkpoint has {name} (FP8) without {name}{SCALE}")
                continue
            *leading, columns = spec.shape
            shape = (*leading, columns * (2 if spec.dtype == torch.int8 else 1))
            scales = headers[scale_of[name]]
            if len(shape) < 2 or self._block(shape, scales.shape) is None:
                raise CheckpointError(
                    f"{name} has shape {list(shape)}, and {scale_of[name]} {list(scales.shape)}, which are no factors "
                    f"of its blocks{'' if self.block is None else f' of {self.block[0]} x {self.block[1]}'}"
                )
            found[name] = Encoded({"codes": name, "scales": scale_of[name]}, shape, len(shape) - 2)
        return found

    def _block(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a block of a (stacked) matrix whose factors have this shape; None if they do not fit."""
        *leading, rows, columns = shape
        if len(grid) < 2 and not leading:
            # one factor, of no or of one dimension
            return (rows, columns) if torch.Size(grid).numel() == 1 else None
        if len(grid) != len(shape) or list(grid[:-2]) != leading:
            return None
        down, across = grid[-2:]
        if self.block is not None and (-(-rows // self.block[0]), -(-columns // self.block[1])) == (down, across):
            return self.block
        if not down or not across or rows % down or columns % across:
            return None
        return rows // down, columns // across

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Decoder`: products in float32, rounded once more."""
        codes, scales = parts["codes"], _factors(parts["scales"])
        columns = codes.shape[-1] * (2 if codes.dtype in PAIRS else 1)
        made = torch.empty(codes.shape[0], columns, dtype=dtype)
        block = self._block(tuple(made.shape), tuple(parts["scales"].shape))
        assert block is not None
        height, width = block
        # a few rows at a time: all of them would be there twice in float32
        step = max(1, CHUNK // max(columns, 1))
        for start in range(0, codes.shape[0], step):
            numbers = _numbers(codes[start : start + step])
            which = torch.arange(start, start + numbers.shape[0], dtype=torch.int64) // height
            factors = scales[which].repeat_interleave(width, dim=1)[:, :columns]
            made[start : start + step] = numbers.mul_(factors)
        return made


def _is_encoded(spec: TensorSpec | None) -> bool:
    kinds: tuple[Any, ...] = (*FLOAT8, torch.int8, NUMBERS)
    return spec is not None and spec.dtype in kinds


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """[blocks of rows, blocks of columns] in float32."""
    found = (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).to(torch.float32)
    return found if found.dim() == 2 else found.reshape(1, 1)


def _numbers(codes: torch.Tensor) -> torch.Tensor:
    """Encoded rows in float32."""
    if codes.dtype in PAIRS:
        return unpack_e2m1(codes.contiguous().view(torch.uint8), torch.float32)
    if codes.dtype == torch.float8_e4m3fn:
        return _from_e4m3(codes)
    return codes.to(torch.float32)


def _from_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """``codes.to(torch.float32)``, for which torch takes three times as long: the bits of each number moved to where
    float32 has its sign, exponent and fraction, and the difference of the biases (127 and 7) made up for."""
    whole = codes.view(torch.int8)
    # NaN, which has no bits of its own in this layout
    if bool((whole == 0x7F).any()) or bool((whole == -1).any()):
        return codes.to(torch.float32)
    # the sign, and 7 bits under where the exponent of float32 has 4 more
    moved = whole.to(torch.int32).bitwise_left_shift_(20).bitwise_and_(0x87F00000 - (1 << 32))
    return moved.view(torch.float32).mul_(2.0**120)
