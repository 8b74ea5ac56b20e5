"""Linear layers of other quantizers, for a table beside ours. None of them is needed, or imported before it is asked
for."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from torch import nn

Make = Callable[[nn.Linear], nn.Module]


def peer_layers(qtypes: set[str]) -> Iterator[tuple[str, Make]]:
    """Name and maker of each layer that stores one of these number types; a maker raises where it cannot."""
    for (library, qtype), make in PEERS.items():
        if qtype in qtypes:
            yield f"{library} {qtype}", make


def torchao(config: str, **settings: Any) -> Make:
    """By ``torchao.quantization.quantize_``."""

    def make(linear: nn.Linear) -> nn.Module:
        api = import_module("torchao.quantization")
        holder = nn.Sequential(linear)
        api.quantize_(holder, getattr(api, config)(**settings))
        made: nn.Module = holder[0]
        return made

    return make


def bitsandbytes(kind: str) -> Make:
    """A ``Linear4bit``, or a ``Linear8bitLt``, which quantizes the input as well."""

    def make(linear: nn.Linear) -> nn.Module:
        api, dtype = import_module("bitsandbytes.nn"), linear.weight.dtype
        sizes = (linear.in_features, linear.out_features)
        if kind == "int8":
            layer = api.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        else:
            layer = api.Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type=kind)
        layer.load_state_dict({"weight": linear.weight})
        # moving it to its device quantizes it
        made: nn.Module = layer.to("cpu")
        return made

    return make


def optimum_quanto(qtype: str) -> Make:
    """A frozen ``QLinear`` of optimum-quanto."""

    def make(linear: nn.Linear) -> nn.Module:
        api = import_module("optimum.quanto")
        layer: Any = api.QLinear.from_module(linear, weights=getattr(api, qtype))
        layer.freeze()
        made: nn.Module = layer
        return made

    return make


PEERS: dict[tuple[str, str], Make] = {
    ("torchao", "int8"): torchao("Int8WeightOnlyConfig"),
    ("torchao", "int4"): torchao("Int4WeightOnlyConfig", group_size=64),
    ("torchao", "float8_e4m3fn"): torchao("Float8WeightOnlyConfig"),
    ("bitsandbytes", "int8"): bitsandbytes("int8"),
    ("bitsandbytes", "nf4"): bitsandbytes("nf4"),
    ("bitsandbytes", "fp4"): bitsandbytes("fp4"),
    ("optimum-quanto", "int8"): optimum_quanto("qint8"),
    ("optimum-quanto", "float8_e4m3fn"): optimum_quanto("qfloat8_e4m3fn"),
    ("optimum-quanto", "int4"): optimum_quanto("qint4"),
    ("optimum-quanto", "int2"): optimum_quanto("qint2"),
}
