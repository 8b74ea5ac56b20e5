"""What is asked for, and what was saved: QuantoConfig, AqlmConfig, other tools' words, what stays float by default.

Imports: ``io`` and every room below. Never: a loader, or a model that holds weights.
"""
