"""Every family of models of the installed transformers, tiny and at its published size: ``python -m tests.zoo``."""
