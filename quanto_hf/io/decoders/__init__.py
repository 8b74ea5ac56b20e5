"""Checkpoints of other methods, read as if they were float ones. :mod:`quanto_hf.io.decoders.base` says how to add a
method."""

from quanto_hf.io.decoders import fp8, mxfp4  # noqa: F401  # they join the table
from quanto_hf.io.decoders.base import (
    DECODERS,
    Decoder,
    Encoded,
    as_floats,
    decodable,
    decoder_of,
    is_unused,
    register_decoder,
)
from quanto_hf.io.decoders.files import EncodedFiles

__all__ = [
    "DECODERS",
    "Decoder",
    "Encoded",
    "EncodedFiles",
    "as_floats",
    "decodable",
    "decoder_of",
    "is_unused",
    "register_decoder",
]
