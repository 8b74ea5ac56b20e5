"""Whole models: which scheme each module gets, the verbs that change a model, and the report.

Imports: ``io`` and everything below it. Never: transformers.
"""

from quanto_hf.flow.applying import apply_assignment, by_module, note_reasons, quantized, quantized_by, replace_modules
from quanto_hf.flow.aqlm import freeze_aqlm
from quanto_hf.flow.assign import Assignment, asked_by, assign
from quanto_hf.flow.calibration import Calibration, calibrate
from quanto_hf.flow.choice import OVERRIDABLE, Choice, embeddings_choice
from quanto_hf.flow.compare import compare
from quanto_hf.flow.comparison import Comparison, LayerRow
from quanto_hf.flow.evaluation import Evaluation, evaluate, windows
from quanto_hf.flow.floats import FloatWeight, float_weights
from quanto_hf.flow.moments import collect_moments
from quanto_hf.flow.notes import notes_of, warn_of_notes
from quanto_hf.flow.patterns import first_match, matches
from quanto_hf.flow.refuse import refuse_other_dtypes
from quanto_hf.flow.report import Report, Row, report
from quanto_hf.flow.requantizing import quantization_map, requantize
from quanto_hf.flow.smooth import Fold, Smoothing, smooth
from quanto_hf.flow.tuning import tune_blocks, tune_codebooks, tune_end_to_end
from quanto_hf.flow.verbs import (
    activation_names,
    activation_type,
    as_patterns,
    dequantize,
    either,
    freeze,
    quantize,
)

__all__ = [
    "OVERRIDABLE",
    "Assignment",
    "Calibration",
    "Choice",
    "Comparison",
    "Evaluation",
    "FloatWeight",
    "Fold",
    "LayerRow",
    "Report",
    "Row",
    "Smoothing",
    "activation_names",
    "activation_type",
    "apply_assignment",
    "as_patterns",
    "asked_by",
    "assign",
    "by_module",
    "calibrate",
    "collect_moments",
    "compare",
    "dequantize",
    "either",
    "embeddings_choice",
    "evaluate",
    "first_match",
    "float_weights",
    "freeze",
    "freeze_aqlm",
    "matches",
    "note_reasons",
    "notes_of",
    "quantization_map",
    "quantize",
    "quantized",
    "quantized_by",
    "refuse_other_dtypes",
    "replace_modules",
    "report",
    "requantize",
    "smooth",
    "tune_blocks",
    "tune_codebooks",
    "tune_end_to_end",
    "warn_of_notes",
    "windows",
]
