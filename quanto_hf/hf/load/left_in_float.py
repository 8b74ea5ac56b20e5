"""One warning about what stays float though it could be packed and nobody asked to leave it."""

import warnings
from typing import Any

from torch import nn

from quanto_hf.flow import Assignment, FloatWeight, first_match, float_weights, warn_of_notes
from quanto_hf.flow.routers import REASON as ROUTER

# bytes of a parameter from which on it is worth a warning that it stays float
LARGE = 1 << 20
# the same for embeddings and heads, which stay float by default
LARGE_TABLE = 1 << 24
# share of the weights that could be packed, from which on it is worth one though each parameter is small; and below
# which embeddings and heads, which stay float by default, are left to the report
SHARE = 0.1
# kinds that are told of one by one
KINDS = 3


def warn_before_loading(model: Any, assignment: Assignment, config: Any) -> None:
    """Warn of what stays float, and of what schemes have to say about layers. See :func:`warn_of_floats`."""
    warn_of_floats(model, assignment, config)
    warn_of_notes(model, assignment)


def warn_of_floats(model: Any, assignment: Assignment, config: Any) -> None:
    """Warn of weights that stay float without having been asked for: how much, of which kinds, and what packs them.

    What the config leaves in float by name, routers and gates are no news. Embeddings and output heads, which stay
    float by default, count where one takes more than 16 MiB, and they are more than a tenth of the weights that could
    be packed. The others count where one takes more than 1 MiB, or all of them more than a tenth.
    ``quanto_hf.report(model)`` tells of all.

    Args:
        model: on meta, before its modules are replaced.
        assignment: what is to be packed.
        config: what was asked for.
    """
    # a tied head is counted as its embedding
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    left = [weight for weight in float_weights(model, assignment.left, assignment.chosen) if weight.name not in tied]
    total = sum(weight.numel for weight in left) + _numel(model, assignment)
    left = [weight for weight in left if not _asked(weight, config)]
    tables = [weight for weight in left if _is_table(model, weight)]
    others = [weight for weight in left if weight not in tables]
    found = others if _matters(others, LARGE) or _share(others, total) > SHARE else []
    if _matters(tables, LARGE_TABLE) and _share(tables, total) > SHARE:
        found = [*found, *tables]
    name = type(model).__name__
    if found:
        largest = max(found, key=lambda weight: weight.nbytes)
        count = "1 parameter" if len(found) == 1 else f"{len(found)} parameters, the largest"
        head = f"{_share(found, total):.0%} of the weights of {name} stay in float: {_size(found)} in {count}"
        warnings.warn("\n  ".join([f"{head} {largest.name}", *_lines(found, tables, config)]), stacklevel=4)
    elif not assignment.chosen:
        warnings.warn(
            f"no linear layer of {name} is quantized; call quanto_hf.report(model) for the reasons", stacklevel=4
        )


def _lines(found: list[FloatWeight], tables: list[FloatWeight], config: Any) -> list[str]:
    """A line for each kind: its bytes, and what packs it or why nothing does, the most bytes first."""
    kinds: dict[tuple[str, str], list[FloatWeight]] = {}
    for weight in found:
        if weight in tables:
            key = "embeddings and heads", "embeddings" if hasattr(config, "embeddings") else "float by default"
        else:
            key = weight.kind, "named" if weight.named else weight.reason
        kinds.setdefault(key, []).append(weight)
    ordered = sorted(kinds.items(), key=lambda item: -sum(weight.nbytes for weight in item[1]))
    lines = []
    for (kind, how), weights in ordered[:KINDS]:
        told = how
        if how == "embeddings":
            told = "QuantoConfig(embeddings='int8') packs them"
        elif how == "named":
            told = f"QuantoConfig(overrides={_overrides(weights, config)}) packs them"
        lines.append(f"{kind}, {_size(weights)}: {told}")
    if rest := [weight for _, weights in ordered[KINDS:] for weight in weights]:
        lines.append(f"{_size(rest)} of other kinds: see quanto_hf.report(model)")
    return lines


def _overrides(weights: list[FloatWeight], config: Any) -> dict[str, dict[str, str]]:
    """Overrides that name these weights: by the last part of their names, which is that of a layer."""
    leaves: dict[str, int] = {}
    for weight in weights:
        leaf = f"*.{weight.label.rpartition('.')[2]}" if "." in weight.label else weight.label
        leaves[leaf] = leaves.get(leaf, 0) + weight.nbytes
    if len(leaves) > KINDS and all("conv" in leaf for leaf in leaves):
        leaves = {"*conv*": 0}
    return {leaf: {"weights": config.weights} for leaf in sorted(leaves, key=lambda leaf: -leaves[leaf])[:KINDS]}


def _asked(weight: FloatWeight, config: Any) -> bool:
    """Whether the config leaves a weight in float by name, or it is a router, which stays float by rule."""
    names = ("modules_to_not_convert", "linear_weights_not_to_quantize")
    patterns = [pattern for name in names for pattern in getattr(config, name, None) or ()]
    patterns += [p for p, values in config.overrides.items() if values.get("weights", "") is None]
    return weight.reason == ROUTER or first_match(weight.label, patterns) is not None


def _is_table(model: nn.Module, weight: FloatWeight) -> bool:
    """Whether a weight is an embedding or a head, which stay float by default."""
    owner = model.get_submodule(weight.name.rpartition(".")[0])
    return isinstance(owner, nn.Embedding) or "head" in weight.reason


def _numel(model: nn.Module, assignment: Assignment) -> int:
    """Number of the weights that are packed."""
    parameters = dict(model.named_parameters())
    both = ((parameters.get(f"{name}.weight"), parameters.get(name)) for name in assignment.chosen)
    return sum(tensor.numel() for pair in both for tensor in pair if tensor is not None)


def _matters(weights: list[FloatWeight], large: int) -> bool:
    """Whether one of them is large."""
    return any(weight.nbytes >= large for weight in weights)


def _share(weights: list[FloatWeight], total: int) -> float:
    return sum(weight.numel for weight in weights) / total if total else 0.0


def _size(weights: list[FloatWeight]) -> str:
    """Their bytes, for people."""
    nbytes = sum(weight.nbytes for weight in weights)
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
