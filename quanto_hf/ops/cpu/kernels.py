"""Registers all native kernels."""

from quanto_hf.ops.cpu import aqlm_loops, products, quantize, rows  # noqa: F401
