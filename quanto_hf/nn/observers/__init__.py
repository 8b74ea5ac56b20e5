"""Observers: modules that let a tensor pass, remember its range, and answer with a scale and a zero point.

They take the arguments of the observers of torch's eager mode, and give the same scale and zero point for the same
data. Number types and quantization schemes may be given as torch objects or by name; the names are what is kept, so
that they outlive torch's quantized dtypes.

Imports: ``qtypes``. Never: a quantized dtype of torch, a model. Add an observer: a class that is decorated with
``register``, in a file that is imported here.
"""

from quanto_hf.nn.observers.base import OBSERVERS, Observer, RangeObserver, is_memoryless, observer_by_name, register
from quanto_hf.nn.observers.factory import Factory, WithArgs
from quanto_hf.nn.observers.fixed import FixedQParamsObserver
from quanto_hf.nn.observers.histogram import HistogramObserver
from quanto_hf.nn.observers.keeping import KeepsDtypes
from quanto_hf.nn.observers.minmax import MinMaxObserver, MovingAverageMinMaxObserver
from quanto_hf.nn.observers.mse import MseObserver
from quanto_hf.nn.observers.noop import NoopObserver, ReuseInputObserver
from quanto_hf.nn.observers.number_types import NUMBERS, Number, dtype_name, number, scheme_name
from quanto_hf.nn.observers.per_channel import MovingAveragePerChannelMinMaxObserver, PerChannelMinMaxObserver
from quanto_hf.nn.observers.percentile import PercentileObserver
from quanto_hf.nn.observers.placeholder import PlaceholderObserver
from quanto_hf.nn.observers.recording import RecordingObserver

__all__ = [
    "NUMBERS",
    "OBSERVERS",
    "Factory",
    "FixedQParamsObserver",
    "HistogramObserver",
    "KeepsDtypes",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "MseObserver",
    "NoopObserver",
    "Number",
    "Observer",
    "PerChannelMinMaxObserver",
    "PercentileObserver",
    "PlaceholderObserver",
    "RangeObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "WithArgs",
    "dtype_name",
    "is_memoryless",
    "number",
    "observer_by_name",
    "register",
    "scheme_name",
]
