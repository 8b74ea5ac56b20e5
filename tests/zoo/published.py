"""How much of a family is packed at its published size: planned on meta, so no weight is made."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import quanto_hf
from quanto_hf import QuantoConfig
from quanto_hf.nn.packed import is_matrix

from .care import CARE, Care
from .families import family
from .life import short

PLANS: dict[str, Callable[[], QuantoConfig]] = {
    "int4": lambda: QuantoConfig("int4"),
    "int4, embeddings int8": lambda: QuantoConfig("int4", embeddings="int8"),
}


def published(name: str) -> dict[str, Any]:
    """Of each configuration: the packed share, the bytes, and what stays float, by kind of module and reason; ``error``
    where the published config cannot be planned."""
    care = CARE.get(name, Care())
    found: dict[str, Any] = {"family": name, "kinds": {}}
    try:
        if care.left:
            raise LookupError(care.left)
        one = family(name, care.cls)
        found["class"] = one.model_class.__name__
        for kind, make in PLANS.items():
            found["kinds"][kind] = planned(one.config_class(**care.config), one.model_class, make())
    except Exception as error:
        found["error"] = short(error)
    return found


def planned(config: Any, cls: Any, wanted: QuantoConfig) -> dict[str, Any]:
    """Parameters, bytes, packed share, and the largest of what stays float as (kind of module, reason, share)."""
    plan = quanto_hf.plan(config, wanted, auto_class=cls, device_map="cpu", dtype=torch.bfloat16)
    rows, (packed, total) = plan.report.rows, plan.report.packed
    left: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row.reason and is_matrix(row.name, row.shape):
            left[row.kind, row.reason.removeprefix(f"{row.kind} ")] += row.numel
    return {
        "parameters": sum(row.numel for row in rows),
        "nbytes": plan.nbytes,
        "share": packed / total if total else 1.0,
        "left": [[*kind, count / total] for kind, count in left.most_common()],
    }
