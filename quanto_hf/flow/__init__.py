"""Whole models: which scheme each module gets, the verbs that change a model, and the report.

Imports: everything below ``nn`` included. Never: transformers.
"""

from quanto_hf.flow.calibration import Calibration, calibrate, run_batch
from quanto_hf.flow.compare import compare
from quanto_hf.flow.comparison import Comparison, LayerRow
from quanto_hf.flow.evaluation import Evaluation, evaluate, windows
from quanto_hf.flow.patterns import first_match, matches
from quanto_hf.flow.plan import Choice, Plan, apply_plan, make_plan, quantized, replace_modules
from quanto_hf.flow.report import Report, Row, not_quantizable, report
from quanto_hf.flow.smooth import Fold, Smoothing, smooth
from quanto_hf.flow.verbs import (
    ACTIVATIONS,
    activation_type,
    as_patterns,
    dequantize,
    freeze,
    quantization_map,
    quantize,
    requantize,
)

__all__ = [
    "ACTIVATIONS",
    "Calibration",
    "Choice",
    "Comparison",
    "Evaluation",
    "Fold",
    "LayerRow",
    "Plan",
    "Report",
    "Row",
    "Smoothing",
    "activation_type",
    "apply_plan",
    "as_patterns",
    "calibrate",
    "compare",
    "dequantize",
    "evaluate",
    "first_match",
    "freeze",
    "make_plan",
    "matches",
    "not_quantizable",
    "quantization_map",
    "quantize",
    "quantized",
    "replace_modules",
    "report",
    "requantize",
    "run_batch",
    "smooth",
    "windows",
]
