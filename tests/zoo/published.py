"""How much of a family is packed at its published size: planned on meta, so no weight is made."""

import re
from collections import Counter
from typing import Any

import torch

import quanto_hf
from quanto_hf import QuantoConfig

from .care import CARE, Care
from .families import family
from .life import CONFIGS, short

# a module's type in front of a reason
TYPE = re.compile(r"^([A-Z]\w*) (is .*)$")


def published(name: str, kinds: list[str]) -> dict[str, Any]:
    """Of each configuration: the packed share of the numbers in weights of two dimensions and more, the bytes, and what
    stays float, by kind and reason; ``error`` where the published config cannot be planned."""
    care = CARE.get(name, Care())
    found: dict[str, Any] = {"family": name, "kinds": {}}
    try:
        if care.left:
            raise LookupError(care.left)
        one = family(name, care.cls)
        found["class"] = one.model_class.__name__
        for kind in kinds:
            found["kinds"][kind] = planned(one.config_class(**care.config), one.model_class, CONFIGS[kind]())
    except Exception as error:
        found["error"] = short(error)
    return found


def planned(config: Any, cls: Any, wanted: QuantoConfig) -> dict[str, Any]:
    """Parameters, bytes, packed share, and the largest of what stays float as (kind, reason, share)."""
    plan = quanto_hf.plan(config, wanted, auto_class=cls, device_map="cpu", context=0, dtype=torch.bfloat16)
    left: Counter[tuple[str, str]] = Counter()
    packed = total = everything = 0
    for row in plan.report.rows:
        numel = torch.Size(row.shape).numel()
        everything += numel
        if len(row.shape) < 2:
            continue
        total += numel
        if not row.reason:
            packed += numel
            continue
        typed = TYPE.match(row.reason)
        left[typed.groups() if typed else ("", row.reason)] += numel
    return {
        "parameters": everything,
        "nbytes": plan.nbytes,
        "share": packed / total if total else 1.0,
        "left": [[*kind, count / total] for kind, count in left.most_common()],
    }
