"""The functions of torch.ao's eager mode, by name, over the modules of quanto_hf.

Imports: ``nn``, ``flow`` and everything below. Never: torch.ao.
"""
