"""What other quantizers call the things that a QuantoConfig has: for errors that say what to write instead."""

import difflib
import re
from collections.abc import Iterable, Mapping
from reprlib import Repr
from typing import Any

from quanto_hf.qtypes import weight_names

# keyword of another tool -> of a QuantoConfig, for those that mean the same
SAME = {
    "modules_to_not_convert": (
        "llm_int8_skip_modules", "skip_modules", "modules_to_skip", "exclude", "ignore", "ignored_layers",
        "exclude_modules", "linear_weights_not_to_quantize", "not_convert", "skip",
    ),
    "group_size": ("q_group_size", "block_size", "blocksize", "groupsize", "bnb_4bit_blocksize", "in_group_size"),
    "symmetric": ("sym", "zero_point", "use_zero_point", "asymmetric"),
    "fit": ("optimizer",),
    "activations": ("activation", "activation_scheme", "abits", "a_bits", "a_bit", "act_bits"),
    "overrides": ("dynamic_config", "dynamic", "config_groups", "modules", "layer_config"),
}  # fmt: skip
BITS = re.compile(r"(bits?|[wn]_?bits?|num_bits|quant_bits|weight_bits|nbits_.*)")
TYPE = re.compile(r"(weight|weights?_dtype|.*qtype|.*quant_type|dtype_weights?|.*quant_dtype|quant_level|format)")
ELSEWHERE = {
    "bnb_4bit_compute_dtype": "the dtype of from_pretrained",
    "torch_dtype": "the dtype of from_pretrained",
    "dtype": "the dtype of from_pretrained",
    "compute_dtype": "the dtype of from_pretrained",
    "device_map": "the device_map of from_pretrained",
}

# a bad value may be a list of every layer, a model or a tensor
SHORT = Repr()
SHORT.maxlist = SHORT.maxdict = SHORT.maxset = SHORT.maxtuple = 3
SHORT.maxstring, SHORT.maxother = 80, 60


def instead(keyword: str, value: Any, known: Iterable[str]) -> str | None:
    """What to write for a keyword of another tool, or None if nobody knows.

    Args:
        known: the keywords that there are.

    Example:
        >>> instead("load_in_4bit", True, ["weights"]), instead("bnb_4bit_quant_type", "nf4", ["weights"])
        ('weights="int4"', 'weights="nf4"')
        >>> instead("wieghts", "int8", ["weights", "fit"])
        "weights='int8'"
    """
    if match := re.fullmatch(r"load_in_(\d)bit", keyword):
        return f'weights="int{match[1]}"'
    if BITS.fullmatch(keyword):
        return f'weights="int{value}"' if f"int{value}" in weight_names() else 'weights="int4"'
    if TYPE.fullmatch(keyword):
        text = str(getattr(value, "name", value)).lower()
        # the longest name that is in it: float8_e5m2, not float8
        named = max((name for name in weight_names() if name in text), key=len, default="int4")
        return f'weights="{named}"'
    if keyword in ELSEWHERE:
        return ELSEWHERE[keyword]
    for own, foreign in SAME.items():
        if keyword in foreign and own in known:
            same = type(value) in (int, list, tuple) or own == "fit"
            return f"{own}={SHORT.repr(value)}" if same and own != "activations" else own
    near = difflib.get_close_matches(keyword, list(known), n=1, cutoff=0.75)
    return f"{near[0]}={SHORT.repr(value)}" if near else None


def hints(given: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """What to write for each keyword of another tool that somebody knows.

    Args:
        given: the unknown ones.
        known: the keywords that there are.
    """
    known = list(known)
    pairs = [(f"{name}={SHORT.repr(value)}", instead(name, value, known)) for name, value in given.items()]
    return [f"{there} in place of {here}" for here, there in pairs if there]


def unknown_keywords(what: str, given: Mapping[str, Any], known: Iterable[str]) -> str:
    """The sentence for keywords that there are not.

    Args:
        what: a call takes them, such as "QuantoConfig".
        given: the unknown ones.
        known: all that there are.
    """
    known = list(known)
    advice = hints(given, known)
    if not any("weights=" in hint for hint in advice):
        advice.append(f'a number type as {what}({"model, " if what == "quantize" else ""}weights="int4")')
    took = ", ".join(f"{name}={SHORT.repr(value)}" for name, value in given.items())
    return f"{what} does not take {took}: write {'; '.join(advice)} (its arguments are {', '.join(known)})"
