"""Weights that stay on disk or on the CPU: entries of the offload folder, hooks, and copies that run ahead."""
