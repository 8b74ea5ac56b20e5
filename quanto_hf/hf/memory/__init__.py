"""Bytes: the model without weights, what each tensor takes once it is loaded, and where it goes."""
