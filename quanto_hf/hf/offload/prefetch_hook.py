"""Hooks that bring offloaded weights to a device while another module computes, in the place of accelerate's."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import find_device, named_module_tensors, send_to_device
from torch import nn

from quanto_hf.hf.load.names import split_name
from quanto_hf.io.lanes import Lane, lane_to
from quanto_hf.io.prefetch import Prefetcher


class PrefetchHook(AlignDevicesHook):  # type: ignore[misc]
    """accelerate's hook with another way to get the weights.

    Args:
        hook: the one whose place it takes.
        name: of the module.
        prefetcher: for all modules of a device.
    """

    def __init__(self, hook: AlignDevicesHook, name: str, prefetcher: Prefetcher) -> None:
        self.__dict__.update(hook.__dict__)
        self.name, self.prefetcher = name, prefetcher
        self.empty: dict[str, torch.Tensor] = {}

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Remembers the empty tensors; what accelerate's hook does here has been done."""
        self.empty = {name: _get(module, name) for name in offloaded_names(module, self)}
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The weights, and the inputs, are on the device."""
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        inputs = send_to_device(args, self.execution_device)
        named = send_to_device(kwargs, self.execution_device, skip_keys=self.skip_keys)
        self.prefetcher.enter(self.name, lambda tensors: _put(module, tensors))
        return inputs, named

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """The weights may go."""
        self.leave(module)
        if self.io_same_device and self.input_device is not None:
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output

    def leave(self, module: nn.Module) -> None:
        """Give the weights back, unless another thread computes with them."""
        self.prefetcher.leave(self.name, lambda: _put(module, self.empty))


def offloaded_names(module: nn.Module, hook: AlignDevicesHook) -> list[str]:
    """The tensors of a module that its hook brings in."""
    tensors = named_module_tensors(
        module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )
    return [name for name, _ in tensors]


def prefetch(
    model: nn.Module,
    hooks: Mapping[str, AlignDevicesHook],
    make_lane: Callable[[torch.device], Lane] = lane_to,
) -> None:
    """Put :class:`PrefetchHook` in the place of accelerate's hooks that bring weights in.

    Args:
        model: with these hooks.
        hooks: module name -> its hook. One that is part of several hooks of a module stays.
        make_lane: the way to a device.
    """
    prefetchers: dict[torch.device, Prefetcher] = {}
    # as they are now: what calibration adds to a layer later is in no file
    names = {name: offloaded_names(model.get_submodule(name), hook) for name, hook in hooks.items()}
    for name, hook in hooks.items():
        module: Any = model.get_submodule(name)
        if module._hf_hook is not hook:
            continue
        device = torch.device(hook.execution_device)
        if device not in prefetchers:
            prefetchers[device] = Prefetcher(make_lane(device), _Reader(hooks, names))
        mine = PrefetchHook(hook, name, prefetchers[device])
        hook.original_devices = {}  # so that taking it off moves nothing
        remove_hook_from_module(module)
        add_hook_to_module(module, mine)
        forward: Any = module._old_forward
        # a partial, which deepcopy follows to what it holds; a function would run the module that was copied
        module._old_forward = partial(_run_guarded, module, mine, forward)


@dataclass(frozen=True)
class _Reader:
    """The tensors of a module, from its files."""

    hooks: Mapping[str, AlignDevicesHook]
    names: Mapping[str, list[str]]

    def __call__(self, key: Hashable) -> dict[str, torch.Tensor]:
        weights = self.hooks[str(key)].weights_map
        return {leaf: weights[leaf] for leaf in self.names[str(key)]}


def _run_guarded(module: nn.Module, hook: PrefetchHook, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """accelerate does not tell a hook that the forward pass has failed; the weights would stay on the device."""
    try:
        return forward(*args, **kwargs)
    except BaseException:
        hook.leave(module)
        raise


def _get(module: nn.Module, name: str) -> torch.Tensor:
    owner, leaf = split_name(module, name)
    tensor: torch.Tensor = getattr(owner, leaf)
    return tensor


def _put(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, leaf = split_name(module, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            # of the type of the empty one: nn.Parameter, or StoredParameter
            held: Any = type(owner._parameters[leaf])
            owner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else held(tensor, False)
