"""The observers, fake quantizations and qconfigs that have names, with the values of torch's eager mode."""

from typing import Any

from torch import nn

from quanto_hf.eager.fake_quantize import FakeQuantize, FixedQParamsFakeQuantize, FusedMovingAvgObsFakeQuantize
from quanto_hf.eager.qconfig import QConfig
from quanto_hf.nn.observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

__all__ = [
    "default_activation_only_qconfig",
    "default_affine_fixed_qparams_fake_quant",
    "default_affine_fixed_qparams_observer",
    "default_debug_observer",
    "default_debug_qconfig",
    "default_dynamic_fake_quant",
    "default_dynamic_qat_qconfig",
    "default_dynamic_qconfig",
    "default_dynamic_quant_observer",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_embedding_qat_qconfig",
    "default_embedding_qat_qconfig_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_0to1_observer",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_observer",
    "default_float_qparams_observer",
    "default_float_qparams_observer_4bit",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_qconfig",
    "default_per_channel_symmetric_qnnpack_qat_qconfig",
    "default_per_channel_symmetric_qnnpack_qconfig",
    "default_per_channel_weight_fake_quant",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_qat_qconfig",
    "default_qat_qconfig_v2",
    "default_qconfig",
    "default_quint8_weight_qconfig",
    "default_reuse_input_observer",
    "default_reuse_input_qconfig",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_symmetric_fixed_qparams_observer",
    "default_symmetric_qnnpack_qat_qconfig",
    "default_symmetric_qnnpack_qconfig",
    "default_weight_fake_quant",
    "default_weight_observer",
    "default_weight_only_qconfig",
    "float16_dynamic_qconfig",
    "float16_static_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "get_default_qat_qconfig",
    "get_default_qconfig",
    "per_channel_dynamic_qconfig",
    "per_channel_weight_observer_range_neg_127_to_127",
    "weight_observer_range_neg_127_to_127",
]

BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")
_TENSOR: dict[str, Any] = {"dtype": "qint8", "qscheme": "per_tensor_symmetric"}
_CHANNEL: dict[str, Any] = {"dtype": "qint8", "qscheme": "per_channel_symmetric"}
_ROWS: dict[str, Any] = {"qscheme": "per_channel_affine_float_qparams", "ch_axis": 0}
_WHOLE_INT8: dict[str, Any] = {"quant_min": -128, "quant_max": 127}
_NO_LOWEST: dict[str, Any] = {"quant_min": -127, "quant_max": 127, "eps": 2**-12}
_WHOLE_UINT8: dict[str, Any] = {"quant_min": 0, "quant_max": 255}

# ---------------------------------------------------------------------------------------------------------- observers

default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
default_placeholder_observer = PlaceholderObserver
default_debug_observer = RecordingObserver
default_weight_observer = MinMaxObserver.with_args(**_TENSOR)
weight_observer_range_neg_127_to_127 = MinMaxObserver.with_args(**_TENSOR, **_NO_LOWEST)
default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(**_CHANNEL)
per_channel_weight_observer_range_neg_127_to_127 = PerChannelMinMaxObserver.with_args(**_CHANNEL, **_NO_LOWEST)
default_dynamic_quant_observer = PlaceholderObserver.with_args(dtype="quint8", is_dynamic=True, **_WHOLE_UINT8)
default_float_qparams_observer = PerChannelMinMaxObserver.with_args(dtype="quint8", **_ROWS)
default_float_qparams_observer_4bit = PerChannelMinMaxObserver.with_args(dtype="quint4x2", **_ROWS)
default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2 / 256, zero_point=128, dtype="quint8", **_WHOLE_UINT8
)
default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1 / 256, zero_point=0, dtype="quint8", **_WHOLE_UINT8
)
default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer
default_reuse_input_observer = ReuseInputObserver

# -------------------------------------------------------------------------------------------------- fake quantizations

default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, dtype="quint8", reduce_range=True, **_WHOLE_UINT8
)
default_weight_fake_quant = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **_TENSOR, **_WHOLE_INT8)
default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, is_dynamic=True, dtype="quint8", averaging_constant=1, **_WHOLE_UINT8
)
default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, ch_axis=0, **_CHANNEL, **_WHOLE_INT8
)
default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, dtype="quint8", averaging_constant=1, **_ROWS, **_WHOLE_UINT8
)
default_embedding_fake_quant_4bit = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, dtype="quint4x2", averaging_constant=1, **_ROWS
)
default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver, dtype="quint8", reduce_range=True, **_WHOLE_UINT8
)
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, dtype="quint8", **_WHOLE_UINT8
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **_TENSOR, **_WHOLE_INT8
)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **_CHANNEL, **_WHOLE_INT8
)
fused_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **_TENSOR, **_NO_LOWEST
)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **_CHANNEL, **_NO_LOWEST
)

# ---------------------------------------------------------------------------------------------------------- qconfigs

default_qconfig = QConfig(default_observer, default_weight_observer)
default_debug_qconfig = QConfig(default_debug_observer, default_weight_observer)
default_per_channel_qconfig = QConfig(default_observer, default_per_channel_weight_observer)
default_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_weight_observer)
float16_dynamic_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype="float16", is_dynamic=True), PlaceholderObserver.with_args(dtype="float16")
)
float16_static_qconfig = QConfig(
    PlaceholderObserver.with_args(dtype="float16"), PlaceholderObserver.with_args(dtype="float16")
)
per_channel_dynamic_qconfig = QConfig(default_dynamic_quant_observer, default_per_channel_weight_observer)
float_qparams_weight_only_qconfig = QConfig(default_placeholder_observer, default_float_qparams_observer)
float_qparams_weight_only_qconfig_4bit = QConfig(default_placeholder_observer, default_float_qparams_observer_4bit)
default_qat_qconfig = QConfig(default_fake_quant, default_weight_fake_quant)
default_dynamic_qat_qconfig = QConfig(default_dynamic_fake_quant, default_weight_fake_quant)
default_weight_only_qconfig = QConfig(nn.Identity, default_weight_fake_quant)
default_activation_only_qconfig = QConfig(default_fake_quant, nn.Identity)
default_qat_qconfig_v2 = QConfig(default_fused_act_fake_quant, default_fused_wt_fake_quant)
default_reuse_input_qconfig = QConfig(default_reuse_input_observer, NoopObserver)
default_embedding_qat_qconfig = QConfig(NoopObserver.with_args(dtype="float32"), default_embedding_fake_quant)
default_embedding_qat_qconfig_4bit = QConfig(NoopObserver.with_args(dtype="float32"), default_embedding_fake_quant_4bit)
default_quint8_weight_qconfig = QConfig(HistogramObserver, MinMaxObserver)
_QNNPACK_ACTIVATION = HistogramObserver.with_args(dtype="qint8", reduce_range=False, eps=2**-12)
default_symmetric_qnnpack_qconfig = QConfig(_QNNPACK_ACTIVATION, weight_observer_range_neg_127_to_127)
default_per_channel_symmetric_qnnpack_qconfig = QConfig(
    _QNNPACK_ACTIVATION, per_channel_weight_observer_range_neg_127_to_127
)
_QNNPACK_FAKE = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, dtype="qint8", reduce_range=False, eps=2**-12, **_WHOLE_INT8
)
default_symmetric_qnnpack_qat_qconfig = QConfig(_QNNPACK_FAKE, fused_wt_fake_quant_range_neg_127_to_127)
default_per_channel_symmetric_qnnpack_qat_qconfig = QConfig(
    _QNNPACK_FAKE, fused_per_channel_wt_fake_quant_range_neg_127_to_127
)


def _check(backend: str, version: int | None, versions: tuple[int | None, ...]) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if version not in versions:
        raise ValueError(f"version={version!r} is not known; choose one of {', '.join(map(str, versions))}")


def get_default_qconfig(backend: str = "x86", version: int = 0) -> QConfig:
    """The qconfig for static quantization.

    quanto_hf has one implementation for all processors. The backend says how careful to be: "x86" and "fbgemm" use half
    of the codes for activations, "qnnpack" one scale for a whole weight.

    Args:
        backend: "x86", "fbgemm", "qnnpack" or "onednn".
        version: 0.

    Raises:
        ValueError: one of them is not known.

    Example:
        >>> get_default_qconfig("qnnpack").weight == default_weight_observer
        True
    """
    _check(backend, version, (0,))
    reduce = backend in ("x86", "fbgemm")
    weight = default_weight_observer if backend == "qnnpack" else default_per_channel_weight_observer
    return QConfig(HistogramObserver.with_args(reduce_range=reduce), weight)


def get_default_qat_qconfig(backend: str = "x86", version: int | None = 1) -> QConfig:
    """The qconfig for training with quantization.

    Args:
        backend: see :func:`get_default_qconfig`.
        version: 0, or 1, which is the same by another class.

    Raises:
        ValueError: one of them is not known.
    """
    _check(backend, version, (0, 1, None))
    fused = version != 0
    make = FusedMovingAvgObsFakeQuantize if fused else FakeQuantize
    reduce = backend in ("x86", "fbgemm")
    activation = make.with_args(observer=MovingAverageMinMaxObserver, reduce_range=reduce, **_WHOLE_UINT8)
    if backend == "qnnpack":
        return QConfig(activation, default_fused_wt_fake_quant if fused else default_weight_fake_quant)
    channels = default_fused_per_channel_wt_fake_quant if fused else default_per_channel_weight_fake_quant
    return QConfig(activation, channels)
