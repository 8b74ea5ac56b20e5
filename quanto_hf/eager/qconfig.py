"""What a QConfig is: how activations and weights of a module are observed, and so quantized."""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from quanto_hf.eager.modules import QConfigError
from quanto_hf.nn.observers import is_memoryless

__all__ = ["QConfig", "qconfig_equals"]


class _Pair(NamedTuple):
    activation: Any
    weight: Any


class QConfig(_Pair):
    """Constructors of the observers, or fake quantizations, of a module.

    Args:
        activation: a class or ``with_args`` of one, such as ``HistogramObserver.with_args(reduce_range=True)``; called
            once for each module. None leaves activations float.
        weight: the same for its weight.

    Raises:
        ValueError: one of them is an observer already, which modules would share.
        TypeError: one of them cannot be called.

    Example:
        >>> from quanto_hf.eager import MinMaxObserver
        >>> QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype="qint8", qscheme="per_tensor_symmetric")).weight()
        MinMaxObserver(dtype=qint8, qscheme=per_tensor_symmetric, codes=-128..127)
    """

    __slots__ = ()

    def __new__(cls, activation: Any, weight: Any) -> "QConfig":
        for name, value in (("activation", activation), ("weight", weight)):
            if isinstance(value, nn.Module):
                raise ValueError(
                    f"QConfig was given an observer for {name}, which all modules would share; give its class, or "
                    f"{type(value).__name__}.with_args(...)"
                )
            if value is not None and not callable(value):
                raise TypeError(f"{name}={value!r} of a QConfig is no class and no constructor of an observer")
        return super().__new__(cls, activation, weight)


def check_qconfig(qconfig: Any, module: nn.Module | None = None, name: str = "") -> None:
    """Whether a qconfig is one, and fits a module.

    Raises:
        TypeError: it is neither a QConfig nor None.
        QConfigError: the module type does not support it.
    """
    where = f" of {name}" if name else ""
    if qconfig is None:
        return
    if not isinstance(qconfig, QConfig):
        raise TypeError(
            f"the qconfig{where} is {qconfig!r} of type {type(qconfig).__module__}.{type(qconfig).__name__}; it must "
            f"be a quanto_hf.eager.QConfig, such as get_default_qconfig(), or None to leave the module in float"
        )
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) and qconfig.weight is not None:
        scheme = getattr(qconfig.weight(), "qscheme", "")
        if scheme.startswith("per_channel"):
            dims = type_before_parametrizations(module).__name__[-2]
            raise QConfigError(
                f"Per channel weight observer is not supported yet for ConvTranspose{dims}d. Give{where or ' it'} a "
                f"qconfig with a scale for the whole weight, such as get_default_qconfig('qnnpack'), or None"
            )


def activation_is_memoryless(qconfig: QConfig) -> bool:
    """Whether only the last tensor counts for the scale of activations: dynamic quantization, in training too."""
    return qconfig.activation is not None and is_memoryless(qconfig.activation())


def qconfig_equals(q1: QConfig | None, q2: QConfig | None) -> bool:
    """Whether two qconfigs make the same observers."""
    return q1 == q2
