"""The face of torch's eager mode quantization, by the names and arguments of ``torch.ao.quantization``.

Prepare a model with observers, run it on data, convert it; or train it with rounded numbers in between. Nothing is held
in a quantized dtype: weights are int8 codes in plain Parameters, activations travel as float tensors whose values lie
on a grid.

The numeric suite is in ``quanto_hf.eager.numeric_suite``.

Imports: ``nn``, ``flow`` and everything below. Never: ``torch.ao``, ``torch.ops.quantized``, a quantized dtype.
"""

# Each module has the list of its public names (`__all__`), and here they come together.
# ruff: noqa: F403

from types import ModuleType as _ModuleType

from quanto_hf.eager.attention import *
from quanto_hf.eager.convert import *
from quanto_hf.eager.custom import *
from quanto_hf.eager.defaults import *
from quanto_hf.eager.fake_quantize import *
from quanto_hf.eager.fake_quantize import FakeQuantize
from quanto_hf.eager.fuse import *
from quanto_hf.eager.lstm import *
from quanto_hf.eager.mappings import *
from quanto_hf.eager.modules import DeQuantize as DeQuantize
from quanto_hf.eager.modules import FloatFunctional as FloatFunctional
from quanto_hf.eager.modules import QConfigError as QConfigError
from quanto_hf.eager.modules import QFunctional as QFunctional
from quanto_hf.eager.modules import Quantize as Quantize
from quanto_hf.eager.observer_state import *
from quanto_hf.eager.prepare import *
from quanto_hf.eager.propagate import *
from quanto_hf.eager.qat import freeze_bn_stats as freeze_bn_stats
from quanto_hf.eager.qat import update_bn_stats as update_bn_stats
from quanto_hf.eager.qconfig import *
from quanto_hf.eager.stubs import *
from quanto_hf.eager.verbs import *
from quanto_hf.nn import observers as _observers
from quanto_hf.nn.observers import FixedQParamsObserver as FixedQParamsObserver
from quanto_hf.nn.observers import HistogramObserver as HistogramObserver
from quanto_hf.nn.observers import MinMaxObserver as MinMaxObserver
from quanto_hf.nn.observers import MovingAverageMinMaxObserver as MovingAverageMinMaxObserver
from quanto_hf.nn.observers import MovingAveragePerChannelMinMaxObserver as MovingAveragePerChannelMinMaxObserver
from quanto_hf.nn.observers import MseObserver as MseObserver
from quanto_hf.nn.observers import NoopObserver as NoopObserver
from quanto_hf.nn.observers import PercentileObserver as PercentileObserver
from quanto_hf.nn.observers import PerChannelMinMaxObserver as PerChannelMinMaxObserver
from quanto_hf.nn.observers import PlaceholderObserver as PlaceholderObserver
from quanto_hf.nn.observers import RecordingObserver as RecordingObserver
from quanto_hf.nn.observers import ReuseInputObserver as ReuseInputObserver

# names that torch has besides
FakeQuantizeBase = FakeQuantize
ObserverBase = _observers.Observer
UniformQuantizationObserverBase = _observers.RangeObserver

__all__ = sorted(
    name for name, value in globals().items() if not name.startswith("_") and not isinstance(value, _ModuleType)
)
