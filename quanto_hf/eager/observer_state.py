"""What observers have seen, apart from the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from quanto_hf.eager.hooks import OBSERVER

__all__ = ["get_observer_state_dict", "load_observer_state_dict"]


def get_observer_state_dict(mod: nn.Module) -> dict[str, torch.Tensor]:
    """The part of the state dict that belongs to observers of activations."""
    return {key: value for key, value in mod.state_dict().items() if f".{OBSERVER}." in f".{key}"}


def load_observer_state_dict(mod: nn.Module, obs_dict: Mapping[str, Any]) -> None:
    """Give a prepared model what :func:`get_observer_state_dict` returned for one of the same architecture.

    Raises:
        RuntimeError: the two do not have the same observers; the text names each tensor.
    """
    mine, given = set(get_observer_state_dict(mod)), set(obs_dict)
    if mine != given:
        missing, unexpected = ", ".join(sorted(mine - given)), ", ".join(sorted(given - mine))
        raise RuntimeError(
            f"these are not the observers of this model; missing: [{missing}], unexpected: [{unexpected}]"
        )
    mod.load_state_dict(dict(obs_dict), strict=False)
