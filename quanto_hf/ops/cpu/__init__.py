"""Native CPU kernels: C++ behind plain addresses and sizes (``csrc/``), and their registration with the ops.

``library`` finds the compiled module, or the sentence why there is none; nothing else knows whether it is there.
"""
