"""Kernels of all ops in plain torch, for every device and for machines without native kernels."""
