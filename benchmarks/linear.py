"""Quantized linear layers beside torch's own: the same as ``quanto-hf bench linear``, from a checkout.

python benchmarks/linear.py [--features 4096x4096] [--threads 2] [--dtype bfloat16] [--peers]
"""

import sys

from quanto_hf.cli.app import app

if __name__ == "__main__":
    app(args=["bench", "linear", *sys.argv[1:]], prog_name="quanto-hf")
