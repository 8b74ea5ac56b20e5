"""MXFP4, as gpt-oss is published: numbers of 4 bits (e2m1), of which 32 share a power of two (e8m0), by the
specification of the Open Compute Project, "OCP Microscaling Formats (MX) v1.0".

The parts of ``experts.gate_up_proj`` are ``..._blocks`` [experts, outputs, groups, 16], two numbers in a byte, the
lower half first; and ``..._scales`` [experts, outputs, groups]. The float tensor is [experts, inputs, outputs], as the
model multiplies with it.
"""

from collections.abc import Mapping

import torch

from quanto_hf.io.checkpoint import CheckpointError
from quanto_hf.io.decoders.base import Decoder, Encoded, register_decoder
from quanto_hf.schemes import TensorSpec

BLOCKS, SCALES = "_blocks", "_scales"

# e2m1 by its code
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@register_decoder("mxfp4")
class Mxfp4Decoder(Decoder):
    """See the module."""

    def find(self, headers: Mapping[str, TensorSpec]) -> dict[str, Encoded]:
        """See :class:`Decoder`."""
        found: dict[str, Encoded] = {}
        for key, blocks in headers.items():
            if not key.endswith(BLOCKS) or blocks.dtype != torch.uint8:
                continue
            name = key.removesuffix(BLOCKS)
            scales = headers.get(name + SCALES)
            if scales is None:
                raise CheckpointError(f"the checkpoint has {key} (MXFP4) without {name}{SCALES}")
            *leading, rows, groups, nbytes = blocks.shape
            if scales.shape != blocks.shape[:-1] or scales.dtype != torch.uint8 or len(leading) > 1:
                raise CheckpointError(
                    f"{key} is {list(blocks.shape)}, and {name}{SCALES} is {scales.dtype} {list(scales.shape)}; MXFP4 "
                    "has [experts, outputs, groups, bytes] and uint8 [experts, outputs, groups]"
                )
            shape = (*leading, 2 * groups * nbytes, rows)
            found[name] = Encoded({"blocks": key, "scales": name + SCALES}, shape, len(leading))
        return found

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Decoder`: the transpose of a contiguous matrix."""
        blocks, scales = parts["blocks"], parts["scales"]
        made = unpack_e2m1(blocks, dtype)
        # in float16 a power of two can be infinite where the product is not
        wide = torch.float32 if dtype == torch.float16 else dtype
        powers = scales.view(torch.float8_e8m0fnu).to(wide).unsqueeze(-1)
        torch.mul(made, powers, out=made)
        return made.flatten(-2).t()


def unpack_e2m1(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of 4 bits in bytes, the lower half of each first: [..., bytes] uint8 -> [..., 2 * bytes] of
    ``dtype``.

    Example:
        >>> unpack_e2m1(torch.tensor([[0x21, 0xF0]], dtype=torch.uint8), torch.float32).tolist()
        [[0.5, 1.0, 0.0, -6.0]]
    """
    numbers = torch.tensor(E2M1, dtype=dtype)
    # both numbers of a byte at once, as one integer of their size
    pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=-1)
    as_integer = torch.int64 if dtype.itemsize == 4 else torch.int32
    table = pairs.view(as_integer).view(-1)
    found = torch.index_select(table, 0, codes.reshape(-1).to(torch.int32))
    return found.view(dtype).view(*codes.shape[:-1], 2 * codes.shape[-1])
