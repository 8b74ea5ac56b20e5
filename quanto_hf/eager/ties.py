"""Weights that modules share before a conversion are shared after it."""

import torch
from torch import nn


class Ties:
    """Which new modules come from modules with the same weight."""

    def __init__(self) -> None:
        # the old weights are held, so that their ids stay theirs
        self.groups: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module]]]] = {}

    def note(self, old: nn.Module, new: nn.Module) -> None:
        """A module was replaced."""
        for name, parameter in old.named_parameters(remove_duplicate=False):
            if parameter is not None:
                self.groups.setdefault(id(parameter), (parameter, []))[1].append((name.rpartition(".")[2], new))

    def share(self) -> None:
        """Let new modules of one weight share the tensors that are equal in all of them."""
        for _, users in self.groups.values():
            first_name, first = users[0]
            for name, module in users[1:]:
                for held, parameter in list(module._parameters.items()):
                    mine = first._parameters.get(first_name + held.removeprefix(name))
                    if module is not first and held.startswith(name) and _equal(mine, parameter):
                        module._parameters[held] = mine


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return one.device.type == "meta" or torch.equal(one, other)
