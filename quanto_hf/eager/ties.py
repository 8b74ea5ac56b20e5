"""Weights that modules share before a conversion are shared after it."""

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
                if module is first:
                    continue
                for held, parameter in list(module._parameters.items()):
                    part = held.removeprefix(name)
                    mine = first._parameters.get(first_name + part) if held.startswith(name) else None
                    if parameter is None or mine is None or mine.shape != parameter.shape:
                        continue
                    if (
                        mine.dtype == parameter.dtype
                        and mine.device == parameter.device
                        and bool((mine == parameter).all())
                    ):
                        module._parameters[held] = mine
